"""A process that hangs ends itself, and says where."""

import threading
import time

from molmo2_jax import watchdog


def watched(seconds, beats=0):
    """Returns (told, exit statuses) of a process that beats a few times and then hangs."""
    told, left, over = [], [], threading.Event()
    with watchdog.Watchdog(seconds, told.append, lambda code: (left.append(code), over.set())) as dog:
        for _ in range(beats):
            dog.beat("step 7 begins")
            time.sleep(seconds / 2)
        if not beats:
            dog.beat("step 9 begins")
            assert over.wait(60)
    return told, left


def test_a_process_in_which_nothing_happens_prints_all_stacks_and_ends(capfd):
    told, left = watched(0.2)
    assert left == [watchdog.HUNG] and len(told) == 1
    assert "last known: step 9 begins" in told[0] and "in watched" in told[0]
    assert told[0].count("hread 0x") >= 2
    assert "error: nothing happened for" in capfd.readouterr().err


def test_a_process_that_works_is_let_alone():
    assert watched(0.8, beats=4) == ([], [])
