"""Flash attention over a TreeMask for TPU.

Tiles that nobody needs are neither loaded nor visited: the grid runs over a work list, whose length is only
known on the device. Tiles in which everybody sees everybody are computed without a mask; in the others the
mask is made in the kernel from two integers per key. A tile holds all query heads of a key head, so keys and
values are loaded once for the whole group and never repeated.
"""

import functools

from jax.experimental.pallas import tpu as pltpu

from molmo2_jax.attention import flash
from molmo2_jax.attention import pallas_tpu_kernels as kernels
from molmo2_jax.attention import tiling as tiling_lib

LANES = kernels.LANES
MAX_WORDS = 2**17    # of a work list: 512 KiB, half of the scalar memory of a core
RESERVED = 16 * 2**20  # bytes of fast memory for everything but the ring and the mask


def choose_tiling(rows: int, num_queries: int, num_keys: int, num_groups: int, head_dim: int
                  ) -> tiling_lib.Tiling:
    """Returns the tiling for the TPU at hand: 1024 rows of queries, of up to 512 positions, by 512 keys.

    Smaller tiles would skip a little more of the mask, but a step costs some 300 cycles beside its tile, a
    quarter of one of half this size. The ring is as large as fast memory allows.

    Raises:
      ValueError: scalar memory cannot hold the list of tiles.
    """
    def num_words():
        key_tiles = tiling_lib.num_key_tiles(num_queries, num_keys, query_tile, key_tile)
        return rows * -(-num_queries // query_tile) * key_tiles

    query_tile = min(512, LANES * max(1, 1024 // (LANES * num_groups)),
                     tiling_lib.round_up(num_queries, LANES))
    key_tile = min(512, tiling_lib.round_up(num_keys, LANES))
    while num_words() > MAX_WORDS and query_tile * num_groups < 2048:
        query_tile *= 2
    if num_words() > MAX_WORDS:
        raise ValueError(f"attention on a TPU handles at most {MAX_WORDS} tiles per device; got "
                         f"{num_words()} for {rows} rows of {num_queries} queries and {num_keys} keys")
    vmem_bytes = min(100 * 2**20, pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8)
    mask_bytes = 4 * rows * (num_queries + 2 * num_keys)
    ring_tile_bytes = 2 * 4 * key_tile * tiling_lib.round_up(head_dim, LANES)
    ring = min(tiling_lib.num_key_tiles(num_queries, num_keys, query_tile, key_tile),
               max(0, vmem_bytes - RESERVED - mask_bytes) // ring_tile_bytes)
    return tiling_lib.Tiling(query_tile=query_tile, key_tile=key_tile, ring=ring, vmem_bytes=vmem_bytes)


attend = functools.partial(flash.attend, flash.Kernels(kernels.forward, kernels.backward))
