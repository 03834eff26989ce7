"""Operations of a train step, by formula: compilers count the body of a scan once, and kernels not at all.

A multiplication and its addition are two operations. Only matrix products count. The backward pass costs
twice the forward pass where parameters are trained, once where gradients only pass through, and nothing
before the first trained parameter. Adapters' own products, about a hundredth, and those of pointing by
choosing, about 0.2 % of an 8B step, do not count; nor does recomputation, which is not part of the model's
work. What a chip computes beyond that is counted by `executed`.
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


class Trained(NamedTuple):
    """The parts whose kernels are trained in full, and those that have adapters: names among PARTS."""
    full: frozenset[str]
    adapted: frozenset[str] = frozenset()

    def reached(self, part: str) -> bool:
        """Returns whether gradients pass through a part: it or one before it is trained."""
        return bool((self.full | self.adapted) & set(PARTS[:PARTS.index(part) + 1]))


PARTS = ("vit", "connector", "decoder", "head")   # in the order of the forward pass
EVERYTHING = Trained(frozenset(PARTS))


class Execution(NamedTuple):
    """How a chip executes products. By default it computes nothing that is not needed.

    Source: attention/tpu.py for tiles and backward products; "How to Scale Your Model"
    (jax-ml.github.io/scaling-book), "How to Think About TPUs", for matrix units.
    """
    side: int = 1       # of a matrix unit: both widths of a weight, and of a head, are rounded up to it
    tensor: int = 1     # devices that share heads, MLP columns and vocabulary
    tiles: tuple[int, int] | None = None        # queries x keys, which attention computes whole; None: exact
    vit_tiles: tuple[int, int] | None = None    # the same, of the ViT
    backward: int = 4   # products that give the gradients of attention, of as many as 4: a kernel that keeps
                        # no scores computes these and their gradients again, which makes 5

    def width(self, size: int, shared: bool = False) -> int:
        """Returns a width in which all devices together compute; `shared` over the tensor axis."""
        parts = self.tensor if shared and size % self.tensor == 0 else 1
        return parts * math.ceil(size / parts / self.side) * self.side


def causal_pairs(length: int, tiles: tuple[int, int] | None) -> float:
    """Returns the pairs of a query and a key that a causal sequence computes: whole tiles that hold any."""
    if tiles is None:
        return length * length / 2
    queries, keys = tiles
    return float(sum(queries * keys * math.ceil(min(first + queries, length) / keys)
                     for first in range(0, length, queries)))


def all_pairs(length: int, tiles: tuple[int, int] | None) -> float:
    """Returns the pairs that are computed where every query attends to every key."""
    if tiles is None:
        return float(length * length)
    queries = math.ceil(length / tiles[0]) * tiles[0]   # each has a key at its own position
    return float(queries * math.ceil(queries / tiles[1]) * tiles[1])


class _Products(NamedTuple):
    """Operations of a forward pass; `last` are the final products of each block, whose results only the next
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


def _products(model: config_lib.Molmo2Config, tokens: float, crops: float, windows: float, slots: int,
              pairs: float, how: Execution = Execution()) -> _Products:
    v, c, t = model.vision, model.connector, model.text
    P, heads, layers = v.num_patches, how.width(v.num_heads * v.head_dim), max(c.taps) + 1
    width, mlp = how.width(v.width), how.width(v.mlp_width)
    tapped, pooled = how.width(len(c.taps) * v.width), how.width(c.num_heads * c.head_dim)
    pooling = ((1 + 2 * slots) * tapped * pooled + 2 * slots * c.num_heads * c.head_dim
               + pooled * pooled * c.has_output)
    decoder, connector_mlp = how.width(t.width), how.width(c.mlp_width, True)
    queries, keys = (how.width(number * t.head_dim, True) for number in (t.num_heads, t.num_kv_heads))
    return _Products(
        vit=2 * crops * P * width * (how.width(v.patch_values) + layers * (4 * heads + mlp)),
        vit_attention=(4 * crops * layers * all_pairs(P, how.vit_tiles) * v.num_heads
                       * how.width(v.head_dim)),
        vit_last=2 * crops * layers * P * width * mlp,
        connector=2 * windows * (pooling + 2 * pooled * connector_mlp),
        connector_last=2 * windows * decoder * connector_mlp,
        decoder=2 * tokens * t.num_layers * decoder * (2 * queries + 2 * keys
                                                       + 2 * how.width(t.mlp_width, True)),
        decoder_last=2 * tokens * t.num_layers * decoder * how.width(t.mlp_width, True),
        attention=4 * pairs * t.num_heads * how.width(t.head_dim) * t.num_layers,
        head=2 * tokens * decoder * how.width(t.vocab_size, True))


