"""Worker processes of a reader: signals that are not for them, a death in the middle of a result, the end."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Prints the processes of its workers after the first result, then obeys one command a line.
SCRIPT = r"""
import multiprocessing, pathlib, sys
from data_pipelines import workers

FOLDER, SIZE = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def make(number):
    (FOLDER / str(number)).touch()
    return number, b"x" * SIZE

if __name__ == "__main__":
    workers._CLOSE_SECONDS = float(sys.argv[3])
    reader = workers.Reader(make, workers.Numbers((), 0, 1), num_workers=2, prefetch=1)
    next(reader)
    print([child.pid for child in multiprocessing.active_children()], flush=True)
    for line in sys.stdin:
        if line == "next\n":
            print(next(reader)[0], flush=True)
        elif line == "close\n":
            reader.close()
            print("closed", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script; ends it at the end of the test."""
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


def test_signals_to_the_group_are_not_for_workers_which_end_with_their_parent(start):
    process, pids = start()
    wait_for(lambda: all(ignores(pid, signal.SIGTERM) for pid in pids))  # the second one may still start
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert [say(process, "next") for _ in range(20)] == [str(number) for number in range(1, 21)]
    process.kill()
    wait_for(lambda: all(map(has_ended, pids)))


def test_a_process_that_closes_no_reader_ends_with_its_workers(start):
    process, pids = start()
    process.stdin.close()
    assert process.wait(120) == 0
    wait_for(lambda: all(map(has_ended, pids)))


def test_a_reader_closes_and_its_process_ends(start):
    process, pids = start()
    assert say(process, "close") == "closed"
    process.stdin.close()
    assert process.wait(120) == 0
    wait_for(lambda: all(map(has_ended, pids)))


def test_a_reader_whose_worker_died_while_sending_a_result_closes_and_its_process_ends(start, tmp_path):
    process, pids = start(size=2**20, close_seconds=1)  # more than a pipe holds: workers wait half way
    wait_for(lambda: (tmp_path / "calls" / "4").exists())  # the results before are being sent
    time.sleep(0.5)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert say(process, "close") == "closed"
    process.stdin.close()
    assert process.wait(120) == 0
