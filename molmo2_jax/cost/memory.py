"""Memory of a train step on one device, estimated by formula where no program can be compiled, as for GPUs.

Parameters, moments and gradients are exact. Activations are those that full rematerialisation keeps, and the
most that is alive at a time besides: one layer's backward pass, one layer of the ViT, or a chunk of logits.
Against programs compiled for TPUs the sum was 10 to 12% too large (tests/cost/test_memory.py).
"""

from typing import NamedTuple

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.cost import flops


class Memory(NamedTuple):
    """Bytes of each part."""
    frozen: float       # parameters without gradient
    trained: float      # parameters, two moments and gradients, float32
    kept: float         # outputs of layers and ViT features, for the backward pass
    working: float      # the most that is alive at a time besides

    @property
    def total(self) -> float:
        return sum(self)


def estimate(model: config_lib.Molmo2Config, *, rows: int, shape: types.RowShape, frozen: float,
             trained: float, parts: flops.Trained = flops.EVERYTHING, loss_chunk: int = 1024, width: int = 2,
             keeps_scores: bool = True) -> Memory:
    """Returns the memory of a step with remat "full" on one device.

    Args:
      rows: processed at a time (of a micro-batch).
      frozen, trained: bytes of the parameters; trained ones in float32.
      parts: what is trained; a ViT that gradients do not reach keeps nothing.
      width: bytes of an activation.
      keeps_scores: the ViT's attention writes its scores to memory, as on all devices but TPUs.
    """
    v, t = model.vision, model.text
    T, M, R, _ = shape
    tokens, crops, layers = rows * T, rows * M, max(model.connector.taps) + 1
    kept = width * tokens * t.width * (t.num_layers + 1) if parts.reached("decoder") else 0.0
    kept += width * crops * v.num_patches * v.width * (
        len(model.connector.taps) + (layers if parts.reached("vit") else 0))
    kept += width * rows * R * t.width + crops * v.num_patches * v.patch_values   # visual tokens, pixels
    block = width * tokens * (4 * t.mlp_width + 4 * t.num_heads * t.head_dim
                              + 4 * t.num_kv_heads * t.head_dim + 4 * t.width)
    times = 2 if parts.reached("vit") else 1
    vit = width * crops * v.num_patches * (2 * v.mlp_width + 6 * v.width)
    vit += times * (4 + width) * crops * v.num_heads * v.num_patches ** 2 if keeps_scores else 0.0
    logits = (2 * 4 + width) * loss_chunk * t.vocab_size
    head = width * t.width * t.vocab_size
    return Memory(frozen, 4 * trained, kept, head + max(block, vit, logits))
