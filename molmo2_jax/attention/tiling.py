"""How a kernel walks a TreeMask: tile lengths and work lists, made once per step and shared by all layers.

B rows, T queries and S keys (whole tiles); Q query tiles, K key tiles, k length of a key tile; R rows and C
columns of a table of tiles.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from molmo2_jax.attention import tree_mask

SKIP, FULL, INTERVAL, VISUAL = 0, 1, 2, 3  # classes of a tile: what its mask needs

# One work item is one int32 word: batch (6 bits) | row of tiles (11) | class (2) | column (11) | flags (2).
_BATCH_SHIFT, _ROW_SHIFT, _CLASS_SHIFT, _COLUMN_SHIFT = 26, 15, 13, 2
_TILE_BITS = 0x7FF
MAX_ROWS, MAX_TILES = 64, _TILE_BITS + 1
FIRST_OF_COLUMN, LAST_OF_COLUMN = 1, 2
_FAR = 2**30
OUT, LOG_SUM = "attention_out", "attention_log_sum"  # residuals of the backward pass, for remat policies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tile lengths, and how the backward pass accumulates.

    ring: key tiles whose gradients are accumulated at once in fast memory. All of them: one fused pass.
      Fewer: fused where the mask allows it, else two passes. 0: always two passes.
    """
    query_tile: int
    key_tile: int
    ring: int
    vmem_bytes: int | None = None  # fast memory that a kernel may use; None: the compiler's default
    interpret: bool = False        # on CPU, for tests

    def __post_init__(self):
        if min(self.query_tile, self.key_tile) < 1 or self.ring < 0:
            raise ValueError(f"tiles must be >= 1 and the ring >= 0; got {self}")


class Work(NamedTuple):
    """A mask as the kernels read it: its integers, and the lists of tiles to visit."""
    first: jax.Array          # int32[B], position of the first query of each row
    query_group: jax.Array    # int32[B, 1, T], -1 for text
    keys: jax.Array           # int32[B, 2, S]: end; group, -2 for text
    words: jax.Array          # query-major work list
    borders: jax.Array        # row boundaries of the list; the last is its length
    key_words: jax.Array | None    # key-major list, where the backward pass may need two passes
    key_borders: jax.Array | None
    span: jax.Array | None        # int32[1], ring that the mask needs
    touched: jax.Array | None     # bool[B, S], keys in a visited tile; None: all are


def no_gradient(work: Work) -> Work:
    """Returns float0 zeros, the cotangents of integer inputs."""
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), work)


def visible(i, j, end, query_group, key_group):
    """Returns whether query position i sees key position j; `end` and groups as in a Work, broadcast."""
    return ((j <= i) & (i < end)) | (query_group == key_group)


def round_up(length: int, tile: int) -> int:
    """Returns the smallest multiple of `tile` >= length."""
    return -(-length // tile) * tile


def num_key_tiles(num_queries: int, num_keys: int, query_tile: int, key_tile: int) -> int:
    """Returns the number of key tiles: enough that padded queries also have a key at their own position."""
    return -(-(num_keys + round_up(num_queries, query_tile) - num_queries) // key_tile)


def prepare(mask: tree_mask.TreeMask, queries: tree_mask.Queries, tiling: Tiling) -> Work:
    """Returns the work of one mask; memory is O(S), plus a table of all tiles.

    Raises:
      ValueError: there are more rows or tiles than a work list holds.
    """
    num_keys, num_queries = mask.end.shape[1], queries.group.shape[1]
    key_tiles = num_key_tiles(num_queries, num_keys, tiling.query_tile, tiling.key_tile)
    is_square = num_keys == num_queries  # self-attention: every key tile holds the diagonal, so it is visited
    mask = tree_mask.pad(mask, key_tiles * tiling.key_tile)
    queries = tree_mask.pad_queries(queries, round_up(num_queries, tiling.query_tile))
    classes = tile_classes(mask, tiling.query_tile, tiling.key_tile, queries)
    words, borders = work_list(classes)
    key_words = key_borders = span = None
    if tiling.ring < key_tiles:
        key_words, key_borders = work_list(classes, key_major=True)
        span = needed_ring(classes)[None]
    touched = None if is_square else jnp.repeat((classes > 0).any(1), tiling.key_tile, axis=1)
    group = jnp.where(mask.group >= 0, mask.group, -2)
    return Work(queries.first, queries.group[:, None], jnp.stack([mask.end, group], 1), words, borders,
                key_words, key_borders, span, touched)


def _group_range(group_BS: jax.Array, tile: int):
    """Returns per tile the smallest and the largest group, and whether all tokens are visual."""
    tiles = group_BS.reshape(group_BS.shape[0], -1, tile)
    visual = tiles >= 0
    return jnp.where(visual, tiles, _FAR).min(-1), tiles.max(-1), visual.all(-1)


def tile_classes(mask: tree_mask.TreeMask, query_tile: int, key_tile: int,
                 queries: tree_mask.Queries | None = None) -> jax.Array:
    """Returns int32[B, Q, K]: SKIP, FULL (no masking), INTERVAL (`end` only) or VISUAL (also `group`).

    Exact with one exception: where groups have gaps, a VISUAL tile may have no visible pair.
    """
    first, group = queries or tree_mask.all_queries(mask)
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

    Rows of the list are query tiles and columns key tiles, or the reverse if `key_major`. A row holds its
    FULL tiles, then the others: row r starts at borders[2r], its others at borders[2r + 1], and borders[-1]
    is the length of the list. The first and the last word of a column, within its batch row, carry a flag.

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
    # Words ascend in list order, so sorting moves the active ones to the front.
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


def needed_ring(classes: jax.Array) -> jax.Array:
    """Returns int32[]: the most consecutive key tiles that a query-major walk has open at once.

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
    """Returns the batch row of a word."""
    return jax.lax.shift_right_logical(word, _BATCH_SHIFT)


def row_of(word: jax.Array) -> jax.Array:
    """Returns the row of tiles of a word: its query tile, or key tile in a key-major list."""
    return (word >> _ROW_SHIFT) & _TILE_BITS


def column_of(word: jax.Array) -> jax.Array:
    """Returns the column of a word: its key tile, or query tile in a key-major list."""
    return (word >> _COLUMN_SHIFT) & _TILE_BITS


def is_class(word: jax.Array, kind: int) -> jax.Array:
    """Returns whether a word's tile has the class `kind`."""
    return (word & (3 << _CLASS_SHIFT)) == kind << _CLASS_SHIFT


def same_row(word: jax.Array, other: jax.Array) -> jax.Array:
    """Returns whether two words belong to the same row of tiles of the same batch row."""
    return (word >> _ROW_SHIFT) == (other >> _ROW_SHIFT)
