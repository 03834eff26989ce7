"""One run at a time trains in a work directory; the lock of a dead one never blocks the next."""

import errno
import functools
import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest

from launch import run
from launch.support import lock
from molmo2_jax.monitor import periodic

HOLD = """
import socket
import sys
from launch.support import lock
if len(sys.argv) > 2:
    socket.gethostname = lambda: sys.argv[2]
    lock.BEAT = 0.05
with lock.held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path, request):
    """Starts a process that holds the lock of tmp_path until its standard input closes.

    The parameter, if any, is the name of the host on which it believes to run.
    """
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), *getattr(request, "param", ())],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(run.ROOT)})
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)


def test_a_second_run_is_refused_with_host_and_process_of_the_first(holder, tmp_path):
    with pytest.raises(ValueError, match=f"process {holder.pid} on {os.uname().nodename} has used"), \
            lock.held(tmp_path):
        pass
    holder.communicate("")   # ends well
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / lock.NAME).exists()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(holder, tmp_path, monkeypatch):
    waitless = types.SimpleNamespace(strftime=time.strftime, monotonic=time.monotonic)   # it cannot sleep
    monkeypatch.setattr(lock, "time", waitless)
    holder.kill()
    holder.wait()
    assert (tmp_path / lock.NAME).exists()
    with lock.held(tmp_path):
        pass


def test_another_process_with_the_number_of_the_dead_one_does_not_hold_the_lock(tmp_path):
    own = lock._own() | {"started": "1"}
    (tmp_path / lock.NAME).write_text(json.dumps(own))
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("fields", [{"host": "another"}, {"boot": "before the machine was restarted"}])
def test_a_lock_of_another_host_that_does_not_change_is_taken_over(tmp_path, quick, fields):
    (tmp_path / lock.NAME).write_text(json.dumps(lock._own() | fields))
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["host"] == os.uname().nodename


def test_a_lock_that_another_host_renews_is_respected(tmp_path, quick):
    own = lock._own() | {"host": "another"}
    path = tmp_path / lock.NAME
    path.write_text(json.dumps(own))
    with periodic.calls(functools.partial(lock._renew, path, own), lock.BEAT), \
            pytest.raises(ValueError, match="on another has used"), lock.held(tmp_path):
        pass


@pytest.mark.parametrize("holder", [["another"]], indirect=True)
def test_the_lock_of_a_process_on_another_host_is_respected_until_it_is_killed(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.5)   # ten beats of the holder, so that a busy machine misses none
    with pytest.raises(ValueError, match=f"process {holder.pid} on another has used"), lock.held(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_lock_that_was_cut_does_not_block(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("stale", [False, True])
def test_of_newcomers_at_once_one_trains(tmp_path, stale):
    if stale:
        (tmp_path / lock.NAME).write_text(json.dumps(lock._own() | {"started": "1"}))
    together, inside, refused = threading.Barrier(4), [], []

    def come():
        together.wait()
        try:
            with lock.held(tmp_path):
                inside.append(1)
                everyone.wait()
        except ValueError:
            refused.append(1)
            everyone.wait()

    everyone = threading.Barrier(4)
    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(inside), len(refused)) == (1, 3) and not list(tmp_path.iterdir())


def test_a_beat_that_cannot_be_written_does_not_end_the_run(tmp_path, quick, monkeypatch):
    with lock.held(tmp_path):
        failed = threading.Event()

        def fail(*_):
            failed.set()
            raise OSError(errno.ENOSPC, "full")
        monkeypatch.setattr(lock.files, "write_json", fail)
        assert failed.wait(60)
