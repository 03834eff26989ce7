"""The packing benchmark: our rule fills rows better than the reference's and keeps its bound on waiting."""

import pathlib

import pytest

from benchmarks import packing
from molmo2_jax.inputs import packers

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/packer/cases.json"
GOAL = 0.97        # sft 0.997, long context 0.993 with 1,500 examples
OURS = packers.OldestFirst()


@pytest.mark.parametrize("name", ["sft", "long_context"])
def test_our_rule_fills_rows_of_the_recipe(name):
    result = packing.pack(packing.drawn(name, 1500, seed=0), OURS)
    assert result.efficiency >= GOAL
    assert result.longest_wait <= OURS.max_wait + OURS.buffer
    assert OURS.buffer <= 2 * packers.Knapsack().buffer


def test_our_rule_packs_recorded_streams_better_than_the_reference():
    stream = packing.recorded(GOLDENS, 1500, seed=0)[-1]
    theirs, ours = packing.pack(stream, packers.Knapsack()), packing.pack(stream, OURS)
    assert theirs.efficiency + 0.02 < ours.efficiency <= packing.limit(stream)
    assert ours.efficiency > 0.985 * packing.limit(stream)


def test_the_full_table_chooses_the_same_rows():
    stream = packing.recorded(GOLDENS, 10, seed=0)[1]
    assert packing.pack(stream, packing.Table(buffer=8)).rows == packing.pack(
        stream, packers.Knapsack(buffer=8)).rows


def test_no_stream_can_exceed_its_limit():
    sizes = [packing.Size(60, 0), packing.Size(60, 10), packing.Size(40, 10)] * 40
    stream = packing.Stream("pairs", sizes, T=100, M=10, buffer=4)
    assert packing.limit(stream) == pytest.approx(2 / 2.0)
    assert packing.pack(stream, packers.OldestFirst(buffer=8)).efficiency <= 1.0
