import json
import time

import pytest

from launch.quickstart import progress


def test_a_finished_step_is_left_out_while_its_key_and_results_stay(tmp_path, capsys):
    result, calls = tmp_path / "result", []

    def work():
        calls.append(1)
        result.write_text("x")

    for key in ("a", "a", "b"):
        progress.Progress(tmp_path, 1).run("step", "working", key, work, result)
    assert len(calls) == 2
    assert "done before" in capsys.readouterr().out
    result.unlink()
    progress.Progress(tmp_path, 1).run("step", "working", "b", work, result)
    assert len(calls) == 3


def test_the_time_of_an_interrupted_attempt_counts_and_the_step_is_done_again(tmp_path):
    def interrupted():
        time.sleep(0.05)
        raise KeyboardInterrupt

    first = progress.Progress(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        first.run("train", "training", "a", interrupted)
    again = progress.Progress(tmp_path, 1)
    assert not again.is_finished("train", "a")
    assert again.seconds("train") >= 0.05
    again.run("train", "training", "a", lambda: time.sleep(0.05))
    assert again.is_finished("train", "a")
    assert again.seconds("train") >= 0.1 and again.seconds() == again.seconds("train")


def test_the_time_is_written_down_while_a_step_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_BEAT", 0.01)
    seen = []

    def work():
        while not (tmp_path / progress.NAME).exists():
            time.sleep(0.01)
        seen.append(json.loads((tmp_path / progress.NAME).read_text())["seconds"]["train"])

    start = time.monotonic()
    progress.Progress(tmp_path, 1).run("train", "training", "a", work)
    assert 0 < seen[0] < time.monotonic() - start


def test_the_peak_of_memory_outlives_the_process_that_had_it(tmp_path):
    (tmp_path / progress.NAME).write_text(json.dumps({"peak_bytes": 2**40}))
    assert progress.Progress(tmp_path, 1).peak_gib() == 1024
    assert 0 < progress.peak_bytes(0) <= progress.peak_bytes(2)


def test_fingerprints_differ_where_anything_does():
    assert progress.fingerprint({"a": (1, 2.0)}) == progress.fingerprint({"a": (1, 2.0)})
    assert progress.fingerprint({"a": (1, 2.0)}) != progress.fingerprint({"a": (1, 2.5)})
