"""launch.check: what it lists, and the page and JSON that it writes, also of damaged and sampled folders."""

import functools
import json
import shutil
import sys

import pytest
from PIL import Image

from data_pipelines.stream import child
from launch import check
from molmo2_jax.render import checkup
from tests.launch import commands
from tests.render import test_report

flags_as_before = commands.flags_as_before
start = functools.partial(commands.start, check.main)

POINTS = {"type": "points", "label": "red circle", "points": [{"x": 10.0, "y": 20.0}]}
QA = {"type": "qa", "question": "Is there a circle?", "answer": "Yes."}
GOOD = {"images": ["a.png"], "annotations": [POINTS, QA]}
OUTSIDE = {"images": ["a.png"], "annotations": [POINTS | {"points": [{"x": 64.5, "y": 20}]}]}
EVIL = "<img src=x onerror=alert(1)>"


def write(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "a.png")
    (folder / "b.png").write_text("no picture")
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (folder / "annotations.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def checked(tmp_path, *arguments):
    """Returns (exit status, page, JSON)."""
    page, values = tmp_path / "out/page.html", tmp_path / "out/values.json"
    status = start(*arguments, f"--report={page}", f"--output={values}")
    return status, page.read_text(encoding="utf-8"), json.loads(values.read_text())


def test_all_that_training_would_leave_out_is_listed(tmp_path, capsys):
    folder = write(tmp_path / "good", [GOOD])
    assert start(f"--data={folder}") == 0
    assert capsys.readouterr().out == f"{folder}: 1 good lines; annotations: 1 points, 1 qa; problems: none\n"
    folder = write(tmp_path / "data", [GOOD, "not JSON", {"images": ["b.png"], "annotations": [QA]}, OUTSIDE])
    assert start(f"--data={folder}") == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("problems: 3") and len(told) == 4
    for words in (":2: record: must", ":3: ", ":4: annotations[0]"):
        assert sum(f"{folder}/annotations.jsonl{words}" in line for line in told[1:]) == 1
    assert start(f"--data={folder}", "--nomedia", f"--report={tmp_path / 'page.html'}") == 1
    assert "problems: 1" in capsys.readouterr().out
    assert "<img" not in (tmp_path / "page.html").read_text()  # no file was opened


def test_the_page_shows_the_numbers_of_the_json(tmp_path):
    broken = {"images": ["b.png"], "annotations": [QA]}
    damaged = write(tmp_path / "damaged", [GOOD, "{", broken, OUTSIDE, GOOD])
    good = write(tmp_path / "good", [GOOD] * 3)
    status, page, values = checked(tmp_path, f"--data={damaged}", f"--data={good}")
    assert status == 1
    assert [one["name"] for one in values["sources"]] == [str(damaged), str(good)]
    assert [(one["records"], one["usable"]) for one in values["sources"]] == [(5, 2), (3, 3)]
    for source in values["sources"]:
        assert source["name"] in page
        for measure in ("tokens", "visual_tokens", "crops"):
            for name in ("min", "median", "mean", "max"):
                assert checkup.number(source[measure][name]) in page
        for problem in source["problems"]:
            assert problem["examples"] and checkup.percent(problem["share"]) in page
    assert sum(one["records"] for one in values["sources"][0]["problems"]) == 3
    assert page.count("<article>") == 5  # a picture of each usable record
    assert values["batch"] is None


def test_an_empty_and_an_absent_folder_are_problems_with_a_page(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/annotations.jsonl").write_text("\n")
    status, page, values = checked(tmp_path, f"--data={tmp_path / 'empty'}", f"--data={tmp_path / 'absent'}")
    assert status == 1 and [one["usable"] for one in values["sources"]] == [0, 0]
    assert "must hold at least one record" in page and "must exist" in page


def test_names_and_labels_cannot_bring_markup(tmp_path):
    folder = write(tmp_path / f"x{EVIL.replace('/', '')}", [
        GOOD | {"annotations": [POINTS | {"label": EVIL}, QA | {"question": EVIL, "answer": EVIL}]},
        OUTSIDE | {"annotations": [{"type": EVIL}]}, {"images": [EVIL], "annotations": [QA]}, {EVIL: 1}])
    Image.new("RGB", (8, 8)).save(folder / f"{EVIL}.png")
    with open(folder / "annotations.jsonl", "a", encoding="utf-8") as lines:
        lines.write(json.dumps({"images": [f"{EVIL}.png"], "annotations": [POINTS]}) + "\n")
    status, page, values = checked(tmp_path, f"--data={folder}")
    assert status == 1 and len(values["sources"][0]["problems"]) == 4
    assert EVIL not in page and "onerror=alert(1)&gt;" in page
    reader = test_report.Reader()
    reader.feed(page)
    assert not reader.open and all(one.startswith(("data:image/", "#source")) for one in reader.sources)


def test_a_sample_is_seeded_and_said_to_be_one(tmp_path, capsys):
    folder = write(tmp_path / "data", [GOOD if place % 2 else "{" for place in range(40)])
    first, again, other = (checked(tmp_path, f"--data={folder}", "--sample=10", f"--seed={seed}", "--nomedia")
                           for seed in (0, 0, 1))
    assert "of a sample of 10 of 40 records" in capsys.readouterr().out
    source = first[2]["sources"][0]
    assert source["is_sampled"] and (source["records"], source["examined"]) == (40, 10)
    assert "A sample of 10 of 40 records." in first[1] and "were sampled" in first[1]
    assert first[1:] == again[1:] and first[2] != other[2]


@pytest.mark.slow(6)
def test_a_run_brings_its_rows_its_folders_and_the_cost_of_its_batches(tmp_path):
    folder, other = write(tmp_path / "data", [GOOD] * 3), write(tmp_path / "other", [GOOD])
    run = ["--gin_file=gin_configs/runs/quickstart.gin", "--gin=run.RunConfig.tokenizer = 'assets/nano'",
           f"--gin=pipeline.DataConfig.train = ('{folder}', '{other}')"]
    status, page, values = checked(tmp_path, *run, "--hosts=2", "--step_seconds=0.5")
    assert status == 0 and {one["name"] for one in values["sources"]} == {str(folder), str(other)}
    batch = values["batch"]
    assert batch["hosts"] == 2 and batch["examples_per_row"] >= 1
    assert batch["cores_per_host"]["0.5"] == pytest.approx(batch["core_seconds"])
    assert checkup.number(batch["core_seconds"]) in page and "Cost of a batch" in page
    small = ["--gin=pipeline.DataConfig.row_tokens = 20", "--gin=pipeline.DataConfig.row_visual_tokens = 20"]
    status, page, values = checked(tmp_path, *run, *small, f"--data={folder}")
    assert status == 1 and values["sources"][0]["too_large"] == 3 and values["batch"] is None
    assert "does not fit a row" in page


# A process that decodes as ours does, but dies of some images.
DEADLY = """
import os, sys
from data_pipelines.stream import child
from molmo2_jax.inputs import pixels
load = pixels.load
pixels.load = lambda path: os.abort() if "deadly" in str(path) else load(path)
child.main(int(sys.argv[1]))
"""


@pytest.mark.slow(6)
def test_a_decoder_that_crashes_is_a_problem_of_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", DEADLY))
    folder = write(tmp_path / "data", [GOOD, {"images": ["deadly.png"], "annotations": [QA]}, GOOD])
    shutil.copy(folder / "a.png", folder / "deadly.png")
    status, page, values = checked(tmp_path, f"--data={folder}")
    assert status == 1 and (values["sources"][0]["usable"], values["sources"][0]["examined"]) == (2, 3)
    assert values["sources"][0]["left_out"] == {"worker": 1}
    message = f"{folder}/annotations.jsonl:2: the process that decodes it ends by SIGABRT, 2 times"
    assert message in capsys.readouterr().out and page.count("<article>") == 2
