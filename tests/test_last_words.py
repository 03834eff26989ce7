"""Whatever ends a process is written down where the run is."""

import json
import sys

import pytest

from molmo2_jax import last_words


def said(workdir):
    return json.loads((workdir / "hosts" / "0.json").read_text())


def test_a_process_runs_and_then_has_finished(tmp_path):
    with last_words.spoken(tmp_path):
        assert said(tmp_path)["status"] == "running"
    assert said(tmp_path)["status"] == "finished"
    assert [path.name for path in (tmp_path / "hosts").iterdir()] == ["0.json"]


@pytest.mark.parametrize("code, status, reason", [
    (75, "stopped", "exit status 75"), (0, "finished", ""), ("error: loss", "failed", "error: loss")])
def test_an_exit_says_its_status(code, status, reason, tmp_path):
    with pytest.raises(SystemExit), last_words.spoken(tmp_path):
        sys.exit(code)
    assert (said(tmp_path)["status"], said(tmp_path)["reason"]) == (status, reason)


def test_an_error_that_cannot_be_written_down_is_still_the_one_that_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for end in (RuntimeError("cause"), SystemExit(75)):
        with pytest.raises(type(end)) as caught, last_words.spoken(tmp_path):
            monkeypatch.setattr(last_words.files, "write_json", full)
            raise end
        assert caught.value is end
        monkeypatch.undo()


def test_an_error_says_what_and_where(tmp_path):
    with pytest.raises(RuntimeError), last_words.spoken(tmp_path):
        raise RuntimeError("connection closed by peer")
    assert said(tmp_path)["status"] == "failed"
    assert "connection closed by peer" in said(tmp_path)["reason"]
    assert "test_last_words.py" in said(tmp_path)["reason"]
