"""Processes of one run find each other, train together, and leave what another number of them can take on."""

import math
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks import kills
from launch import hosts
from launch import run
from tests.launch import test_train

world = test_train.world
LOSS_TOLERANCE = 1e-5  # sums in another order
STEPS = ("train.TrainConfig.steps = 8", "train.TrainConfig.keep = 3")


@pytest.mark.parametrize("value", ["localhost:1", "localhost,2,0", "localhost:1,two,0", "here"])
def test_a_variable_that_says_anything_else_is_refused(value, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, value)
    with pytest.raises(ValueError, match="MOLMO2_HOSTS must be 'auto' or ADDRESS:PORT,COUNT,INDEX"):
        hosts.join()


def train(made, processes):
    """Runs launch.train through tpu_run.sh as real processes that hold the run's devices together."""
    environment = os.environ | {"XLA_FLAGS": made.xla_flags(processes), "PYTHONPATH": str(run.ROOT),
                                "STOP_SECONDS": "120"}
    done = subprocess.run(
        ["bash", str(run.ROOT / "launch/tpu_run.sh"), f"--local={processes}", "--", sys.executable, "-m",
         "launch.train", *made.flags], cwd=run.ROOT, env=environment, capture_output=True, text=True,
        check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def make(world, tmp_path_factory):
    """Makes runs of eight steps, saved every third; ends what is left of their processes."""
    made = []

    def one(name):
        made.append(kills.Run(world[0], tmp_path_factory.mktemp("hosts") / name, STEPS,
                              limit=math.inf))  # the limit of the test ends a wait
        return made[-1]
    yield one
    for run_ in made:
        run_.close()


@pytest.fixture(scope="module")
def two(make):
    """The run of two processes that nobody kills."""
    made = make("two")
    train(made, 2)
    return made


@pytest.mark.slow(235)
def test_four_processes_killed_in_a_save_go_on_as_two_bit_for_bit(make, two):
    killed = make("killed")
    killed.start(4)
    killed.until(lambda: killed.saved() == [3] and killed.is_saving(3))
    killed.kill()
    killed.start(2)
    killed.finish()
    assert "going on behind step" in killed.log.read_text()
    assert killed.record() == two.record()
    assert len(killed.record()["metrics"]) == 8 and len(killed.record()["positions"]) == kills.DEVICES


@pytest.mark.slow(120)
def test_one_process_goes_on_with_what_two_saved_and_does_what_they_did(make, two):
    one = make("one")
    shutil.copytree(two.workdir, one.workdir)
    for step in (6, 8):
        shutil.rmtree(one.workdir / "checkpoints" / str(step))
    assert "going on behind step 3" in train(one, 1)
    before, after = two.record(), one.record()
    assert after["metrics"][:3] == before["metrics"][:3] and after["positions"] == before["positions"]
    assert [loss for _, loss, *_ in after["metrics"]] == pytest.approx(
        [loss for _, loss, *_ in before["metrics"]], rel=LOSS_TOLERANCE)
