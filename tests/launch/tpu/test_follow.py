"""The log of a machine is complete and has no repeats, however its connections break."""

import random
import threading

import pytest

from launch.tpu import follow as tpu_follow


def connection(log, text, run, end):
    """Returns the bytes that a machine sends to a connection that resumes after `log.seen`."""
    begin = log.seen if log.run in ("", run) else 0
    head = log.nonce.encode()
    return (b"\x1e" + head + f" from {begin} {run}\x1f".encode() + text[begin:]
            + (b"\x1e" + head + f" ended {end}\x1f".encode() if end is not None else b""))


@pytest.mark.parametrize("seed", range(200))
def test_every_byte_comes_once_through_any_connections(seed):
    rng = random.Random(seed)
    text = b"".join(rng.choice((b"same\n", b"\n", b"\x1e", b"\x1f", b"\xff\xfe", b"bar\r", b"long " * 9))
                    for _ in range(rng.randrange(60)))
    log, found = tpu_follow.Log(), b""
    while log.status is None:
        log.connect()
        # gcloud repeats the same call within one connection.
        call, stream = connection(log, text, "1", 7), b"Warning: known hosts\n" * rng.randrange(2)
        for _ in range(rng.randrange(3)):
            stream += call[:rng.randrange(len(call))]
        if rng.random() < 0.3:
            stream += call
        elif rng.random() < 0.5:
            stream = stream[:rng.randrange(len(stream) + 1)]
        while stream and log.status is None:
            size = rng.randrange(1, 40)
            found += log.feed(stream[:size])
            stream = stream[size:]
    assert found == text and log.status == 7


def test_a_new_run_of_the_job_is_shown_from_its_first_byte():
    log = tpu_follow.Log()
    assert log.feed(connection(log, b"first run\n", "1", None)) == b"first run\n"
    log.connect()
    assert log.feed(connection(log, b"2nd\n", "2", 0)) == b"2nd\n" and log.status == 0


def test_lines_of_a_bar_are_shown_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(tpu_follow, "_BAR", 1e6)
    lines = tpu_follow.Lines("job/0")
    for chunk in (b"one\r\ntw", b"o\n\n", b"\rstep 1", b"\rstep 2\rstep 3\r", b"end"):
        lines.feed(chunk)
    lines.end()
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["[job/0] one", "[job/0] two", "[job/0] "] and shown[-1] == "[job/0] end"
    assert sum("step" in line for line in shown) <= 1


def test_the_first_failure_counts_and_a_lost_machine_more():
    def watch(*statuses):
        members = {str(i): lambda status=status: status for i, status in enumerate(statuses)}
        return tpu_follow.watch(members, lambda times: None, seconds=0)
    assert watch(0, 0) == 0 and watch(0, 75) == 75 and watch(75, 3, 0) == 3
    assert watch(3, tpu_follow.LOST, 75) == tpu_follow.LOST


def test_the_others_are_told_to_give_up_once_and_once_more():
    told, over = [], threading.Event()

    def give_up(times):
        told.append(times)
        if times == 2:
            over.set()

    members = {"failed": lambda: 3, "waits": lambda: over.wait(60) and 75}
    assert tpu_follow.watch(members, give_up, seconds=0) == 3 and told == [1, 2]


def test_an_error_of_a_member_ends_the_watch():
    def fail():
        raise ValueError("login")
    with pytest.raises(ValueError, match="login"):
        tpu_follow.watch({"a": fail, "b": lambda: threading.Event().wait(60)}, print)
