"""Bounds on the time of a train step from operations and traffic.

The plain bound (aot/step.py) counts products and recomputation, and lets every collective use all links of a
chip. `strict` also counts what the chip does beyond that, and how full rows are. Neither counts memory
traffic, input, or work that is not a product; both assume that collectives overlap with products.
"""

from collections.abc import Sequence
from typing import NamedTuple

from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.cost import chips
from molmo2_jax.cost import flops
from molmo2_jax.cost import links

BFLOAT16 = 2    # bytes


class Fill(NamedTuple):
    """Shares (0 to 1) of a row's tokens and crops that are not padding: "token_fill" and "crop_fill" of a
    run's metrics."""
    tokens: float = 1.0
    crops: float = 1.0


class Strict(NamedTuple):
    """The strict bound on a step; times in seconds."""
    flops: float            # that the chips execute
    compute: float
    ici: float              # of the busiest link
    ici_bfloat16: float     # the same, if gradients were summed in bfloat16
    dcn: float
    mfu: float              # useful operations, at most, as a share of the chips' peak

    @property
    def seconds(self) -> float:
        return max(self.compute, self.ici, self.dcn)

    @property
    def bounded_by(self) -> str:
        return max(("compute", "ici", "dcn"), key=lambda name: getattr(self, name))

    @property
    def apart(self) -> float:
        """Seconds of a step in which nothing overlaps."""
        return self.compute + self.ici + self.dcn


def strict(model: config_lib.Molmo2Config, remat: str, vision_remat: str | None, *, rows: int,
           shape: types.RowShape, how: flops.Execution, traffic: Sequence[links.Traffic],
           slice_: chips.Slice, slices: int = 1, fill: Fill = Fill(),
           trained: flops.Trained = flops.EVERYTHING) -> Strict:
    """Returns the strict bound on a step of `rows` rows that are filled to `fill`.

    Padding is computed, except for its attention. A filled part is one causal sequence: rows packed with
    shorter ones need less attention, in the model as on the chip.
    """
    peak = slices * slice_.devices * slice_.chip.flops
    spent = flops.executed(model, remat, vision_remat, rows=rows, shape=shape, how=how,
                           trained=trained)
    spent = spent._replace(attention=spent.attention * fill.tokens**2)
    useful = flops.train_step(model, rows=rows, shape=shape, trained=trained)
    useful = flops.Flops(useful.vit * fill.crops, useful.connector * fill.crops, useful.decoder * fill.tokens,
                         useful.attention * fill.tokens**2)
    bound = Strict(
        flops=spent.total, compute=spent.total / peak, ici=links.seconds(traffic, slice_),
        ici_bfloat16=links.seconds(traffic, slice_, BFLOAT16),
        dcn=sum(one.sent for one in traffic if one.network == "dcn") / slice_.chip.dcn_rate, mfu=0.0)
    return bound._replace(mfu=useful.total / (bound.seconds * peak))
