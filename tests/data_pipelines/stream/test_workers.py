"""Worker processes of a reader: ignored signals, a death while sending a result, shutdown."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
# Prints the process ids of its workers after the first result, then executes one command per line.
SCRIPT = r"""
import multiprocessing, pathlib, sys
from data_pipelines.stream import workers

FOLDER, SIZE = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def make(number):
    (FOLDER / str(number)).touch()
    return number, b"x" * SIZE

if __name__ == "__main__":
    workers._CLOSE_SECONDS = float(sys.argv[3])
    workers._LOOK_SECONDS = 0.5
    reader = workers.Reader(make, workers.Numbers((), 0, 1), num_workers=2, prefetch=1)
    next(reader)
    print([child.pid for child in multiprocessing.active_children()], flush=True)
    for line in sys.stdin:
        if line == "next\n":
            try:
                print(next(reader)[0], flush=True)
            except RuntimeError as error:
                print(workers.is_death(error), error, flush=True)
        elif line == "close\n":
            reader.close()
            print("closed", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts the script; kills it after the test."""
    started = []

    def one(size=10, close_seconds=60):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        (tmp_path / "calls").mkdir()
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "calls"), str(size), str(close_seconds)], text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        return process, json.loads(process.stdout.readline())
    yield one
    for process in started:
        process.kill()
        process.wait()


def say(process, word):
    process.stdin.write(word + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def wait_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def has_ended(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def ignores(pid, number):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    [mask] = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow(8)
def test_signals_to_the_group_are_not_for_workers_which_end_with_their_parent(start):
    process, pids = start()
    wait_for(lambda: all(ignores(pid, signal.SIGTERM) for pid in pids))  # the second one may still start
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert [say(process, "next") for _ in range(20)] == [str(number) for number in range(1, 21)]
    process.kill()
    wait_for(lambda: all(map(has_ended, pids)))


@pytest.mark.slow(11)
def test_a_process_that_closes_no_reader_ends_with_its_workers(start):
    process, pids = start()
    process.stdin.close()
    assert process.wait(120) == 0
    wait_for(lambda: all(map(has_ended, pids)))


@pytest.mark.slow(13)
def test_a_reader_closes_and_its_process_ends(start):
    process, pids = start()
    assert say(process, "close") == "closed"
    process.stdin.close()
    assert process.wait(120) == 0
    wait_for(lambda: all(map(has_ended, pids)))


@pytest.mark.slow(15)
def test_a_worker_that_died_while_sending_a_result_is_an_error_and_its_reader_closes(start, tmp_path):
    process, pids = start(size=2**20, close_seconds=1)  # more than a pipe holds: workers block half way
    wait_for(lambda: (tmp_path / "calls" / "4").exists())  # the earlier results are being sent
    time.sleep(0.5)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    said = say(process, "next")
    while said.isdigit():  # results that had arrived before
        said = say(process, "next")
    assert said.startswith("True Worker process was terminated unexpectedly")
    assert say(process, "close") == "closed"
    process.stdin.close()
    assert process.wait(120) == 0
