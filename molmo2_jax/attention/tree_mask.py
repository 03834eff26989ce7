"""The attention mask of packed message trees, in two int32 vectors per row.

A token is seen by a contiguous run of later tokens: a root token until its example ends, a branch token
until its branch ends. On top of that, all visual tokens of one group see each other in both directions:

    allowed(i, j) = ( j <= i < end[j] )  or  ( group[i] = group[j] and group[j] >= 0 )

An example with two visual tokens v around a timestamp t, and two branches a, b (rows look at columns):

         v t v a a b b      end    7 7 7 5 5 7 7
    v    x . x . . . .      group  0 - 0 - - - -
    t    x x . . . . .
    v    x x x . . . .
    a    x x x x . . .
    a    x x x x x . .
    b    x x x . . x .
    b    x x x . . x x

B batch, S positions, Q query tiles, K key tiles, k length of a key tile; R rows and C columns of a table of
tiles.

Source: paper, section 3.2; reference: olmo/models/molmo2/molmo2.py, which builds the S x S mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SKIP, FULL, INTERVAL, VISUAL = 0, 1, 2, 3  # classes of a tile: what its mask needs

# One work item is one int32 word: batch (6 bits) | row of tiles (11) | class (2) | column (11) | flags (2).
_BATCH_SHIFT, _ROW_SHIFT, _CLASS_SHIFT, _COLUMN_SHIFT = 26, 15, 13, 2
_TILE_BITS = 0x7FF
MAX_ROWS, MAX_TILES = 64, _TILE_BITS + 1
FIRST_OF_COLUMN, LAST_OF_COLUMN = 1, 2
_FAR = 2**30


class TreeMask(NamedTuple):
    """Who sees whom. `end` int32[B, S], exclusive and > own position; `group` int32[B, S], -1 at text.

    Groups are numbered 0, 1, ... along a row, in order and without gaps.
    """
    end: jax.Array
    group: jax.Array


class Queries(NamedTuple):
    """The T positions of each row that ask: first[b], first[b] + 1, ...; with `group` as in TreeMask."""
    first: jax.Array   # int32[B]
    group: jax.Array   # int32[B, T]


def from_batch(batch, visual_attention: str) -> TreeMask:
    """Returns the mask of a packed batch under one of the paper's attention settings (Table 8b).

    "image_tokens": all visual tokens of an example see each other. "within_image": those of one image or
    frame do, and earlier ones are seen by causality. "causal": no token sees a later one.
    """
    groups = {"image_tokens": batch.group, "within_image": batch.image,
              "causal": jnp.full_like(batch.group, -1)}
    return TreeMask(batch.end, groups[visual_attention])


def causal(rows: int, length: int) -> TreeMask:
    """Returns the mask under which every token sees all before it and itself."""
    return TreeMask(jnp.full((rows, length), length, jnp.int32), jnp.full((rows, length), -1, jnp.int32))


def segments(segment_BS: jax.Array) -> TreeMask:
    """Returns the causal mask of packed documents: runs of equal numbers; tokens below 0 see themselves."""
    length = segment_BS.shape[1]
    position = jnp.arange(length, dtype=jnp.int32)
    is_last = jnp.pad(segment_BS[:, 1:] != segment_BS[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    next_end = jax.lax.cummin(jnp.where(is_last, position + 1, length), axis=1, reverse=True)
    return TreeMask(jnp.where(segment_BS < 0, position + 1, next_end), jnp.full_like(segment_BS, -1))


def everything(rows: int, length: int) -> TreeMask:
    """Returns the mask under which all tokens of a row see each other."""
    return TreeMask(jnp.full((rows, length), length, jnp.int32), jnp.zeros((rows, length), jnp.int32))


def all_queries(mask: TreeMask) -> Queries:
    """Returns the queries of self-attention: every position of a row."""
    return Queries(jnp.zeros(mask.end.shape[0], jnp.int32), mask.group)


def dense(mask: TreeMask, queries: Queries | None = None) -> jax.Array:
    """Returns bool[B, T, S] (query, key). Quadratic: for tests, drawings, and few queries at a time."""
    first, group = queries or all_queries(mask)
    i = (first[:, None] + jnp.arange(group.shape[1]))[:, :, None]
    j = jnp.arange(mask.end.shape[1])
    causal = (j <= i) & (i < mask.end[:, None, :])
    return causal | ((group[:, :, None] == mask.group[:, None, :]) & (mask.group[:, None, :] >= 0))


def pad(mask: TreeMask, length: int) -> TreeMask:
    """Returns the mask lengthened to `length` with tokens that see and are seen by themselves only."""
    batch, old = mask.end.shape
    tail = jnp.broadcast_to(jnp.arange(old, length, dtype=jnp.int32) + 1, (batch, length - old))
    return TreeMask(jnp.concatenate([mask.end, tail], 1),
                    jnp.concatenate([mask.group, jnp.full_like(tail, -1)], 1))


def pad_queries(queries: Queries, length: int) -> Queries:
    """Returns the queries lengthened to `length` positions, the new ones of no group."""
    room = ((0, 0), (0, length - queries.group.shape[1]))
    return queries._replace(group=jnp.pad(queries.group, room, constant_values=-1))


def _group_range(group_BS: jax.Array, tile: int):
    """Returns per tile the smallest and the largest group, and whether all tokens are visual."""
    tiles = group_BS.reshape(group_BS.shape[0], -1, tile)
    visual = tiles >= 0
    return jnp.where(visual, tiles, _FAR).min(-1), tiles.max(-1), visual.all(-1)


def tile_classes(mask: TreeMask, query_tile: int, key_tile: int, queries: Queries | None = None
                 ) -> jax.Array:
    """Returns int32[B, Q, K]: SKIP, FULL (no masking), INTERVAL (`end` only) or VISUAL (also `group`).

    Exact, but for one case: where groups have gaps, a tile may be VISUAL in which nobody sees anybody.
    """
    first, group = queries or all_queries(mask)
    batch, length = mask.end.shape
    end_B1Kk = mask.end.reshape(batch, 1, -1, key_tile)
    q_low, q_high, q_all = (x[:, :, None] for x in _group_range(group, query_tile))
    k_low, k_high, k_all = (x[:, None, :] for x in _group_range(mask.group, key_tile))
    q_first = first[:, None, None] + jnp.arange(0, group.shape[1], query_tile)[:, None]
    k_first = jnp.arange(0, length, key_tile)[None, :]
    q_last, k_last = q_first + query_tile - 1, k_first + key_tile - 1

    overlap = (k_first <= q_last) & (k_last >= q_first)
    interval = overlap | ((k_last < q_first) & (end_B1Kk.max(-1) > q_first))
    visual = (q_low <= k_high) & (k_low <= q_high) & (q_high >= 0) & (k_high >= 0)
    one_group = q_all & k_all & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    full = ((k_last <= q_first) & (end_B1Kk.min(-1) > q_last)) | one_group
    above = visual & (k_last > q_first)  # below the diagonal a root key is visible anyway
    return jnp.where(full, FULL, jnp.where(above, VISUAL, jnp.where(interval, INTERVAL, SKIP))
                     ).astype(jnp.int32)


def work_list(classes: jax.Array, key_major: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns (words int32[B*Q*K], borders int32[2*B*Q + 1]): the tiles to compute, zeros after the last.

    Rows of the list are query tiles and columns key tiles, or the other way round if `key_major`. Within a
    row come the FULL tiles, then the others: row r begins at borders[2r], its others at borders[2r + 1], and
    borders[-1] is the length of the list. The first and the last word of a column, within its batch row,
    carry a flag.

    Raises:
      ValueError: more than 64 rows or 2048 tiles per side, which a word cannot hold.
    """
    batch, queries, keys = classes.shape
    if batch > MAX_ROWS or max(queries, keys) > MAX_TILES:
        raise ValueError(f"a work list holds at most {MAX_ROWS} rows and {MAX_TILES} tiles per side; got "
                         f"{batch} rows, {queries} x {keys} tiles")
    if key_major:
        classes = classes.transpose(0, 2, 1)
    b, row, column = (jax.lax.broadcasted_iota(jnp.uint32, classes.shape, axis) for axis in range(3))
    active = classes != SKIP
    first, last = _touched_rows(active)
    flags = (jnp.where(row == first, FIRST_OF_COLUMN, 0) | jnp.where(row == last, LAST_OF_COLUMN, 0))
    words = (b << _BATCH_SHIFT) | (row << _ROW_SHIFT) | (column << _COLUMN_SHIFT)
    words = words | ((classes << _CLASS_SHIFT) | flags).astype(jnp.uint32)
    # Words ascend in the order of the list, so sorting puts the active ones in front.
    words = jnp.sort(jnp.where(active, words, jnp.uint32(0xFFFFFFFF)).reshape(-1))
    is_full = classes == FULL
    counts = jnp.stack([is_full.sum(-1, dtype=jnp.int32), (active & ~is_full).sum(-1, dtype=jnp.int32)], -1)
    borders = jnp.pad(jnp.cumsum(counts.reshape(-1), dtype=jnp.int32), (1, 0))
    words = jnp.where(jnp.arange(words.shape[0]) < borders[-1], words, 0)
    return jax.lax.bitcast_convert_type(words, jnp.int32), borders


