import threading

import pytest

from molmo2_jax.monitor import periodic


def test_calls_are_made_while_the_block_lasts_and_none_after_it():
    made, twice = [], threading.Event()

    def call():
        made.append(threading.current_thread().name)
        if len(made) == 2:
            twice.set()

    with periodic.calls(call, 0.001, "beat"):
        twice.wait()
    count = len(made)
    assert set(made) == {"beat"}
    assert not any(one.name == "beat" for one in threading.enumerate()) and len(made) == count


def test_a_call_that_returns_true_is_the_last():
    made = threading.Semaphore(0)

    def call():
        made.release()
        return True

    with periodic.calls(call, 0.001, "once"):
        made.acquire()
        for one in threading.enumerate():
            if one.name == "once":   # else it has ended already
                one.join()
        assert not made.acquire(blocking=False)


def test_an_error_of_the_block_is_raised_and_ends_the_calls():
    with pytest.raises(KeyError), periodic.calls(lambda: None, 0.001, "failing"):
        raise KeyError
    assert not any(one.name == "failing" for one in threading.enumerate())
