"""A call that hangs is abandoned; calls that are fast, fail or follow are not affected."""

import threading

import pytest

from molmo2_jax.inputs import time_limit

LATE = TimeoutError("too late")


def test_results_and_errors_pass_through():
    assert time_limit.within(60, lambda: 7, LATE) == 7
    with pytest.raises(KeyError, match="missing"):
        time_limit.within(60, lambda: {}["missing"], LATE)
    assert time_limit.within(float("inf"), lambda: None, LATE) is None


def test_calls_share_a_thread_that_is_not_the_callers():
    first, second = (time_limit.within(60, threading.get_ident, LATE) for _ in range(2))
    assert first == second != threading.get_ident()


def test_a_call_that_hangs_is_left_behind():
    free, helper = threading.Event(), time_limit.within(60, threading.current_thread, LATE)
    with pytest.raises(TimeoutError, match="too late"):
        time_limit.within(0.05, free.wait, LATE)  # which returns only at the end of this test
    assert time_limit.within(60, lambda: "next", LATE) == "next"
    assert time_limit.within(60, threading.current_thread, LATE) is not helper
    free.set()
    helper.join()
    assert not helper.is_alive()
