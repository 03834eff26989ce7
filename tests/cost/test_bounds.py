"""The strict bound, by a hand-computed case."""

import pytest

from molmo2_jax.cost import bounds
from molmo2_jax.cost import chips
from molmo2_jax.cost import flops
from molmo2_jax.cost import links
from tests.cost import test_flops

SLICE = chips.find("v6e:2x2")
SENT = 1.12e11   # bytes: a second on one link of v6e
TRAFFIC = (links.Traffic("ici", "all-gather", 2, SENT, ((SENT, SENT), (0.0, 0.0))),
           links.Traffic("ici", "reduce-scatter", 4, SENT, ((SENT, SENT), (0.0, 0.0))),
           links.Traffic("dcn", "all-reduce", 4, 5e9, ((0.0, 0.0), (0.0, 0.0))))


def strict(**fields):
    return bounds.strict(test_flops.MODEL, "full", None, rows=2, shape=test_flops.SHAPE["shape"],
                         how=flops.Execution(side=256, backward=5), traffic=TRAFFIC, slice_=SLICE, **fields)


def test_times_are_those_of_the_busiest_link_and_of_all_that_is_executed():
    bound, peak = strict(), 4 * 918e12
    spent = flops.executed(test_flops.MODEL, "full", rows=2, shape=test_flops.SHAPE["shape"],
                           how=flops.Execution(side=256, backward=5))
    assert bound.flops == spent.total and bound.compute == spent.total / peak
    assert bound.ici == pytest.approx(2.0) and bound.ici_bfloat16 == pytest.approx(1.5)
    assert bound.dcn == pytest.approx(0.4) and bound.bounded_by == "ici" and bound.seconds == bound.ici
    assert bound.apart == pytest.approx(2.4 + bound.compute)
    useful = flops.train_step(test_flops.MODEL, rows=2, shape=test_flops.SHAPE["shape"])
    assert bound.mfu == pytest.approx(useful.total / (2.0 * peak))
    assert strict(slices=2).compute == bound.compute / 2


def test_padding_is_computed_but_not_useful_and_its_attention_is_neither():
    full, half = strict(), strict(fill=bounds.Fill(tokens=0.5, crops=0.25))
    useful = flops.train_step(test_flops.MODEL, rows=2, shape=test_flops.SHAPE["shape"])
    wanted = 0.25 * (useful.vit + useful.connector) + 0.5 * useful.decoder + 0.25 * useful.attention
    assert half.mfu / full.mfu == pytest.approx(wanted / useful.total)
    attention = flops.executed(test_flops.MODEL, "full", rows=2, shape=test_flops.SHAPE["shape"],
                               how=flops.Execution(side=256, backward=5)).attention
    assert full.flops - half.flops == pytest.approx(0.75 * attention)
