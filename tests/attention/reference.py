"""What the kernels are compared with: attention under the dense mask, values and all gradients."""

import functools

import jax
import numpy as np

from molmo2_jax.attention import attend
from molmo2_jax.attention import pallas_gpu
from molmo2_jax.attention import pallas_tpu
from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tree_mask

TOLERANCE = 1e-5  # float32, for values up to 10 (in proportion above); measured 7e-6
ALL = tree_mask.MAX_TILES
KERNELS = {"tpu": pallas_tpu.attend, "gpu": pallas_gpu.attend}
RINGS = {"tpu": ALL, "gpu": 0}  # on a TPU one fused pass for all gradients


def dense(q, k, v, mask):
    return attend.attend_visible(q, k, v, tree_mask.dense(mask))


@functools.cache
def kernel(platform, tiling):
    """Returns a function (q, k, v, mask) -> out, the same one for the same arguments: it is compiled once."""
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
    got = value_and_gradients(function, q, k, v, mask, grad)
    wanted = value_and_gradients(dense, q, k, v, mask, grad)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, wanted):
        size = max(10, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=TOLERANCE * size / 10, rtol=0, err_msg=name)
