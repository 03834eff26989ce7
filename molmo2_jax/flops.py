"""Operations of a train step, by formula: compilers count the body of a scan once, and kernels never.

One multiplication and its addition are two operations. Only matrix products count. The backward pass costs
twice the forward pass; recomputation is no part of the model's work.
"""

import math
from typing import NamedTuple

from molmo2_jax import config as config_lib


class Flops(NamedTuple):
    """Operations of each part."""
    vit: float
    connector: float
    decoder: float      # projections, MLPs and the head
    attention: float    # of the decoder

    @property
    def total(self) -> float:
        return sum(self)

    def times(self, factor: float) -> "Flops":
        return Flops(*(factor * part for part in self))


def forward(model: config_lib.Molmo2Config, *, tokens: int, crops: int, windows: int, slots: int,
            pairs: float) -> Flops:
    """Returns the operations of a forward pass over rows with so many tokens and crops, windows of `slots`
    patches, and pairs of tokens of which one sees the other.
    """
    v, c, t = model.vision, model.connector, model.text
    P, heads = v.num_patches, v.num_heads * v.head_dim
    layer = 2 * P * (4 * v.width * heads + 2 * P * heads + 2 * v.width * v.mlp_width)
    vit = crops * (2 * P * v.patch_values * v.width + (max(c.taps) + 1) * layer)
    tapped, pooled = len(c.taps) * v.width, c.num_heads * c.head_dim
    pooling = (1 + 2 * slots) * tapped * pooled + 2 * slots * pooled + pooled * pooled
    project = (2 * pooled + t.width) * c.mlp_width
    queries, keys = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    block = t.width * (2 * queries + 2 * keys + 3 * t.mlp_width)
    return Flops(vit, windows * 2 * (pooling + project),
                 tokens * 2 * (t.num_layers * block + t.width * t.vocab_size),
                 4 * pairs * queries * t.num_layers)


def train_step(model: config_lib.Molmo2Config, *, rows: int, T: int, M: int, R: int, W: int,
               density: float = 0.5) -> Flops:
    """Returns the operations of one update over `rows` full rows.

    density: share of all T x T pairs of tokens that see each other; 0.5 is one causal sequence per row. For
    the head of a frozen table (tied_head) the gradient of the kernel is no work that training needs.
    """
    once = forward(model, tokens=rows * T, crops=rows * M, windows=rows * R, slots=W,
                   pairs=rows * density * T * T)
    total = once.times(3)
    spared = 2.0 * rows * T * model.text.width * model.text.vocab_size if model.text.tied_head else 0.0
    return total._replace(decoder=total.decoder - spared)


def recomputed(once: Flops, remat: str) -> Flops:
    """Returns what rematerialisation adds: every matrix product of the towers once more, and the head's."""
    return once if remat == "full" else Flops(0.0, 0.0, 0.0, 0.0 if remat == "none" else once.attention)


def mfu(flops: float, seconds: float, chips: int, chip_flops: float) -> float:
    """Returns the share of the chips' peak that `flops` operations in so many seconds are."""
    return flops / (seconds * chips * chip_flops) if math.isfinite(chip_flops) else math.nan
