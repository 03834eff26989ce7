"""The arms of the benchmark of pointing: what differs between them, and the table of their scores."""

import fractions
import json
import os
import pathlib

import pytest

from benchmarks import pointing
from launch import run
from launch.quickstart import __main__ as quickstart

QUARTER, ALL = fractions.Fraction(1, 4), fractions.Fraction(1)


@pytest.fixture
def job(tmp_path):
    """The quickstart's job in a folder with eight examples per lesson."""
    folder = tmp_path / "quickstart"
    for name in ("one", "two", "clips"):
        (folder / "data" / name / "media").mkdir(parents=True)
        (folder / "data" / name / "media" / "0.png").write_bytes(b"x")
        lines = "".join(f'{{"number": {number}}}\n' for number in range(8))
        (folder / "data" / name / "annotations.jsonl").write_text(lines)
    return quickstart.Job(world="quickstart", workdir=folder, seed=0, scale=1.0,
                          config=quickstart.settings("quickstart", folder, [], 0))


def test_a_part_of_a_folder_is_its_first_examples_with_all_media(job):
    part = pointing.first_part(job.data / "one", QUARTER)
    assert part != job.data / "one" == pointing.first_part(job.data / "one", ALL)
    assert (part / "annotations.jsonl").read_text() == '{"number": 0}\n{"number": 1}\n'
    assert (part / "media" / "0.png").read_bytes() == b"x"
    before = os.stat(part / "annotations.jsonl").st_mtime_ns
    assert pointing.first_part(job.data / "one", QUARTER) == part
    assert os.stat(part / "annotations.jsonl").st_mtime_ns == before   # else a run that resumes is refused


def test_arms_differ_in_the_grammar_the_examples_and_the_seeds_only(job):
    found = {cell: pointing.arm(job, cell, 7) for cell in pointing.cells([QUARTER, ALL], 2)}
    assert len({one.name for one in found.values()}) == len(found) == 8
    configs = {cell: run.resolve(one.gin_files, one.bindings) for cell, one in found.items()}
    for cell, config in configs.items():
        assert (config.model.pointer is not None) == (cell.grammar == "tokens")
        assert (config.train.seed, config.data.seed, config.train.steps) == (cell.seed, cell.seed, 7)
        assert config.tokenizer == job.config.tokenizer
        folders, usual = config.data.train, job.config.data.train
        assert [rates for _, rates in folders] == [rates for _, rates in usual]
        sizes = {len(pathlib.Path(path, "annotations.jsonl").read_text().splitlines()) for path, _ in folders}
        assert sizes == {8 * cell.share}
    text, tokens = (configs[pointing.Cell(grammar, QUARTER, 1)] for grammar in pointing.GRAMMARS)
    assert text.data == tokens.data and text.train == tokens.train


def test_the_table_has_means_and_differences_seed_by_seed_of_what_is_finished(job):
    arms = {cell: pointing.arm(job, cell, 7) for cell in pointing.cells([QUARTER, ALL], 2)}
    for cell, one in arms.items():
        if cell.share == QUARTER and (cell.grammar, cell.seed) != ("text", 1):
            folder = job.workdir / one.name
            folder.mkdir()
            f1 = 0.5 + 0.25 * (cell.grammar == "tokens") + 0.125 * cell.seed
            scores = {"video_point_f1": f1, "image_point_f1": f1 / 2}
            (folder / "scores.json").write_text(json.dumps({"/data/heldout": scores}))
    _, _, quarter, whole = pointing.table(job.workdir, arms, 32).splitlines()
    cells = [cell.strip() for cell in quarter.strip("|").split("|")]
    assert cells[:3] == ["8", "1 / 2", "0.5"] and cells[3].startswith("0.81 ±") and cells[4] == "0.25"
    assert cells[5] == "0.25" and cells[7] == "0.125"
    assert whole == "| 32 | 0 / 0 |  |  |  |  |  |  |"


def test_runs_of_the_full_world_go_on_from_the_same_grammar_and_seed(tmp_path):
    cell = pointing.Cell("tokens", QUARTER, 2)
    assert pointing.start_of(cell, "quickstart", tmp_path) is None
    with pytest.raises(ValueError, match="--world=full needs a finished run of the quickstart's world in "):
        pointing.start_of(cell, "full", tmp_path)
    start = tmp_path / "quickstart" / "tokens_1_seed-2"
    start.mkdir(parents=True)
    (start / "scores.json").write_text("{}")
    assert pointing.start_of(cell, "full", tmp_path) == str(start)
