"""Every second of a run is counted once, including those of killed attempts."""

import json
import math

import jax.numpy as jnp
import pytest

from molmo2_jax.monitor import goodput


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def forward(self, seconds):
        self.now += seconds


class Devices:
    """Stub devices that are busy until a given time."""
    busy_until = -math.inf

    def idle_since(self):
        return self.busy_until


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(tmp_path, clock):
    wall = lambda: 1000 + clock()
    return lambda devices=None: goodput.Goodput(str(tmp_path), devices or Devices(), clock, wall)


def attempt(time, clock, first, steps, save_at=()):
    """Simulates ten seconds of compilation, then one second per step."""
    clock.forward(10)
    time.go_on_behind(first)
    time.run()
    for step in range(first + 1, steps + 1):
        clock.forward(1)
        if step in save_at:
            time.saved(step)


def test_time_is_assigned_to_the_part_it_was_spent_on(make, clock):
    time = make()
    with time.during("checkpoint"):
        clock.forward(3)
    attempt(time, clock, 0, 6)
    with time.during("data"):
        clock.forward(2)
    assert time.shares() == {"goodput": pytest.approx(6 / 21), "data_stall": pytest.approx(2 / 21)}
    with time.during("evaluation"):
        clock.forward(4)
    assert time.seconds == {"productive": 6, "compile": 10, "data": 2, "checkpoint": 3, "evaluation": 4,
                            "lost": 0, "away": 0}
    assert "checkpoint 3 s, evaluation 4 s, lost 0 s" in str(time)


@pytest.mark.parametrize("busy, stalled", [(0, 5), (2, 3), (9, 0)])
def test_waiting_for_data_counts_only_while_the_devices_are_idle(busy, stalled, make, clock):
    devices = Devices()
    time = make(devices)
    time.run()
    devices.busy_until = clock() + busy if busy < 5 else math.inf
    with time.during("data"):
        clock.forward(5)
    assert time.seconds["data"] == stalled and time.seconds["productive"] == 5 - stalled


def test_steps_that_are_repeated_after_a_kill_count_as_lost(make, clock):
    first = make()
    attempt(first, clock, 0, 7, save_at=(4,))
    first.write()  # then it is killed
    clock.forward(50)
    second = make()
    attempt(second, clock, 4, 8)
    second.write()
    assert second.seconds == {"productive": 4 + 4, "compile": 20, "data": 0, "checkpoint": 0, "evaluation": 0,
                              "lost": 3, "away": 50}
    assert "2 attempts, 50 s between them" in str(second)


def test_a_run_that_starts_over_has_lost_everything_and_one_without_a_mark_nothing(make, clock, tmp_path):
    first = make()
    attempt(first, clock, 0, 5, save_at=(5,))
    anew, unknown = make(), make()
    anew.go_on_behind(0)
    assert (anew.seconds["productive"], anew.seconds["lost"]) == (0, 5)
    unknown.go_on_behind(3)
    assert (unknown.seconds["productive"], unknown.seconds["lost"]) == (5, 0)
    assert json.loads((tmp_path / goodput.NAME).read_text())["productive_at"] == {"5": 5.0}


def test_the_file_is_written_at_intervals(make, clock, tmp_path):
    time = make()
    for _ in range(100):
        clock.forward(1)
        time.write_now_and_then()
        written = json.loads((tmp_path / goodput.NAME).read_text())["time"] - 1000
        assert clock() - written <= 30
    time.write_now_and_then()
    assert len(list(tmp_path.iterdir())) == 1


def test_devices_are_idle_once_all_results_are_ready():
    devices = goodput.Devices(lambda: 7.0)
    assert devices.idle_since() == -math.inf
    devices.work_on(jnp.ones(3) + 1)
    for _ in range(10_000):
        if devices.idle_since() == 7.0:
            break
        jnp.zeros(1).block_until_ready()
    assert devices.idle_since() == 7.0
    devices.close()
