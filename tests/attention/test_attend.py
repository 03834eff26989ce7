"""Blocked attention equals attention under the dense mask, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax.attention import attend
from molmo2_jax.attention import blocked
from molmo2_jax.attention import tiling
from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tree_mask
from tests import packs

CONFIG = packs.random_config("qwen3", 0)
B, T, H = 2, 64, 8
TOLERANCE = 2e-6           # float32; measured 8e-7 on values of size 3
GRADIENT_TOLERANCE = 1e-5  # measured 3e-6 on gradients of size 10


def dense(q, k, v, mask):
    return attend.attend_visible(q, k, v, tree_mask.dense(mask))


def tiled(q, k, v, mask, tile):
    how = tiling.Tiling(query_tile=tile, key_tile=tile, ring=tiling_lib.MAX_TILES)
    return blocked.attend(q, k, v, tiling.prepare(mask, tree_mask.all_queries(mask), how), how)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "tile"), [(4, 2, 8), (3, 3, 32), (6, 1, 16)])
def test_blocked_equals_dense_with_gradients(num_heads, num_kv_heads, tile):
    def value_and_grads(function, q, k, v, mask, seen):
        out, pull = jax.vjp(lambda *x: function(*x, mask), q, k, v)
        return out, pull(seen)

    ours = jax.jit(lambda *x: value_and_grads(lambda *y: tiled(*y, tile), *x))
    reference = jax.jit(lambda *x: value_and_grads(dense, *x))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        mask = tree_mask.from_batch(packs.random_rows(seed, CONFIG, B, T), "image_tokens")
        draw = lambda n: rng.standard_normal((B, T, n, H), np.float32)
        args = draw(num_heads), draw(num_kv_heads), draw(num_kv_heads), mask, draw(num_heads)
        (out, grads), (wanted, wanted_grads) = ours(*args), reference(*args)
        np.testing.assert_allclose(out, wanted, atol=TOLERANCE, rtol=0)
        for got, want in zip(grads, wanted_grads):
            np.testing.assert_allclose(got, want, atol=GRADIENT_TOLERANCE, rtol=0)


def test_a_length_that_is_no_multiple_of_the_tile_changes_nothing():
    rng = np.random.default_rng(0)
    length = attend.TILE + 13
    q, k, v = (rng.standard_normal((B, length, n, H), np.float32) for n in (4, 2, 2))
    mask = tree_mask.from_batch(packs.random_rows(0, CONFIG, B, length), "image_tokens")
    run = jax.jit(attend.attend, static_argnums=4)
    np.testing.assert_allclose(run(q, k, v, mask, "blocked"), run(q, k, v, mask, "dense"),
                               atol=TOLERANCE, rtol=0)


def test_bfloat16_keeps_its_dtype_and_is_close():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, n, H), np.float32) for n in (4, 2, 2))
    mask = tree_mask.from_batch(packs.random_rows(0, CONFIG, B, T), "image_tokens")
    half = jax.jit(tiled, static_argnums=4)(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), mask, 16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), dense(q, k, v, mask), atol=0.05, rtol=0)


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation must be one of.*'flash'"):
        attend.attend(None, None, None, None, "flash")


@pytest.mark.parametrize("implementation, device", [("pallas_tpu", "TPU"), ("pallas_gpu", "GPU")])
def test_a_kernel_is_refused_on_another_platform(implementation, device):
    with pytest.raises(ValueError, match=f"'{implementation}' needs a {device}; got 'cpu'"):
        attend.plan(tree_mask.causal(1, 8), 2, 1, 8, implementation)
