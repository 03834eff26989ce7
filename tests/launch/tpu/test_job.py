"""How often a command is restarted."""

import types

import pytest

from launch.tpu import cloud as tpu_cloud
from launch.tpu import job as tpu_job
from launch.tpu import slice as tpu_slice


@pytest.fixture
def make(monkeypatch):
    """Makes a run whose attempts take given seconds and end with given statuses; its slice always exists."""
    now = [0.0]
    monkeypatch.setattr(tpu_job.time, "monotonic", lambda: now[0])

    def one(attempts, retries=0, is_spot=False, lost=""):
        waited = []
        caller = types.SimpleNamespace(pace=tpu_cloud.Pace(), wait=waited.append)
        run = tpu_job.Run.__new__(tpu_job.Run)
        run._options = types.SimpleNamespace(retries=str(retries))
        run._slice = types.SimpleNamespace(
            caller=caller, ensure=lambda: None, request=types.SimpleNamespace(is_spot=is_spot),
            lost_nodes=lambda looks: lost)
        left = iter(attempts)

        def attempt():
            seconds, status = next(left)
            now[0] += seconds
            return status
        run._attempt = attempt
        return run, waited, left
    return one


def test_saves_in_a_circle_end_after_growing_pauses(make):
    run, waited, left = make([(60, 75)] * 99)
    with pytest.raises(tpu_cloud.Problem, match="asked to be restarted 11 times in a row"):
        run.run()
    assert len(list(left)) == 99 - 11 and waited == sorted(waited) and waited[-1] == 300


def test_saves_after_long_work_go_on_for_ever(make):
    run, waited, _ = make([(3600, 75)] * 99 + [(60, 0)])
    run.run()
    assert set(waited) == {5.0}


def test_failures_are_repeated_as_often_as_asked_and_lost_machines_do_not_count(make):
    run, *_ = make([(1, 254), (1, 3), (1, 254), (1, 0)], retries=1, is_spot=True)
    run.run()
    run, *_ = make([(1, 3), (1, 4)], retries=1)
    with pytest.raises(tpu_slice.Failed, match="failed with status 4"):
        run.run()


def test_a_failure_whose_machines_turn_out_to_be_gone_is_a_loss(make):
    run, *_ = make([(1, 137), (1, 0)], is_spot=True, lost="job is PREEMPTED")
    run.run()
    run, *_ = make([(1, 137)], lost="job is PREEMPTED")
    with pytest.raises(tpu_cloud.Problem, match="machines were lost"):
        run.run()


def test_a_stopped_command_ends_the_run(make):
    run, *_ = make([(1, 253)], retries=9, is_spot=True)
    with pytest.raises(tpu_cloud.Problem, match="the command was stopped"):
        run.run()
