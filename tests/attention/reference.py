"""The reference for the kernels: attention under the dense mask in float64, values and all gradients.

B rows, T queries, S keys, N query heads, K key heads, G query heads per key head, H head width.
"""

import functools

import jax
import numpy as np

from molmo2_jax.attention import attend
from molmo2_jax.attention import gpu
from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tpu
from molmo2_jax.attention import tree_mask

TOLERANCE = 1e-5  # of float32 results up to 10 (scaled above); measured 6.9e-6
ALL = tiling_lib.MAX_TILES
KERNELS = {"tpu": tpu.attend, "gpu": gpu.attend}
RINGS = {"tpu": ALL, "gpu": 0}  # on a TPU one fused pass for all gradients


def exact(mask, q_BTNH, k_BSKH, v_BSKH, grad_BTNH):
    """Returns float64 (out, dq, dk, dv); the error of a float32 reference would be as large as a kernel's."""
    B, T, N, H = q_BTNH.shape
    K, visible_BTS = k_BSKH.shape[2], np.asarray(tree_mask.dense(mask))
    q_BTKGH, grad_BTKGH = (np.asarray(x, np.float64).reshape(B, T, K, N // K, H) for x in (q_BTNH, grad_BTNH))
    k_BSKH, v_BSKH = (np.asarray(x, np.float64) for x in (k_BSKH, v_BSKH))
    product = functools.partial(np.einsum, optimize=True)
    s_BKGTS = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * H ** -0.5
    s_BKGTS = np.where(visible_BTS[:, None, None], s_BKGTS, -np.inf)
    p_BKGTS = np.exp(s_BKGTS - s_BKGTS.max(-1, keepdims=True))
    p_BKGTS /= p_BKGTS.sum(-1, keepdims=True)
    dp_BKGTS = product("BTKGH,BSKH->BKGTS", grad_BTKGH, v_BSKH)
    ds_BKGTS = p_BKGTS * (dp_BKGTS - (dp_BKGTS * p_BKGTS).sum(-1, keepdims=True)) * H ** -0.5
    return (product("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH).reshape(q_BTNH.shape),
            product("BKGTS,BSKH->BTKGH", ds_BKGTS, k_BSKH).reshape(q_BTNH.shape),
            product("BKGTS,BTKGH->BSKH", ds_BKGTS, q_BTKGH),
            product("BKGTS,BTKGH->BSKH", p_BKGTS, grad_BTKGH))


def dense(q, k, v, mask):
    return attend.attend_visible(q, k, v, tree_mask.dense(mask))


@functools.cache
def kernel(platform, tiling):
    """Returns a function (q, k, v, mask) -> out, cached so that it is compiled once per arguments."""
    def run(q, k, v, mask):
        work = tiling_lib.prepare(mask, tree_mask.all_queries(mask), tiling)
        return KERNELS[platform](q, k, v, work, tiling)
    return run


@functools.cache
def in_small_tiles(platform):
    """Returns `kernel` with query tiles of 16 and key tiles of 32."""
    return kernel(platform, tiling_lib.Tiling(query_tile=16, key_tile=32, ring=RINGS[platform],
                                              interpret=True))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, q, k, v, mask, grad):
    out, pull = jax.vjp(lambda *x: function(*x, mask), q, k, v)
    return out, *pull(grad.astype(out.dtype))


def assert_equal_to_dense(function, mask, q, k, v, grad):
    """Asserts that float32 values and gradients equal those of attention under the dense mask."""
    got = value_and_gradients(function, q, k, v, mask, grad)
    wanted = exact(mask, q, k, v, grad)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, wanted):
        size = max(10, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=TOLERANCE * size / 10, rtol=0, err_msg=name)
