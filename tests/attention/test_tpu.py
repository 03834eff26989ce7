"""The TPU kernels, interpreted, against attention under the dense mask: what only they have, the ring."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tree_mask
from tests.attention import reference
from tests.attention import rows


@functools.partial(jax.jit, static_argnums=(1, 2))
def span(mask, query_tile, key_tile):
    padded = tree_mask.pad(mask, tiling_lib.round_up(mask.end.shape[1], max(query_tile, key_tile)))
    return tiling_lib.needed_ring(tiling_lib.tile_classes(padded, query_tile, key_tile))


# Lengths that are no multiple of a tile; one pass, two passes, and a choice by the mask.
@pytest.mark.parametrize("rows_, length, num_heads, num_kv_heads, head_dim, tiles", [
    (2, 100, 8, 2, 64, (16, 32, reference.ALL)),
    (1, 300, 8, 1, 128, (32, 256, 0)),
    (3, 75, 2, 2, 72, (16, 16, 3)),
])
@pytest.mark.slow(10)
def test_kernels_equal_dense_attention_on_random_packs(
        rows_, length, num_heads, num_kv_heads, head_dim, tiles):
    query_tile, key_tile, ring = tiles
    tiling = tiling_lib.Tiling(query_tile=query_tile, key_tile=key_tile, ring=ring, interpret=True)
    fits = set()
    for seed in range(25):
        mask = rows.random_mask(seed, rows_, length)
        reference.assert_equal_to_dense(reference.kernel("tpu", tiling), mask, *rows.random_tensors(
            seed, rows_, length, num_heads, num_kv_heads, head_dim))
        fits.add(int(span(mask, query_tile, key_tile)) <= ring)
    assert fits == ({True, False} if ring == 3 else {ring > 0})


@pytest.mark.slow(6)
def test_nothing_is_read_that_was_not_written():
    """The simulator of a TPU core fills memory with NaN, and copies only at the wait for a copy."""
    params = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
    tiling = tiling_lib.Tiling(query_tile=128, key_tile=128, ring=1, interpret=params)
    mask = tree_mask.segments(np.repeat([[0, 1]], 128, axis=1))
    reference.assert_equal_to_dense(reference.kernel("tpu", tiling), mask,
                                    *rows.random_tensors(0, 1, 256, 2, 1, 128))
