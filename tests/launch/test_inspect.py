"""launch.inspect: its pages of rows, what it prints of a run's mixture, and its exit statuses."""

import functools
import json
import re

import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from data_pipelines import tasks
from launch import inspect
from launch import run
from launch.support import cli
from launch.support import record
from tests.launch import commands
from tests.render import test_rows

flags_as_before = commands.flags_as_before
start = functools.partial(commands.start, inspect.main)


def write(folder, number):
    folder.mkdir()
    line = json.dumps({"annotations": [{"type": "qa", "question": "What is it?", "answer": "A dot."}]})
    (folder / "annotations.jsonl").write_text(f"{line}\n" * number)
    return str(folder)


def flags_of(*folders):
    return ["--gin_file=gin_configs/runs/quickstart.gin", "--gin=run.RunConfig.tokenizer = 'assets/nano'",
            f"--gin=pipeline.DataConfig.train = {folders!r}", "--gin=pipeline.DataConfig.lessons = ()",
            "--gin=train.TrainConfig.steps = 6"]


@pytest.mark.slow(6)
def test_the_page_of_a_batch_holds_the_rows_of_the_run(tmp_path, capsys):
    folder, output = write(tmp_path / "a", 60), tmp_path / "out/rows.html"
    assert start("batch", *flags_of(folder), "--rows=1", f"--output={output}") == 0
    assert "examples in 1 rows" in capsys.readouterr().out
    ((row,),) = [test_rows.Data(output.read_text()).json["rows"]]
    used, size = row["budgets"]["tokens"]
    assert size == 1024 and used == sum(one["tokens"] for one in row["members"]) == len(row["tokens"]) - [
        count for value, count in row["example"] if value == -1][0]
    assert {one["source"] for one in row["members"]} == {folder}


def test_the_page_of_a_record_is_of_that_record_with_or_without_a_run(tmp_path, capsys):
    folder, output = write(tmp_path / "a", 3), tmp_path / "record.html"
    for more, tokens in (([], None), (flags_of(folder), 1024)):
        assert start("record", f"--data={folder}", "--index=2", f"--output={output}", *more) == 0
        ((row,),) = [test_rows.Data(output.read_text()).json["rows"]]
        assert [one["key"] for one in row["members"]] == ["annotations.jsonl:3"]
        used, size = row["budgets"]["tokens"]
        assert size == (tokens or used) and used == row["members"][0]["tokens"]
    capsys.readouterr()
    assert start("record", f"--data={folder}", "--index=3", f"--output={output}") == cli.USER_ERROR
    assert "--index must be below the 3 records" in capsys.readouterr().err
    assert start("record", f"--data={folder}", f"--output={output}") == cli.USER_ERROR
    assert "and --index; got" in capsys.readouterr().err
    assert start("batch", *flags_of(folder)) == cli.USER_ERROR
    assert "--output must name" in capsys.readouterr().err


def test_pages_of_a_model_with_a_pointer_say_what_its_tokens_choose(tmp_path):
    folder, output = tmp_path / "a", tmp_path / "page.html"
    folder.mkdir()
    Image.new("RGB", (72, 72)).save(folder / "a.png")
    points = {"type": "points", "label": "dot", "scale": 100,
              "points": [{"x": 1, "y": 1}, {"x": 99, "y": 99}]}
    line = json.dumps({"images": ["a.png"], "annotations": [points]})
    (folder / "annotations.jsonl").write_text(f"{line}\n" * 9)
    settings = ["--gin_file=gin_configs/ablations/points_as_tokens.gin", *flags_of(str(folder))[1:]]
    for word, more in (("record", [f"--data={folder}", "--index=0"]), ("batch", ["--rows=1"])):
        assert start(word, *settings, *more, f"--output={output}") == 0
        ((row,),) = [test_rows.Data(output.read_text()).json["rows"]]
        choices = [*row["choices"].values()]   # the dots are in opposite corners
        assert choices[2::3][:2] == ["<|vit_loc:0|>", "<|vit_loc:8|>"]
        assert choices[6] == "<|token_index:end|>"


def test_a_record_is_used_as_the_mixture_says(tmp_path):
    with flagsaver.flagsaver():
        flags.FLAGS(["command", *flags_of(str(tmp_path / "a"))])
        config = cli.resolve("data")
    assert inspect._member(str(tmp_path / "b" / ".." / "a"), config).task == str(tmp_path / "a")
    assert inspect._member(str(tmp_path / "b"), config) == tasks.Member(task=str(tmp_path / "b"))


