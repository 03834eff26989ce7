"""How a kernel walks over a TreeMask: tile lengths, and the lists of tiles, made once and shared by layers.

B rows, T queries and S keys (whole tiles).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from molmo2_jax.attention import tree_mask

OUT, LOG_SUM = "attention_out", "attention_log_sum"  # what a backward pass needs: names for policies of remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Lengths of tiles, and how the backward pass holds its sums.

    ring: key tiles whose gradients are open at once in fast memory. All of them: one fused pass. Fewer: fused
      where the mask allows it, else two passes. 0: always two passes.
    """
    query_tile: int
    key_tile: int
    ring: int
    vmem_bytes: int | None = None  # of fast memory that a kernel may use; None: the compiler's default
    interpret: bool = False        # on CPU, for tests

    def __post_init__(self):
        if min(self.query_tile, self.key_tile) < 1 or self.ring < 0:
            raise ValueError(f"tiles must be >= 1 and the ring >= 0; got {self}")


class Work(NamedTuple):
    """What the kernels need to know of a mask."""
    first: jax.Array          # int32[B], position of the first query of each row
    query_group: jax.Array    # int32[B, 1, T], -1 for text
    keys: jax.Array           # int32[B, 2, S]: end; group, -2 for text
    words: jax.Array          # query-major list of tiles
    borders: jax.Array        # of the rows of the list; the last is its length
    key_words: jax.Array | None    # key-major list, where the backward pass may need two passes
    key_borders: jax.Array | None
    span: jax.Array | None        # int32[1], ring that the mask needs
    touched: jax.Array | None     # bool[B, S], keys in a tile that is visited; None: all are


def no_gradient(work: Work) -> Work:
    """Returns what the gradient of integers is."""
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), work)


def visible(i, j, end, query_group, key_group):
    """Returns whether query position i sees key position j; the integers are those of a Work, broadcast."""
    return ((j <= i) & (i < end)) | (query_group == key_group)


def round_up(length: int, tile: int) -> int:
    return -(-length // tile) * tile


def num_key_tiles(num_queries: int, num_keys: int, query_tile: int, key_tile: int) -> int:
    """Returns the number of key tiles: enough that a padded query, too, has a key at its own position."""
    return -(-(num_keys + round_up(num_queries, query_tile) - num_queries) // key_tile)


def prepare(mask: tree_mask.TreeMask, queries: tree_mask.Queries, tiling: Tiling) -> Work:
    """Returns the work of one mask. O(S), and a table of all tiles.

    Raises:
      ValueError: there are more tiles than a work list holds.
    """
    num_keys, num_queries = mask.end.shape[1], queries.group.shape[1]
    key_tiles = num_key_tiles(num_queries, num_keys, tiling.query_tile, tiling.key_tile)
    is_square = num_keys == num_queries  # self-attention: every key tile holds the diagonal, so it is visited
    mask = tree_mask.pad(mask, key_tiles * tiling.key_tile)
    queries = tree_mask.pad_queries(queries, round_up(num_queries, tiling.query_tile))
    classes = tree_mask.tile_classes(mask, tiling.query_tile, tiling.key_tile, queries)
    words, borders = tree_mask.work_list(classes)
    key_words = key_borders = span = None
    if tiling.ring < key_tiles:
        key_words, key_borders = tree_mask.work_list(classes, key_major=True)
        span = tree_mask.span(classes)[None]
    touched = None if is_square else jnp.repeat((classes > 0).any(1), tiling.key_tile, axis=1)
    group = jnp.where(mask.group >= 0, mask.group, -2)
    return Work(queries.first, queries.group[:, None], jnp.stack([mask.end, group], 1), words, borders,
                key_words, key_borders, span, touched)
