"""Flash attention over a TreeMask for NVIDIA GPUs, in Triton.

The same lists of tiles as on a TPU, one program per row of a list: tiles that nobody needs are not visited,
and the mask of the others is made in registers from two integers per key.

B rows, T queries, S keys, N query heads, K key heads, H head width.
"""

from jax.experimental import pallas as pl

from molmo2_jax.attention import flash
from molmo2_jax.attention import pallas_gpu_kernels as kernels
from molmo2_jax.attention import tiling as tiling_lib

SMALLEST_SIDE = 16  # of a product on a tensor core
KERNELS = flash.Kernels(kernels.forward, kernels.backward)


def choose_tiling(head_dim: int) -> tiling_lib.Tiling:
    """Returns the tiling: 128 queries by 64 keys, of heads up to 128 wide; half of that above.

    The gradients take two passes, which hold no sums for other tiles than their own.
    """
    part = 1 if head_dim <= 128 else 2
    return tiling_lib.Tiling(query_tile=128 // part, key_tile=64 // part, ring=0)


def attend(q_BTNH, k_BSKH, v_BSKH, work: tiling_lib.Work, tiling: tiling_lib.Tiling):
    """Returns [B, T, N, H]: softmax attention where the mask of `work` allows, in the dtype of q.

    Triton knows arrays whose sides are powers of two, so other head widths are widened.
    """
    width = max(SMALLEST_SIDE, pl.next_power_of_2(q_BTNH.shape[-1]))
    return flash.attend(KERNELS, q_BTNH, k_BSKH, v_BSKH, work, tiling, width)
