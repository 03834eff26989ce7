"""Flash attention over a TreeMask for TPU.

Tiles that nobody needs are neither loaded nor visited: the grid runs over a work list, whose length is only
known on the device. Tiles in which everybody sees everybody are computed without a mask; in the others the
mask is made in the kernel from two integers per key. A tile holds all query heads of a key head, so keys and
values are loaded once for the whole group and never repeated.

B rows, T queries, S keys, N query heads, K key heads, G = N/K, H head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from molmo2_jax.attention import pallas_tpu_kernels as kernels
from molmo2_jax.attention import tiling as tiling_lib

LANES = kernels.LANES
LOG2_E = math.log2(math.e)
MAX_WORDS = 2**17    # of a work list: 512 KiB, half of the scalar memory of a core
RESERVED = 16 * 2**20  # bytes of fast memory for everything but the ring


def choose_tiling(rows: int, num_queries: int, num_keys: int, num_groups: int, head_dim: int
                  ) -> tiling_lib.Tiling:
    """Returns the tiling for the TPU at hand: about 512 rows of queries by 512 keys.

    Products of this size keep the matrix unit busy; smaller tiles would skip a little more of the mask, but
    take longer. The ring is as large as fast memory allows.

    Raises:
      ValueError: scalar memory cannot hold the list of tiles.
    """
    def num_words():
        key_tiles = tiling_lib.num_key_tiles(num_queries, num_keys, query_tile, key_tile)
        return rows * -(-num_queries // query_tile) * key_tiles

    query_tile = min(LANES * max(1, 512 // (LANES * num_groups)), tiling_lib.round_up(num_queries, LANES))
    key_tile = min(512, tiling_lib.round_up(num_keys, LANES))
    while num_words() > MAX_WORDS and query_tile * num_groups < 2048:
        query_tile *= 2
    if num_words() > MAX_WORDS:
        raise ValueError(f"attention on a TPU handles at most {MAX_WORDS} tiles per device; got "
                         f"{num_words()} for {rows} rows of {num_queries} queries and {num_keys} keys")
    vmem_bytes = min(100 * 2**20, pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8)
    ring_tile_bytes = 2 * 4 * key_tile * tiling_lib.round_up(head_dim, LANES)
    ring = min(tiling_lib.num_key_tiles(num_queries, num_keys, query_tile, key_tile),
               (vmem_bytes - RESERVED) // ring_tile_bytes)
    return tiling_lib.Tiling(query_tile=query_tile, key_tile=key_tile, ring=ring, vmem_bytes=vmem_bytes)


def attend(q_BTNH, k_BSKH, v_BSKH, work: tiling_lib.Work, tiling: tiling_lib.Tiling):
    """Returns [B, T, N, H]: softmax attention where the mask of `work` allows, in the dtype of q."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Scores are base-2 logarithms. XLA fuses this with the rotation in front of it.
    q = (q_BTNH.astype(jnp.float32) * (H ** -0.5 * LOG2_E)).astype(q_BTNH.dtype)
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))

    def widen(x, length):
        return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, length - x.shape[-2]), (0, 0)))

    num_keys = work.keys.shape[-1]
    out = _attend(tiling, widen(q, work.query_group.shape[-1]), widen(k, num_keys), widen(v, num_keys), work)
    return out[..., :T, :].transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling, q_BKGTH, k_BKSH, v_BKSH, work):
    return kernels.forward(q_BKGTH, k_BKSH, v_BKSH, work, tiling)[0]


def _forward(tiling, q, k, v, work):
    out, log_sum = kernels.forward(q, k, v, work, tiling)
    out, log_sum = checkpoint_name(out, tiling_lib.OUT), checkpoint_name(log_sum, tiling_lib.LOG_SUM)
    return out, (q, k, v, out, log_sum, work)


def _backward(tiling, residuals, grad):
    q, k, v, out, log_sum, work = residuals
    return *kernels.backward(q, k, v, out, log_sum, grad, work, tiling), tiling_lib.no_gradient(work)


_attend.defvjp(_forward, _backward)
