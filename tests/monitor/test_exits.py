"""The reason for which a process ended is recorded in its work directory."""

import json
import sys

import pytest

from molmo2_jax.monitor import exits


def said(workdir):
    return json.loads((workdir / "hosts" / "0.json").read_text())


def test_a_process_is_recorded_as_running_and_then_as_finished(tmp_path):
    with exits.spoken(tmp_path):
        assert said(tmp_path)["status"] == "running"
    assert said(tmp_path)["status"] == "finished"
    assert [path.name for path in (tmp_path / "hosts").iterdir()] == ["0.json"]


@pytest.mark.parametrize("code, status, reason", [
    (75, "stopped", "exit status 75"), (0, "finished", ""), ("error: loss", "failed", "error: loss")])
def test_an_exit_is_recorded_with_its_status(code, status, reason, tmp_path):
    with pytest.raises(SystemExit), exits.spoken(tmp_path):
        sys.exit(code)
    assert (said(tmp_path)["status"], said(tmp_path)["reason"]) == (status, reason)


def test_an_error_that_cannot_be_recorded_is_still_the_one_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for end in (RuntimeError("cause"), SystemExit(75)):
        with pytest.raises(type(end)) as caught, exits.spoken(tmp_path):
            monkeypatch.setattr(exits.files, "write_json", full)
            raise end
        assert caught.value is end
        monkeypatch.undo()


def test_an_error_is_recorded_with_its_traceback(tmp_path):
    with pytest.raises(RuntimeError), exits.spoken(tmp_path):
        raise RuntimeError("connection closed by peer")
    assert said(tmp_path)["status"] == "failed"
    assert "connection closed by peer" in said(tmp_path)["reason"]
    assert "test_exits.py" in said(tmp_path)["reason"]
