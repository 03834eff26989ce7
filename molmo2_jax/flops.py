"""Operations of a train step, by formula: compilers count the body of a scan once, and kernels never.

One multiplication and its addition are two operations. Only matrix products count. The backward pass costs
twice the forward pass; recomputation is no part of the model's work.
"""

import math
from typing import NamedTuple

from molmo2_jax import config as config_lib
from molmo2_jax import types


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

    def plus(self, other: "Flops") -> "Flops":
        return Flops(*map(sum, zip(self, other)))


class _Products(NamedTuple):
    """Operations of a forward pass; `last` are the products that end a block, whose results only the next
    block reads."""
    vit: float
    vit_attention: float
    vit_last: float
    connector: float
    connector_last: float
    decoder: float
    decoder_last: float
    attention: float
    head: float


def _products(model: config_lib.Molmo2Config, tokens: int, crops: int, windows: int, slots: int,
              pairs: float) -> _Products:
    v, c, t = model.vision, model.connector, model.text
    P, heads, layers = v.num_patches, v.num_heads * v.head_dim, max(c.taps) + 1
    tapped, pooled = len(c.taps) * v.width, c.num_heads * c.head_dim
    pooling = (1 + 2 * slots) * tapped * pooled + 2 * slots * pooled + pooled * pooled
    queries, keys = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    return _Products(
        vit=2 * crops * P * v.width * (v.patch_values + layers * (4 * heads + v.mlp_width)),
        vit_attention=4 * crops * layers * P * P * heads,
        vit_last=2 * crops * layers * P * v.width * v.mlp_width,
        connector=2 * windows * (pooling + 2 * pooled * c.mlp_width),
        connector_last=2 * windows * t.width * c.mlp_width,
        decoder=2 * tokens * t.num_layers * t.width * (2 * queries + 2 * keys + 2 * t.mlp_width),
        decoder_last=2 * tokens * t.num_layers * t.width * t.mlp_width,
        attention=4 * pairs * queries * t.num_layers,
        head=2 * tokens * t.width * t.vocab_size)


def forward(model: config_lib.Molmo2Config, *, tokens: int, crops: int, windows: int, slots: int,
            pairs: float) -> Flops:
    """Returns the operations of a forward pass over rows with so many tokens and crops, windows of `slots`
    patches, and pairs of tokens of which one sees the other.
    """
    p = _products(model, tokens, crops, windows, slots, pairs)
    return Flops(p.vit + p.vit_attention + p.vit_last, p.connector + p.connector_last,
                 p.decoder + p.decoder_last + p.head, p.attention)


def train_step(model: config_lib.Molmo2Config, *, rows: int, shape: types.RowShape,
               density: float = 0.5) -> Flops:
    """Returns the operations of one update over `rows` full rows.

    density: share of all T x T pairs of tokens that see each other; 0.5 is one causal sequence per row. For
    the head of a frozen table (tied_head) the gradient of the kernel is no work that training needs.
    """
    T, M, R, W = shape
    once = forward(model, tokens=rows * T, crops=rows * M, windows=rows * R, slots=W,
                   pairs=rows * density * T * T)
    total = once.times(3)
    spared = 2.0 * rows * T * model.text.width * model.text.vocab_size if model.text.tied_head else 0.0
    return total._replace(decoder=total.decoder - spared)


def recomputed(model: config_lib.Molmo2Config, remat: str, vision_remat: str | None = None, *, rows: int,
               shape: types.RowShape, density: float = 0.5) -> Flops:
    """Returns what a step computes a second time under policies of layers.REMAT_POLICIES.

    The loss always recomputes the head's product, and the connector is recomputed whole unless nothing is. A
    block's last product is not needed again, unless a norm follows it.
    """
    T, M, R, W = shape
    p = _products(model, rows * T, rows * M, rows * R, W, rows * density * T * T)
    vit_policy, keeps_products = vision_remat or remat, ("none", "dots")
    vit = ((0.0 if vit_policy in keeps_products else p.vit)
           + (0.0 if vit_policy == "none" else p.vit_attention))
    blocks = p.decoder + (p.decoder_last if model.text.norm_after else 0.0)
    return Flops(vit, 0.0 if remat == "none" else p.connector,
                 p.head + (0.0 if remat in keeps_products else blocks),
                 0.0 if remat in ("none", "attention") else p.attention)


def mfu(flops: float, seconds: float, chips: int, chip_flops: float) -> float:
    """Returns the share of the chips' peak that `flops` operations in so many seconds are."""
    return flops / (seconds * chips * chip_flops) if math.isfinite(chip_flops) else math.nan
