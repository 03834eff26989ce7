"""Time limits of tests: when a test counts as hung, and how it and its processes are then stopped.

A phase of a test (setup, call, teardown) may take `hang_seconds` of pyproject.toml, or ROOM times the seconds
of its marker `slow` if that is more. Then an alarm kills the processes that the test started and fails the
test; its fixtures clean up and the run continues. A main thread stuck in native code does not handle the
alarm: GRACE seconds later the process prints all stacks and exits, xdist reports that the test crashed a
worker, and the worker's processes are killed. pytest-timeout offers either of the two, not one after the
other, and does not kill processes.
"""

import contextlib
import faulthandler
import os
import pathlib
import signal
import time

import pytest

ROOM = 30    # a busy machine may take this many times the seconds of an idle one
GRACE = 60   # seconds from the alarm to the end of the process
MARK = "MOLMO2_TEST_PROCESS"  # environment variable inherited by processes that a test starts

_errors = pytest.StashKey[int]()
_mark = pytest.StashKey[str]()


def pytest_addoption(parser):
    parser.addini("hang_seconds", "seconds that a phase of a test may take", default="900")


def pytest_configure(config):
    config.stash[_errors] = os.dup(2)  # pytest captures that of tests
    alone = {"testrunuid": f"{os.getpid()}-{time.time_ns()}", "workerid": "alone"}
    config.stash[_mark] = os.environ[MARK] = _mark_of(getattr(config, "workerinput", alone))


def pytest_unconfigure(config):
    os.close(config.stash[_errors])


def _mark_of(worker: dict) -> str:
    return f"{worker['testrunuid']}-{worker['workerid']}"


def cost(item: pytest.Item) -> float:
    """Returns the seconds of the marker `slow`; 0 without one."""
    marker = item.get_closest_marker("slow")
    return marker.args[0] if marker and marker.args else 0


def seconds(item: pytest.Item) -> float:
    """Returns the seconds that a phase of the test may take."""
    return max(float(item.config.getini("hang_seconds")), ROOM * cost(item))


def end_processes(mark: str, since: float = 0.0) -> None:
    """Kills the processes that inherited the mark and started after `since`, seconds after boot."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            variables = (folder / "environ").read_bytes().split(b"\0")
            ticks = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
            if f"{MARK}={mark}".encode() in variables and ticks >= int(since * os.sysconf("SC_CLK_TCK")):
                os.kill(int(folder.name), signal.SIGKILL)


@contextlib.contextmanager
def _limited(config, limit, what):
    """Limits the block to `limit` seconds."""
    since = time.clock_gettime(time.CLOCK_BOOTTIME)

    def fail(*_):
        faulthandler.dump_traceback(config.stash[_errors])
        end_processes(config.stash[_mark], since)
        pytest.fail(f"{what} must end within {limit:g} s; it was still running")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=config.stash[_errors])
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _phase(name):
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def hook(item):
        with _limited(item.config, seconds(item), f"the {name} of {item.nodeid}"):
            return (yield)
    return hook


pytest_runtest_setup, pytest_runtest_call, pytest_runtest_teardown = map(
    _phase, ("setup", "call", "teardown"))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    faulthandler.dump_traceback_later(
        2 * float(session.config.getini("hang_seconds")), exit=True, file=session.config.stash[_errors])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Kills the remaining processes of an xdist worker, which would keep the run's output pipes open."""
    end_processes(_mark_of(node.workerinput))
