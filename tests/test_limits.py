"""A hanging test fails alone: the run ends, names the test, and leaves no process of it."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from tests import limits

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFTEST = """
from tests import limits
limits.GRACE = 1
pytest_plugins = ["tests.limits"]
"""
HANGING = """
import pathlib, signal, subprocess, time
import pytest

@pytest.mark.slow(100)
def test_before():
    pass

def test_hanging():
    with open("started", "a") as file:
        process = subprocess.Popen(["sleep", "1000"])
        file.write(f"{{process.pid}}\\n")
    {block}
    while True:
        time.sleep(1000)

@pytest.mark.slow(100)
@pytest.mark.parametrize("number", range(4))
def test_behind(number):
    pass
"""


def run(folder, block, *arguments):
    """Returns pytest's output for a file with a hanging test, and the process that the test started."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\nhang_seconds = 2\n")
    (folder / "test_hanging.py").write_text(HANGING.format(block=block))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # quicker to start
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "xdist.plugin", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    [process] = (folder / "started").read_text().split()  # it was not tried again
    return done.stdout + done.stderr, int(process)


def is_running(process):
    state = pathlib.Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("arguments", [("-n", "0"), ("-n", "1", "--dist=worksteal")])
def test_a_test_that_hangs_fails_with_its_processes_and_the_others_run(tmp_path, arguments):
    out, process = run(tmp_path, "", *arguments)
    assert "the call of test_hanging.py::test_hanging must end within 2 s" in out
    assert "1 failed, 5 passed" in out and not is_running(process)


@pytest.mark.slow(6)
def test_a_test_that_hangs_in_native_code_ends_its_worker_and_the_others_run(tmp_path):
    blocked = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])"
    out, process = run(tmp_path, blocked, "-n", "1", "--dist=worksteal")
    assert "crashed while running 'test_hanging.py::test_hanging'" in out and "in test_hanging" in out
    assert "1 failed, 5 passed" in out and not is_running(process)


@pytest.mark.parametrize("marker, expected", [(None, 900), ((), 900), ((5,), 900), ((40,), 40 * limits.ROOM)])
def test_the_limit_is_a_multiple_of_the_measured_cost(marker, expected):
    mark = None if marker is None else types.SimpleNamespace(args=marker)
    item = types.SimpleNamespace(get_closest_marker=lambda name: mark,
                                 config=types.SimpleNamespace(getini=lambda name: "900"))
    assert limits.seconds(item) == expected