def forward(model: config_lib.Molmo2Config, *, tokens: int, crops: int, windows: int, slots: int,
            pairs: float) -> Flops:
    """Returns the operations of a forward pass over these numbers of tokens, crops and windows.

    slots: patches of a window. pairs: pairs of a query and a key that it attends to.
    """
    p = _products(model, tokens, crops, windows, slots, pairs)
    return Flops(p.vit + p.vit_attention + p.vit_last, p.connector + p.connector_last,
                 p.decoder + p.decoder_last + p.head, p.attention)


def update(model: config_lib.Molmo2Config, *, tokens: int, crops: int, windows: int, slots: int,
           pairs: float, trained: Trained = EVERYTHING) -> Flops:
    """Returns the operations of an update, forward and backward; arguments as in `forward`.

    With a tied head the table is frozen, so the gradient of its kernel is not counted.
    """
    p = _products(model, tokens, crops, windows, slots, pairs)
    times = _times(model, trained)
    products = lambda part: 1 + 2 * trained.reached(part)   # of two activations
    return Flops(times["vit"] * (p.vit + p.vit_last) + products("vit") * p.vit_attention,
                 times["connector"] * (p.connector + p.connector_last),
                 times["decoder"] * (p.decoder + p.decoder_last) + times["head"] * p.head,
                 products("decoder") * p.attention)


def _times(model: config_lib.Molmo2Config, trained: Trained) -> dict[str, int]:
    """Returns how often the products of a part with its kernels count: forward, inputs, kernels."""
    kernels = trained.full - ({"head"} if model.text.tied_head else set())
    return {part: 1 + trained.reached(part) + (part in kernels) for part in PARTS}


def train_step(model: config_lib.Molmo2Config, *, rows: int, shape: types.RowShape,
               density: float = 0.5, trained: Trained = EVERYTHING) -> Flops:
    """Returns the operations of one update over `rows` full rows.

    density: share of the T x T pairs of query and key that attention needs; 0.5 is one causal sequence per
    row.
    """
    T, M, R, W = shape
    return update(model, tokens=rows * T, crops=rows * M, windows=rows * R, slots=W,
                  pairs=rows * density * T * T, trained=trained)


def recomputed(model: config_lib.Molmo2Config, remat: str, vision_remat: str | None = None, *, rows: int,
               shape: types.RowShape, density: float = 0.5, trained: Trained = EVERYTHING) -> Flops:
    """Returns the operations that a step repeats under policies of layers.REMAT_POLICIES.

    The loss always recomputes the head's product, and the connector is recomputed completely unless `remat`
    is "none". A block's last product is not repeated, unless a norm follows it.
    """
    T, M, R, W = shape
    p = _products(model, rows * T, rows * M, rows * R, W, rows * density * T * T)
    vit_policy, keeps_products = vision_remat or remat, ("none", "dots")
    vit = ((0.0 if vit_policy in keeps_products else p.vit)
           + (0.0 if vit_policy == "none" else p.vit_attention))
    blocks = p.decoder + (p.decoder_last if model.text.norm_after else 0.0)
    vit *= trained.reached("vit")
    return Flops(vit, p.connector if remat != "none" and trained.reached("connector") else 0.0,
                 p.head + (0.0 if remat in keeps_products else blocks),
                 0.0 if remat in ("none", "attention") else p.attention)


def executed(model: config_lib.Molmo2Config, remat: str, vision_remat: str | None = None, *, rows: int,
             shape: types.RowShape, how: Execution, trained: Trained = EVERYTHING) -> Flops:
    """Returns the operations that a chip spends on a step over full rows of one causal sequence each.

    With the default `how`, these are those of `train_step` and `recomputed`.
    """
    T, M, R, W = shape
    p = _products(model, rows * T, rows * M, rows * R, W, rows * causal_pairs(T, how.tiles), how)
    vit, keeps = vision_remat or remat, ("none", "dots")
    times = _times(model, trained)
    attention = lambda part: 1 + trained.reached(part) * how.backward / 2    # forward and backward
    blocks = p.decoder + (p.decoder_last if model.text.norm_after else 0.0)
    again = {part: float(trained.reached(part)) for part in PARTS}
    return Flops(
        times["vit"] * (p.vit + p.vit_last) + (0.0 if vit in keeps else again["vit"] * p.vit)
        + p.vit_attention * (attention("vit") + again["vit"] * (vit != "none")),
        times["connector"] * (p.connector + p.connector_last)
        + (0.0 if remat == "none" else again["connector"] * p.connector),
        times["decoder"] * (p.decoder + p.decoder_last) + (0.0 if remat in keeps else blocks)
        + p.head * (times["head"] + 1),
        p.attention * (attention("decoder") + (remat not in ("none", "attention"))))


def mfu(flops: float, seconds: float, chips: int, chip_flops: float) -> float:
    """Returns the share (0 to 1) of the chips' peak that `flops` operations in `seconds` need; nan if it is
    infinite."""
    return flops / (seconds * chips * chip_flops) if math.isfinite(chip_flops) else math.nan