def test_shares_sizes_and_epochs_are_printed_and_written(tmp_path, capsys):
    a, b = write(tmp_path / "a", 9), write(tmp_path / "b", 4)
    output = tmp_path / "out/mixture.json"
    assert start("mixture", *flags_of(a, b), "--examples_per_row=5", f"--output={output}") == 0
    lines = capsys.readouterr().out.splitlines()
    values = json.loads(output.read_text())
    taken = 6 * values["rows_per_step"] * 5
    assert values["examples"] == taken and not values["allow_missing"]
    for line, row, share, size in zip(lines[1:3], values["data_sets"], (0.6, 0.4), (9, 4), strict=True):
        assert row["shares"] == pytest.approx([share]) and row["examples"] == size
        assert row["epochs"] == pytest.approx(share * taken / size)
        assert re.split(r"\s+", line)[1:] == [str(size), f"{100 * share:.3f}", "%", f"{row['epochs']:.3g}"]
    assert f"about {taken:,} examples, 5 in a row" in lines[3]


def test_the_examples_of_a_row_are_measured(tmp_path, capsys):
    output = tmp_path / "mixture.json"
    assert start("mixture", *flags_of(write(tmp_path / "a", 5)), "--sample=3", f"--output={output}") == 0
    assert json.loads(output.read_text())["examples_per_row"] > 2
    assert "in a row" in capsys.readouterr().out


def test_missing_members_are_refused_unless_they_may_be_left_out(tmp_path, capsys):
    folders = write(tmp_path / "a", 9), str(tmp_path / "absent")
    assert start("mixture", *flags_of(*folders)) == 1
    told = capsys.readouterr().out
    assert "1 of 2 data sets are missing; training needs them" in told and f"in {folders[1]};" in told
    output = tmp_path / "mixture.json"
    assert start("mixture", *flags_of(*folders), "--allow_missing", f"--output={output}") == 0
    assert "renormalised" in capsys.readouterr().out
    assert [row["shares"] for row in json.loads(output.read_text())["data_sets"]] == [[1.0], [0.0]]
    assert start("mixture", *flags_of(folders[1]), "--allow_missing", "--gin=run.RunConfig.tokenizer = 'none'"
                 ) == 1
    assert "1 of 1 data sets are missing; no other is left to train on" in capsys.readouterr().out


def test_folders_that_cannot_be_opened_are_listed_with_the_reason(tmp_path, capsys):
    good, empty = write(tmp_path / "a", 9), write(tmp_path / "empty", 0)
    output = tmp_path / "mixture.json"
    assert start("mixture", *flags_of(good, empty), "--allow_missing", f"--output={output}") == 1
    told = capsys.readouterr().out
    reason = f"{empty}/annotations.jsonl: an annotation file must hold at least one record; got 0 bytes"
    assert f"1 of 2 data sets cannot be opened; training would refuse to start:\n  {empty}: {reason}" in told
    assert "missing" not in told
    assert [row["problem"] for row in json.loads(output.read_text())["data_sets"]] == ["", reason]


def test_what_may_be_left_out_is_recorded(tmp_path):
    with flagsaver.flagsaver():
        flags.FLAGS(["command", *flags_of(str(tmp_path)), "--allow_missing"])
        config = cli.resolve("data")
    assert config.data.allow_missing
    path = tmp_path / "config.gin"
    path.write_text(record.gin_text(config))
    assert run.resolve([path]).data.allow_missing


def test_every_stage_of_the_recipe_is_known(capsys):
    for name, mixture in (("pretrain_4b", "pretrain"), ("sft_4b", "sft"), ("long_context_4b", "sft")):
        path = f"gin_configs/runs/{name}.gin"
        assert run.resolve([path]).data.train == mixture
        assert start("mixture", f"--gin_file={path}", "--examples_per_row=4",
                     "--gin=run.RunConfig.tokenizer = 'assets/nano'") in (0, 1)
        told = capsys.readouterr().out
        for member in tasks.members(tasks.MIXTURES[mixture]):
            assert f"\n{member.task} " in told


@pytest.mark.parametrize("words", [[], ["mixtures"], ["mixture", "mixture"]])
def test_other_words_are_refused(words, capsys):
    assert start(*words) == cli.USER_ERROR
    assert "one of the words batch, record, mixture; got" in capsys.readouterr().err
