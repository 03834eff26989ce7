"""A process in which a function is called: what ends it, what it raises, and that it ends with its parent."""

import os
import signal
import subprocess
import sys

import pytest

from data_pipelines.stream import child as children

FATAL = "__import__('os').kill(__import__('os').getpid(), {})"


@pytest.fixture
def child():
    """A process that evaluates Python."""
    with children.Child(eval, 5.0) as one:
        yield one


def test_calls_are_answered_by_one_process(child):
    pid = child("__import__('os').getpid()")
    assert pid != os.getpid() and child("6 * 7") == 42 and child("__import__('os').getpid()") == pid


def test_a_crash_costs_one_call_after_a_second_try(child):
    assert child("1") == 1
    with pytest.raises(children.Crashed, match="^the process that decodes it ends by SIGSEGV, 2 times$"):
        child(FATAL.format(11))
    with pytest.raises(children.Crashed, match="ends with status 3, 2 times"):
        child("__import__('os')._exit(3)")
    assert child("2") == 2


def test_a_process_killed_from_outside_costs_nothing(child):
    assert child("1") == 1
    child._process.kill()
    assert child("2") == 2


def test_a_call_that_hangs_costs_one_call(child, monkeypatch):
    monkeypatch.setattr(child, "_limit", 0.2)
    with pytest.raises(children.Crashed, match="hangs, 2 times"):
        child("__import__('time').sleep(60)")
    monkeypatch.setattr(child, "_limit", 60.0)
    assert child("2") == 2


def test_what_the_function_raises_is_raised_with_its_stack_trace(child):
    with pytest.raises(ValueError, match="invalid literal for int.*'x'") as caught:
        child("int('x')")
    assert "in _answer" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="^ValueError: .*lock"):  # that error cannot be pickled
        child("(_ for _ in ()).throw(ValueError(__import__('threading').Lock()))")
    assert child("2") == 2


def test_a_process_that_does_not_start_is_an_error():
    with pytest.raises(RuntimeError, match="must start; it ends with status 3"):
        children.Child(eval, 5.0, (sys.executable, "-c", "exit(3)"))("1")


def test_it_ends_with_a_parent_that_is_killed():
    code = ("import os, signal\nfrom data_pipelines.stream import child\n"
            "one = child.Child(eval, 5.0)\nprint(one('6 * 7'), flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)")
    # The process inherits the output, so that this would wait for it if it went on.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(children._ROOT)}, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "42\n")
