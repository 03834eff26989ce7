"""A run whose loss diverges stops, and the batch that caused it is on disk."""

import json
import pathlib

import numpy as np
import pytest

from molmo2_jax.monitor import guard
from tests import tiny


def fed(tmp_path, losses, spike=8.0):
    one = guard.Guard(str(tmp_path), 1, spike)
    for step, loss in enumerate(losses, 1):
        one.check(step, {"loss": loss}, tiny.batch(0))
    return one


def usual(count, seed=0):
    return (1.5 + 0.1 * np.random.default_rng(seed).normal(size=count)).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_stop_the_run_and_leave_the_batch(value, tmp_path):
    one = fed(tmp_path, [1.0, 2.0], None)
    words = "step 3 must be finite.*evidence/step_3.*reaches this step"
    with pytest.raises(guard.Divergence, match=words) as raised:
        one.check(3, {"loss": 1.0, "grad_norm_vit": value}, tiny.batch(1))
    folder = pathlib.Path(raised.value.folder)
    for kept, given in zip(guard.load(folder / "host_1.npz"), tiny.batch(1), strict=True):
        np.testing.assert_array_equal(kept, given)
    told = json.loads((folder / "host_1.json").read_text())
    assert told["step"] == 3 and told["losses_before"] == [1.0, 2.0]
    assert told["measured"] == {"loss": "1.0", "grad_norm_vit": repr(value)}
    assert len(told["rows"]) == tiny.B
    for row, kept in enumerate(told["rows"]):
        examples = kept["examples"]
        assert sum(one["tokens"] for one in examples) == (tiny.batch(1).example[row] >= 0).sum()
        if examples:
            tokens = tiny.batch(1).tokens[row, :examples[0]["tokens"]]
            assert examples[0]["first_tokens"] == tokens[:32].tolist()


def test_a_spike_of_the_loss_stops_the_run_and_usual_noise_does_not(tmp_path):
    one = fed(tmp_path, usual(500))
    assert 2.0 < one.limit() < 2.6
    with pytest.raises(guard.Divergence, match="the loss of step 501 must be below 2.* got 6"):
        one.check(501, {"loss": 6.0}, tiny.batch(0))
    assert (tmp_path / "evidence" / "step_501" / "host_1.npz").exists()


def test_a_loss_that_falls_or_hardly_varies_is_no_spike(tmp_path):
    fed(tmp_path, np.linspace(8, 0.1, 300).tolist())
    assert fed(tmp_path, [1.0] * 50).limit() == pytest.approx(1.08)
    assert fed(tmp_path, [1.0] * 19).limit() == np.inf


def test_without_a_limit_spikes_do_not_stop_the_run(tmp_path):
    fed(tmp_path, [*usual(50), 1e6], None)
    assert not list(tmp_path.iterdir())
