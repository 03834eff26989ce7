"""The TPU kernels, interpreted, against attention under the dense mask: outputs and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from molmo2_jax.attention import attend
from molmo2_jax.attention import pallas_tpu
from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tree_mask
from tests.attention import rows

TOLERANCE = 1e-5  # float32, for values up to 10 (in proportion above); measured 7e-6
ALL = tree_mask.MAX_TILES
IN_TILES = tiling_lib.Tiling(query_tile=16, key_tile=32, ring=ALL, interpret=True)


def tiled(tiling, q, k, v, mask):
    work = tiling_lib.prepare(mask, tree_mask.all_queries(mask), tiling)
    return pallas_tpu.attend(q, k, v, work, tiling)


def dense(q, k, v, mask):
    return attend.attend_visible(q, k, v, tree_mask.dense(mask))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, q, k, v, mask, grad):
    out, pull = jax.vjp(lambda *x: function(*x, mask), q, k, v)
    return out, *pull(grad.astype(out.dtype))


@functools.cache
def kernel(tiling):
    return functools.partial(tiled, tiling)


def assert_equal_to_dense(tiling, mask, q, k, v, grad):
    got = value_and_gradients(kernel(tiling), q, k, v, mask, grad)
    wanted = value_and_gradients(dense, q, k, v, mask, grad)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, wanted):
        size = max(10, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=TOLERANCE * size / 10, rtol=0, err_msg=name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def span(mask, query_tile, key_tile):
    padded = tree_mask.pad(mask, tiling_lib.round_up(mask.end.shape[1], max(query_tile, key_tile)))
    return tree_mask.span(tree_mask.tile_classes(padded, query_tile, key_tile))


# Lengths that are no multiple of a tile; one pass, two passes, and either by the mask.
@pytest.mark.parametrize("rows_, length, num_heads, num_kv_heads, head_dim, tiles", [
    (2, 100, 8, 2, 64, (16, 32, ALL)),
    (1, 90, 8, 1, 128, (32, 16, 0)),
    (3, 75, 2, 2, 72, (16, 16, 3)),
])
def test_kernels_equal_dense_attention_on_random_packs(
        rows_, length, num_heads, num_kv_heads, head_dim, tiles):
    query_tile, key_tile, ring = tiles
    tiling = tiling_lib.Tiling(query_tile=query_tile, key_tile=key_tile, ring=ring, interpret=True)
    fits = set()
    for seed in range(25):
        mask = rows.random_mask(seed, rows_, length)
        assert_equal_to_dense(tiling, mask, *rows.random_tensors(
            seed, rows_, length, num_heads, num_kv_heads, head_dim))
        fits.add(int(span(mask, query_tile, key_tile)) <= ring)
    assert fits == ({True, False} if ring == 3 else {ring > 0})


def test_two_runs_are_equal_bit_for_bit():
    mask, tensors = rows.random_mask(4, 2, 100), rows.random_tensors(4, 2, 100, 8, 2, 64)
    one, other = (value_and_gradients(kernel(IN_TILES), *tensors[:3], mask, tensors[3]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_bfloat16_is_as_close_to_float32_as_dense_attention_in_bfloat16():
    mask, tensors = rows.random_mask(3, 2, 100), rows.random_tensors(3, 2, 100, 8, 2, 64)
    half = [jnp.asarray(x, jnp.bfloat16) for x in tensors]
    exact = [x.astype(jnp.float32) for x in half]
    wanted = value_and_gradients(dense, *exact[:3], mask, exact[3])
    ours = value_and_gradients(kernel(IN_TILES), *half[:3], mask, half[3])
    theirs = value_and_gradients(dense, *half[:3], mask, half[3])
    for one, other, right in zip(ours, theirs, wanted):
        assert one.dtype == jnp.bfloat16
        error, peer = (float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - right) ** 2))) for x in (one, other))
        assert error <= 2 * peer


def test_nothing_is_read_that_was_not_written():
    """The simulator of a TPU core fills memory with NaN, and copies only when a copy is waited for."""
    params = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
    tiling = tiling_lib.Tiling(query_tile=128, key_tile=128, ring=1, interpret=params)
    mask = tree_mask.segments(np.repeat([[0, 1]], 128, axis=1))
    assert_equal_to_dense(tiling, mask, *rows.random_tensors(0, 1, 256, 2, 1, 128))


def test_examples_and_branches_are_isolated():
    end = np.repeat([30, 20, 30, 48], [10, 10, 10, 18])[None].astype(np.int32)
    end = np.concatenate([end, np.arange(49, 61)[None]], 1).astype(np.int32)  # padding
    group = np.where(np.isin(np.arange(60), [3, 5, 6, 32, 35]), np.arange(60) // 30, -1)[None]
    group = group.astype(np.int32)
    mask = tree_mask.TreeMask(end, group)
    root, one, other, example, padding = np.split(np.arange(60), [10, 20, 30, 48])
    tensors = rows.random_tensors(0, 1, 60, 4, 2, 64)
    for asked, hidden in ((one, (other, example, padding)), (other, (one, example, padding)),
                          (example, (root, one, other, padding)), (root, (one, other, example, padding))):
        grad = np.zeros_like(tensors[3])
        grad[:, asked] = 1
        _, *grads = value_and_gradients(kernel(IN_TILES), *tensors[:3], mask, grad)
        for x in grads:
            assert not np.asarray(x)[:, np.concatenate(hidden)].any()
            assert np.asarray(x)[:, asked].any()


def test_a_branch_in_a_pack_equals_root_and_branch_alone():
    q, k, v, grad = rows.random_tensors(1, 1, 60, 4, 2, 64)
    end = np.repeat([50, 35, 50, 60], [20, 15, 15, 10])[None].astype(np.int32)
    group = np.where((np.arange(60) > 2) & (np.arange(60) < 18), 0, -1)[None].astype(np.int32)
    packed = value_and_gradients(kernel(IN_TILES), q, k, v, tree_mask.TreeMask(end, group), grad)[0]
    kept = np.concatenate([np.arange(20), np.arange(35, 50)])
    alone = tree_mask.TreeMask(np.full((1, 35), 35, np.int32), group[:, kept])
    single = value_and_gradients(kernel(IN_TILES), *(x[:, kept] for x in (q, k, v)), alone, grad[:, kept])[0]
    np.testing.assert_allclose(packed[:, kept], single, atol=TOLERANCE, rtol=0)


def test_rows_that_see_nothing_of_their_first_tile_are_right():
    """A query tile has the end of one example and the start of the next, with a timestamp in frames."""
    end = np.where(np.arange(64) < 36, 36, 64)[None].astype(np.int32)
    group = np.where(np.isin(np.arange(64), [*range(40, 44), *range(46, 60)]), 0, -1)[None].astype(np.int32)
    mask = tree_mask.TreeMask(end, group)
    classes = np.asarray(jax.jit(tree_mask.tile_classes, static_argnums=(1, 2))(mask, 16, 32))
    seen = np.asarray(jax.jit(tree_mask.dense)(mask))[0]
    first = {row: 32 * int(np.flatnonzero(classes[0, row])[0]) for row in range(4)}
    assert any(not seen[16 * row:16 * row + 16, at:at + 32].any(1).all() for row, at in first.items())
    assert_equal_to_dense(IN_TILES, mask, *rows.random_tensors(2, 1, 64, 4, 2, 64))


def test_queries_at_the_end_of_a_row_and_single_ones_read_a_cache():
    """What prefill in pieces and decoding ask: T queries from position `first` on, over S keys."""
    q, k, v, _ = rows.random_tensors(5, 2, 80, 4, 2, 64)
    mask = rows.random_mask(5, 2, 80)
    whole = jax.jit(dense)(q, k, v, mask)
    seen = jax.jit(tree_mask.dense)(mask)

    @jax.jit
    def ask(first, q, group):
        queries = tree_mask.Queries(first, group)
        out = pallas_tpu.attend(q, k, v, tiling_lib.prepare(mask, queries, IN_TILES), IN_TILES)
        return out, tree_mask.dense(mask, queries)

    for count, first in ((24, (56, 40)), (1, (79, 7))):
        pick = lambda x: np.stack([np.asarray(x)[row, at:at + count] for row, at in enumerate(first)])
        out, visible = ask(np.array(first, np.int32), pick(q), pick(mask.group))
        np.testing.assert_array_equal(visible, pick(seen))
        np.testing.assert_allclose(out, pick(whole), atol=TOLERANCE, rtol=0)
