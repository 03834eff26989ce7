"""Flash attention over a TreeMask by a pair of kernels: layout, scale, and residuals of the backward pass.

Kernels get queries scaled for base-2 scores, heads before positions, and whole tiles.

B rows, T queries, S keys, N query heads, K key heads, G = N/K query heads per key head, H head width.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from molmo2_jax.attention import tiling as tiling_lib

MASKED = -0.7 * float(np.finfo(np.float32).max)  # finite: inf - inf would be NaN
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Kernels(NamedTuple):
    """The two directions on one kind of device; G, T, S as above, in whole tiles.

    forward: (q[B, K, G, T, H], k[B, K, S, H], v[B, K, S, H], work, tiling) -> (output like q,
      float32[B, K, G, T] base-2 log of the sum of exponentials).
    backward: (q, k, v, gradient of the output, log of the sums, delta float32[B, K, G, T], work, tiling) ->
      (dq, dk, dv); delta is the sum over H of output times its gradient.
    """
    forward: Callable
    backward: Callable


def dot(a, b, contract):
    """Returns a product in float32; `contract` names the contracted axis of `a` and of `b`."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=exact,
                           preferred_element_type=jnp.float32)


def attend(kernels: Kernels, q_BTNH, k_BSKH, v_BSKH, work: tiling_lib.Work, tiling: tiling_lib.Tiling,
           width: int | None = None):
    """Returns [B, T, N, H]: softmax attention where the mask of `work` allows, in the dtype of q.

    Args:
      width: head width that the kernels get, H padded with zeros; None: H.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # XLA fuses this with the rotary embedding before it.
    q = (q_BTNH.astype(jnp.float32) * (H ** -0.5 * LOG2_E)).astype(q_BTNH.dtype)
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))

    def widen(x, length):
        return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, length - x.shape[-2]), (0, (width or H) - H)))

    num_queries, num_keys = work.query_group.shape[-1], work.keys.shape[-1]
    out = _attend(kernels, tiling, widen(q, num_queries), widen(k, num_keys), widen(v, num_keys), work)
    return out[..., :T, :H].transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels, tiling, q_BKGTH, k_BKSH, v_BKSH, work):
    return kernels.forward(q_BKGTH, k_BKSH, v_BKSH, work, tiling)[0]


def _forward(kernels, tiling, q, k, v, work):
    out, log_sum = kernels.forward(q, k, v, work, tiling)
    out, log_sum = checkpoint_name(out, tiling_lib.OUT), checkpoint_name(log_sum, tiling_lib.LOG_SUM)
    return out, (q, k, v, out, log_sum, work)


def _backward(kernels, tiling, residuals, grad):
    q, k, v, out, log_sum, work = residuals
    delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1)
    return *kernels.backward(q, k, v, grad, log_sum, delta, work, tiling), tiling_lib.no_gradient(work)


_attend.defvjp(_forward, _backward)
