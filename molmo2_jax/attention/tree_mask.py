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

B batch, S positions, Q query tiles, K key tiles.

Source: paper, section 3.2; reference: olmo/models/molmo2/molmo2.py, which builds the S x S mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SKIP, FULL, INTERVAL, VISUAL = 0, 1, 2, 3  # classes of a tile: what its mask needs

# One work item is one int32 word: batch | query tile | key tile | class.
_BATCH_SHIFT, _QUERY_SHIFT, _KEY_SHIFT = 26, 14, 2
_TILE_BITS = 0xFFF
_FAR = 2**30


class TreeMask(NamedTuple):
    """Who sees whom. `end` int32[B, S], exclusive and > own position; `group` int32[B, S], -1 at text.

    Groups are numbered 0, 1, ... along a row, in order and without gaps.
    """
    end: jax.Array
    group: jax.Array


def from_batch(batch, visual_attention: str) -> TreeMask:
    """Returns the mask of a packed batch under one of the paper's attention settings (Table 8b).

    "image_tokens": all visual tokens of an example see each other. "within_image": those of one image or
    frame do, and earlier ones are seen by causality. "causal": no token sees a later one.
    """
    groups = {"image_tokens": batch.group, "within_image": batch.image,
              "causal": jnp.full_like(batch.group, -1)}
    return TreeMask(batch.end, groups[visual_attention])


def dense(mask: TreeMask) -> jax.Array:
    """Returns bool[B, S, S] (query, key). Quadratic: for tests and drawings."""
    position = jnp.arange(mask.end.shape[1])
    i, j = position[:, None], position[None, :]
    causal = (j <= i) & (i < mask.end[:, None, :])
    return causal | ((mask.group[:, :, None] == mask.group[:, None, :]) & (mask.group[:, None, :] >= 0))


def pad(mask: TreeMask, length: int) -> TreeMask:
    """Returns the mask lengthened to `length` with tokens that see and are seen by themselves only."""
    batch, old = mask.end.shape
    tail = jnp.broadcast_to(jnp.arange(old, length, dtype=jnp.int32) + 1, (batch, length - old))
    return TreeMask(jnp.concatenate([mask.end, tail], 1),
                    jnp.concatenate([mask.group, jnp.full_like(tail, -1)], 1))


def _group_range(group_BS: jax.Array, tile: int):
    """Returns per tile the smallest and the largest group, and whether all tokens are visual."""
    tiles = group_BS.reshape(group_BS.shape[0], -1, tile)
    visual = tiles >= 0
    return jnp.where(visual, tiles, _FAR).min(-1), tiles.max(-1), visual.all(-1)


def tile_classes(mask: TreeMask, query_tile: int, key_tile: int) -> jax.Array:
    """Returns int32[B, Q, K]: SKIP, FULL (no masking), INTERVAL (`end` only) or VISUAL (also `group`)."""
    batch, length = mask.end.shape
    end_BKj = mask.end.reshape(batch, 1, -1, key_tile)
    q_low, q_high, q_all = (x[:, :, None] for x in _group_range(mask.group, query_tile))
    k_low, k_high, k_all = (x[:, None, :] for x in _group_range(mask.group, key_tile))
    q_first = jnp.arange(0, length, query_tile)[:, None]
    k_first = jnp.arange(0, length, key_tile)[None, :]
    q_last, k_last = q_first + query_tile - 1, k_first + key_tile - 1

    overlap = (k_first <= q_last) & (k_last >= q_first)
    interval = overlap | ((k_last < q_first) & (end_BKj.max(-1) > q_first))
    visual = (q_low <= k_high) & (k_low <= q_high) & (q_high >= 0) & (k_high >= 0)
    one_group = q_all & k_all & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    full = ((k_last <= q_first) & (end_BKj.min(-1) > q_last)) | one_group
    above = visual & (k_last > q_first)  # below the diagonal a root key is visible anyway
    return jnp.where(full, FULL, jnp.where(above, VISUAL, jnp.where(interval, INTERVAL, SKIP))
                     ).astype(jnp.int32)


def work_list(classes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (words int32[B*Q*K], count): the tiles to compute, query-major, zeros past `count`.

    Raises:
      ValueError: more than 64 rows or 4096 tiles per side, which a word cannot hold.
    """
    batch, queries, keys = classes.shape
    if batch > 64 or max(queries, keys) > _TILE_BITS + 1:
        raise ValueError("a work list holds at most 64 rows and 4096 tiles per side; got "
                         f"{batch} rows, {queries} x {keys} tiles")
    b, q, k = (jax.lax.broadcasted_iota(jnp.int32, classes.shape, axis) for axis in range(3))
    words = ((b << _BATCH_SHIFT) | (q << _QUERY_SHIFT) | (k << _KEY_SHIFT) | classes).reshape(-1)
    active = classes.reshape(-1) != SKIP
    index = jnp.nonzero(active, size=words.shape[0], fill_value=0)[0]
    count = active.sum(dtype=jnp.int32)
    return jnp.where(jnp.arange(words.shape[0]) < count, words[index], 0), count


def unpack(word: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (batch, query tile, key tile, class) of a word."""
    return (jax.lax.shift_right_logical(word, _BATCH_SHIFT), (word >> _QUERY_SHIFT) & _TILE_BITS,
            (word >> _KEY_SHIFT) & _TILE_BITS, word & 3)
