"""A hung process ends, and reports where it hung."""

import threading
import types

from molmo2_jax.monitor import watchdog


def watched(seconds):
    """Returns (reasons, exit statuses) of a hanging process."""
    told, left, over = [], [], threading.Event()
    with watchdog.Watchdog(seconds, told.append, lambda code: (left.append(code), over.set())) as dog:
        dog.beat("step 9 begins")
        over.wait()
    return told, left


def test_a_hung_process_prints_all_stacks_and_ends(capfd):
    told, left = watched(0.2)
    assert left == [watchdog.HUNG] and len(told) == 1
    assert "last known: step 9 begins" in told[0] and "in watched" in told[0]
    assert told[0].count("hread 0x") >= 2
    assert "error: nothing happened for" in capfd.readouterr().err


def test_a_process_that_makes_progress_is_not_ended(monkeypatch):
    now, looks, told, left = [0.0], threading.Semaphore(0), [], []

    def clock():
        if threading.current_thread().name == "watchdog":
            looks.release()
        return now[0]

    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=clock))
    with watchdog.Watchdog(0.2, told.append, left.append) as dog:
        for _ in range(4):
            dog.beat("step 7 begins")
            now[0] += 0.15
            while looks.acquire(blocking=False):
                pass
            for _ in range(2):  # the second check begins after the clock was moved
                looks.acquire()
    assert not told and not left and now[0] > 0.2