def _touched_rows(active_BRC):
    """Returns the first and last active row of each column, [B, 1, C]; (rows, -1) where there is none."""
    rows = active_BRC.shape[1]
    row = jnp.arange(rows)[:, None]
    return (jnp.where(active_BRC, row, rows).min(1, keepdims=True),
            jnp.where(active_BRC, row, -1).max(1, keepdims=True))


def span(classes: jax.Array) -> jax.Array:
    """Returns int32[]: how many consecutive key tiles a query-major walk has open at once, at most.

    A key tile is open from the first to the last query tile that touches it.
    """
    first, last = _touched_rows(classes != SKIP)
    row = jnp.arange(classes.shape[1])[:, None]
    column = jnp.arange(classes.shape[2])
    is_open = (first <= row) & (row <= last)
    return (jnp.where(is_open, column, -1).max(-1)
            - jnp.where(is_open, column, classes.shape[2]).min(-1) + 1).max()


def unpack(word: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (batch, row, column, class) of a word."""
    return batch_of(word), row_of(word), column_of(word), (word >> _CLASS_SHIFT) & 3


def batch_of(word: jax.Array) -> jax.Array:
    return jax.lax.shift_right_logical(word, _BATCH_SHIFT)


def row_of(word: jax.Array) -> jax.Array:
    return (word >> _ROW_SHIFT) & _TILE_BITS


def column_of(word: jax.Array) -> jax.Array:
    return (word >> _COLUMN_SHIFT) & _TILE_BITS


def is_class(word: jax.Array, kind: int) -> jax.Array:
    return (word & (3 << _CLASS_SHIFT)) == kind << _CLASS_SHIFT


def same_row(word: jax.Array, other: jax.Array) -> jax.Array:
    """Returns whether two words lie in the same row of tiles of the same batch row."""
    return (word >> _ROW_SHIFT) == (other >> _ROW_SHIFT)
