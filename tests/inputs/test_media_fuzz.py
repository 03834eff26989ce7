"""Damaged files of every kind give crops or an error that names the file, in bounded time and memory."""

import collections

from benchmarks import damage


def test_damaged_media_never_crash_hang_or_fill_the_memory(tmp_path):
    kinds = collections.Counter()
    for path, outcome in damage.outcomes(210, 1, tmp_path / "fuzz"):
        assert outcome.is_fine, (path.name, outcome)
        kinds[outcome.kind] += 1
    assert kinds["crops"] >= 20 and kinds["error"] >= 50
    assert not list((tmp_path / "fuzz").glob("damaged*"))


def test_a_reader_that_crashes_or_hangs_is_an_outcome_and_is_replaced(tmp_path, monkeypatch):
    damage.whole_files(tmp_path)
    reading = damage.Reading()
    assert reading.read(tmp_path / "plain.png").is_fine
    reading._process.kill()
    reading._process.wait()
    crash = reading.read(tmp_path / "plain.png")
    assert crash.kind == "crash" and not crash.is_fine
    assert all(reading.read(path).kind == "crops" for path in sorted(tmp_path.iterdir()))
    monkeypatch.setattr(damage, "WALL_SECONDS", 0.0)
    hang = reading.read(tmp_path / "h264.mp4")
    assert hang.kind == "hang" and not hang.is_fine and reading._process is None
