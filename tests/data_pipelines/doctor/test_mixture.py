"""Shares, sizes and epochs of the data sets of a run."""

import json

import pytest

from data_pipelines import tasks
from data_pipelines.doctor import mixture


def test_a_size_that_is_not_known_hides_the_shares_of_its_group_only():
    mixtures = (tasks.Group(rate=1.0, members=(tasks.Member(task="a"), tasks.Member(task="b"))),
                tasks.Group(rate=3.0, members=(tasks.Member(task="c", root_size_factor=9),
                                               tasks.Member(task="d", root_size_factor=0))))
    assert mixture.shares(mixtures, {"a": 4}) == {"a": None, "b": None, "c": 0.75 * 3 / 4, "d": 0.75 / 4}
    assert mixture.shares(mixtures, {"a": 4, "b": 4})["a"] == 0.125


def write(folder, number):
    folder.mkdir()
    record = json.dumps({"annotations": [{"type": "qa", "question": "Q?", "answer": "A"}]})
    (folder / "annotations.jsonl").write_text(f"{record}\n" * number)
    return str(folder)


def test_epochs_follow_from_shares_sizes_and_lessons(tmp_path):
    a, b = write(tmp_path / "a", 10), write(tmp_path / "b", 5)
    mixtures, known = tasks.of_folders(((a, (1.0, 0.25)), (b, (0.0, 0.75))), 2)
    first, second = mixture.describe(mixtures, known, lessons=(100,), total=500)
    assert (first.examples, first.shares, first.uses) == (10, (1.0, 0.25), 100 + 0.25 * 400)
    assert first.epochs == pytest.approx(20) and second.epochs == pytest.approx(60)
    first, second = mixture.describe(mixtures, known, lessons=(100,), total=50)
    assert (first.uses, second.uses) == (50, 0)
    assert mixture.describe(mixtures, known, lessons=(100,))[0].epochs is None


def test_absent_folders_are_named_and_left_out_only_where_that_is_allowed(tmp_path):
    a, b = write(tmp_path / "a", 10), str(tmp_path / "absent")
    mixtures, known = tasks.of_folders(((a, 0.25), (b, 0.75)))
    first, second = mixture.describe(mixtures, known, total=40)
    assert (first.is_missing, second.is_missing) == (False, True)
    assert first.shares == (0.25,) and second.examples is None and "of your own" in second.origin
    first, second = mixture.describe(mixtures, known, total=40, allow_missing=True)
    assert first.shares == (1.0,) and second.shares == (0.0,) and first.epochs == 4


def test_absent_data_sets_of_the_recipe_say_how_they_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {row.task: row for row in mixture.describe([tasks.MIXTURES["pretrain"]], tasks.TASKS)}
    assert all(row.is_missing and f"--task={task}" in row.origin for task, row in found.items())
    assert "datasets/allenai/pixmo-cap" in found["pixmo_cap_with_transcripts"].origin
    assert found["pixmo_cap_with_transcripts"].examples == 710_000
    assert found["pixmo_cap_with_transcripts"].shares == pytest.approx((0.6,))
