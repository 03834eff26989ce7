"""Processes of one run find each other, train together, and leave what another number of them can take on."""

import os
import pathlib
import subprocess
import sys

import pytest

from launch import hosts
from launch import run
from molmo2_jax import metrics
from tests.launch import test_train

world = test_train.world
LOSS_TOLERANCE = 1e-5  # sums in another order


@pytest.mark.parametrize("value", ["localhost:1", "localhost,2,0", "localhost:1,two,0", "here"])
def test_a_variable_that_says_anything_else_is_refused(value, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, value)
    with pytest.raises(ValueError, match="MOLMO2_HOSTS must be 'auto' or ADDRESS:PORT,COUNT,INDEX"):
        hosts.join()


def train(world, workdir, processes, *flags):
    """Runs launch.train as real processes of one device each through tpu_run.sh; returns (status, output)."""
    environment = os.environ | {"XLA_FLAGS": test_train.ONE_DEVICE, "PYTHONPATH": str(run.ROOT),
                                "STOP_SECONDS": "20"}
    done = subprocess.run(
        ["bash", str(run.ROOT / "launch/tpu_run.sh"), f"--local={processes}", "--", sys.executable, "-m",
         "launch.train", f"--gin_file={world[0]}", f"--workdir={workdir}",
         "--gin=pipeline.DataConfig.batch_rows = 2", "--gin=pipeline.DataConfig.streams = 2", *flags],
        cwd=run.ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    return done.returncode, done.stdout + done.stderr


def losses(workdir):
    return [line["loss"] for line in metrics.read(str(pathlib.Path(workdir) / "metrics.jsonl"))]


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """The work directory of three steps by two processes."""
    workdir = tmp_path_factory.mktemp("hosts") / "two"
    status, text = train(world, workdir, 2, "--gin=train.TrainConfig.steps = 3")
    assert status == 0, text
    return workdir


@pytest.mark.slow
def test_two_processes_train_what_one_does(world, two, tmp_path):
    status, text = train(world, tmp_path / "one", 1, "--gin=train.TrainConfig.steps = 3")
    assert status == 0, text
    assert len(losses(two)) == 3
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=LOSS_TOLERANCE)


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_saved(world, two):
    before = losses(two)
    status, text = train(world, two, 1, "--gin=train.TrainConfig.steps = 5")
    assert status == 0 and "going on behind step 3" in text, text
    assert losses(two)[:3] == before and len(losses(two)) == 5
