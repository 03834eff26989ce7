"""Processes of one run connect, train together, and save runs that another number of processes can resume."""

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import kills
from launch import run
from launch.support import cli
from launch.support import hosts
from launch.support import lock
from tests.launch import test_train

world = test_train.world
LOSS_TOLERANCE = 1e-5  # sums are taken in another order
STEPS = ("train.TrainConfig.steps = 8", "train.TrainConfig.keep = 3")


@pytest.mark.parametrize("value", ["localhost:1", "localhost,2,0", "localhost:1,two,0", "here"])
def test_a_variable_that_says_anything_else_is_refused(value, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, value)
    with pytest.raises(ValueError, match="MOLMO2_HOSTS must be 'auto' or ADDRESS:PORT,COUNT,INDEX"):
        hosts.join()


def test_data_sets_that_differ_between_processes_are_named_in_each_of_them(monkeypatch):
    found = [{"a": 3, "b": 4}, {"b": 4, "a": 3}, {"a": 3, "c": 1}, {"a": 2, "b": 4}]

    def check(mine, everyone):
        texts = [json.dumps(one).encode() for one in everyone]

        def gather(value):
            if np.ndim(value):
                assert bytes(value[:len(json.dumps(mine))]) == json.dumps(mine).encode()
                return np.stack([np.frombuffer(text.ljust(len(value)), np.uint8) for text in texts])
            return np.asarray([len(text) for text in texts])
        monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
        monkeypatch.setattr(hosts.jax, "process_count", lambda: len(everyone))
        hosts.check_same("records", mine)

    check(found[0], found[:2])
    messages = []
    for mine in found:
        with pytest.raises(ValueError) as raised:
            check(mine, found)
        messages.append(str(raised.value))
    assert set(messages) == {
        "all processes of a run must have the same records; got b: 4 in process 0, none in process 2; "
        "c: none in process 0, 1 in process 2; a: 3 in process 0, 2 in process 3"}
    with pytest.raises(ValueError, match="; and 6 more$"):
        check(found[0], [found[0], dict.fromkeys("cdefghijk", 1)])


CHECK = """
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from launch.support import hosts
hosts.join()
hosts.check_same("records", {"a": 3, "b": 400})
try:
    hosts.check_same("records", {"a": 3} if jax.process_index() else {"a": 3, "b": 400})
except ValueError as error:
    print(error)
"""


@pytest.mark.slow(20)
def test_two_processes_compare_what_they_have_found():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    processes = [subprocess.Popen(
        [sys.executable, "-c", CHECK], cwd=run.ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(run.ROOT), hosts.VARIABLE: f"localhost:{port},2,{number}"})
        for number in range(2)]
    assert {process.communicate()[0].splitlines()[-1] for process in processes} == {  # after Gloo's lines
        "all processes of a run must have the same records; got b: 400 in process 0, none in process 1"}


def train(made, processes):
    """Runs launch.train through tpu_run.sh as real processes that share the run's devices."""
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
    """Makes runs of eight steps that save every third step; kills their remaining processes at the end."""
    made = []

    def one(name):
        made.append(kills.Run(world[0], tmp_path_factory.mktemp("hosts") / name, STEPS,
                              limit=math.inf))  # the test's own limit ends a wait
        return made[-1]
    yield one
    for run_ in made:
        run_.close()


@pytest.fixture(scope="module")
def two(make):
    """An uninterrupted run of two processes."""
    made = make("two")
    train(made, 2)
    return made


@pytest.mark.slow(235)
def test_four_processes_killed_in_a_save_go_on_as_two_bit_for_bit(make, two):
    killed = make("killed")
    killed.start(4)
    killed.until(lambda: killed.saved() == [3] and killed.is_saving(3))
    killed.kill()
    assert (killed.workdir / lock.NAME).exists()   # of a process that is gone, so the next run takes it
    killed.start(2)
    killed.finish()
    assert "resuming after step" in killed.log.read_text()
    assert killed.record() == two.record()
    assert len(killed.record()["metrics"]) == 8 and len(killed.record()["positions"]) == kills.DEVICES


@pytest.mark.slow(120)
def test_one_process_goes_on_with_what_two_saved_and_does_what_they_did(make, two):
    one = make("one")
    shutil.copytree(two.workdir, one.workdir)
    for step in (6, 8):
        shutil.rmtree(one.workdir / "checkpoints" / str(step))
    assert "resuming after step 3" in train(one, 1)
    before, after = two.record(), one.record()
    assert after["metrics"][:3] == before["metrics"][:3] and after["positions"] == before["positions"]
    assert [loss for _, loss, *_ in after["metrics"]] == pytest.approx(
        [loss for _, loss, *_ in before["metrics"]], rel=LOSS_TOLERANCE)


@pytest.mark.slow(150)
def test_a_save_that_fails_in_one_of_two_processes_ends_both_before_the_next_save(world, tmp_path):
    fields = ("steps = 100000", "save_every = 10", "keep = 1")
    made = kills.Run(world[0], tmp_path / "full", [f"train.TrainConfig.{field}" for field in fields],
                     limit=math.inf)
    with contextlib.closing(made):
        made.start(2)
        made.until(lambda: made.saved() and not made.is_saving(made.saved()[-1]))
        state = made.workdir / "checkpoints" / str(made.saved()[-1]) / "state"
        limit = max(path.stat().st_size for path in (state / "ocdbt.process_1").rglob("*")) // 2
        resource.prlimit(made.processes[1].pid, resource.RLIMIT_FSIZE, (limit, limit))
        # The cause of a crash stands before the stacks of all threads.
        assert made.processes[1].wait() == cli.DISK_ERROR, made.log.read_text().partition(
            "Fatal Python error")[0][-4000:]
        [kept] = made.saved()
        assert kept < made.steps() < kept + 20   # it failed in the next save, and no other has begun
        said = made.log.read_text()
        assert "File too large" in said and f"kept: the checkpoint of step {kept}. Once" in said
        # Not after the five minutes that Orbax waits for the other process.
        assert made.processes[0].wait(200) != 0 and made.saved() == [kept]
        made.start(2)
        made.until(lambda: made.saved() and made.saved()[-1] > kept)
        assert f"resuming after step {kept} " in made.log.read_text()


@pytest.mark.slow(150)
def test_a_second_run_of_two_processes_is_refused_in_both_and_the_first_goes_on(world, tmp_path):
    first, second = (kills.Run(world[0], tmp_path / "same", STEPS, limit=math.inf) for _ in range(2))
    with contextlib.closing(first), contextlib.closing(second):
        first.start(2)
        first.until(lambda: first.steps() > 0)
        for process in first.processes:
            process.send_signal(signal.SIGSTOP)   # it must not finish before the second has seen it
        second.start(2)
        assert second.wait() == [2, 2], second.log.read_text()[-4000:]
        for process in first.processes:
            process.send_signal(signal.SIGCONT)
        first.finish()
        text = first.log.read_text()
        assert f"got {first.workdir}: process {first.processes[0].pid} on {os.uname().nodename}" in text
        assert "another run holds it; process 0 names it" in text
        assert first.saved()[-1] == 8 and not (first.workdir / lock.NAME).exists()
