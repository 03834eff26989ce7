"""Examples that share a row and cores that batches need, from the sizes of records."""

import numpy as np
import pytest

from data_pipelines import pipeline
from data_pipelines.doctor import cost
from molmo2_jax import types
from molmo2_jax.inputs import packers

SHAPE = types.RowShape(T=1000, M=10, R=1000, W=9)
DATA = pipeline.DataConfig(train=("a",), seed=1, row_tokens=1000, row_crops=10, batch_rows=8)


@pytest.mark.parametrize("size, per_row", [
    ((100, 1, 10), 10),      # tokens and crops fit ten
    ((100, 5, 10), 2),       # crops are scarcer
    ((1000, 1, 10), 1), ((5000, 1, 10), 1),
])
@pytest.mark.parametrize("packer", [packers.OldestFirst(buffer=12), packers.Knapsack(buffer=12)])
def test_examples_of_one_size_fill_rows_as_far_as_budgets_allow(size, per_row, packer):
    assert cost.examples_per_row([np.array([size])], [1.0], packer, SHAPE, 0) == pytest.approx(per_row)


def test_shares_decide_which_sizes_are_packed():
    sizes = [np.array([(1000, 1, 1)]), np.array([(10, 0, 0)])]
    assert cost.examples_per_row(sizes, [1.0, 0.0], DATA.packer, SHAPE, 0) == 1
    both = cost.examples_per_row(sizes, [0.5, 0.5], DATA.packer, SHAPE, 0)
    assert 1 < both < cost.examples_per_row(sizes, [0.0, 1.0], DATA.packer, SHAPE, 0)


def test_examples_too_few_for_a_full_buffer_are_counted_when_it_is_emptied():
    tiny = np.array([(1, 0, 0)])
    shape = types.RowShape(T=10 * cost.DRAWN, M=0, R=0, W=9)
    assert cost.examples_per_row([tiny], [1.0], DATA.packer, shape, 0) > 1


def test_a_data_set_without_sizes_is_refused():
    with pytest.raises(ValueError, match="size of a record"):
        cost.examples_per_row([np.zeros((0, 3), int)], [1.0], DATA.packer, SHAPE, 0)


def test_cores_follow_from_seconds_rows_hosts_and_the_step():
    sizes = {"a": np.array([(1000, 1, 1)]), "b": np.array([(1000, 1, 1)]), "c": np.zeros((0, 3), int)}
    found = cost.of_batch(DATA, SHAPE, sizes, {"a": 0.75, "b": 0.25, "c": 0.0},
                          {"a": 1.0, "b": 3.0, "c": None}, hosts=2, step_seconds=0.5)
    assert found["core_seconds_per_example"] == pytest.approx(1.5)
    assert found["examples"] == 8 and found["core_seconds"] == pytest.approx(12)
    assert found["cores_per_host"] == {"0.5": pytest.approx(12)}
    found = cost.of_batch(DATA, SHAPE, sizes, {"a": 1.0}, {"a": 1.0})
    assert [float(step) for step in found["cores_per_host"]] == list(cost.STEP_SECONDS)
