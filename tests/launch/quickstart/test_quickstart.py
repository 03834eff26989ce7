"""The quickstart: its parts, and one complete run at the smallest sizes."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import types as types_lib

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from data_pipelines import annotations
from data_pipelines import sources
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch import evaluate
from launch import run
from launch import train
from launch.quickstart import __main__ as quickstart
from launch.quickstart import corpus
from launch.quickstart import progress
from launch.quickstart import scoreboard
from launch.quickstart import showcase
from launch.support import cli
from launch.support import trained
from molmo2_jax import config as config_lib
from molmo2_jax import types
from molmo2_jax.inputs import media
from molmo2_jax.inputs import tokenizer as tokenizers
from tests.launch import commands

SMALL = ("config.VisionConfig.num_layers = 1", "config.ConnectorConfig.taps = (0,)",
         "config.TextConfig.num_layers = 1", "pipeline.DataConfig.num_workers = 1",
         "pipeline.DataConfig.batch_rows = 1", "train.TrainConfig.steps = 2")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A data folder of a few clips and images with masks."""
    folder = tmp_path_factory.mktemp("drawn")
    world_write.write(folder, world_config.quickstart_world(), 5, 12, split="heldout", progress=False)
    return folder / "heldout"


@pytest.mark.parametrize("world", world_config.WORLDS)
def test_the_default_work_directory_keeps_the_paths_of_the_gin_file(world):
    config = quickstart.settings(world, run.ROOT / "runs" / world, [], 0)
    assert config == run.resolve([f"gin_configs/runs/{world}.gin"])


@pytest.mark.parametrize("world", world_config.WORLDS)
def test_another_work_directory_moves_every_folder_and_a_seed_moves_every_seed(tmp_path, world):
    usual = run.resolve([f"gin_configs/runs/{world}.gin"])
    config = quickstart.settings(world, tmp_path, ["train.TrainConfig.steps = 7"], 3)
    folders = [one if isinstance(one, str) else one[0] for one in config.data.train]
    assert folders == [str(tmp_path / "data" / name) for name in world_config.WORLDS[world][1]()]
    assert config.tokenizer == str(tmp_path / "tokenizer")
    assert (config.train.steps, config.train.seed) == (7, usual.train.seed + 3)
    assert config.data.seed == usual.data.seed + 3
    assert [one[1:] for one in config.data.train] == [one[1:] for one in usual.data.train]


def test_points_as_choices_change_the_model_and_nothing_else():
    config = quickstart.settings("quickstart", run.ROOT / "runs" / "quickstart", list(quickstart.TOKENS), 0)
    assert config == run.resolve(["gin_configs/ablations/points_as_tokens.gin"])


def test_a_folder_of_ones_own_stays_where_it_is(tmp_path):
    config = quickstart.settings("quickstart", tmp_path, ["pipeline.DataConfig.train = ('/elsewhere/mine',)",
                                                          "pipeline.DataConfig.lessons = ()"], 0)
    assert config.data.train == ("/elsewhere/mine",)


def test_training_and_heldout_data_never_share_a_seed(tmp_path):
    seeds = {}
    for seed in range(4):
        job = quickstart.Job(world="quickstart", workdir=tmp_path, config=None, seed=seed, scale=0.01)
        for name, (_, drawn_with, count) in job.worlds.items():
            seeds.setdefault(name == quickstart.HELDOUT, set()).add(drawn_with)
            assert count >= quickstart.FEWEST
    assert not seeds[True] & seeds[False]


def test_training_goes_on_with_the_same_data_only(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    job = quickstart.Job(world="quickstart", workdir=tmp_path, config=None, seed=0, scale=1.0)
    watch = progress.Progress(tmp_path, 1)
    with pytest.raises(ValueError, match="must not change once training has begun"):
        quickstart._refuse_other_data(job, watch, "other")


def test_a_run_that_starts_from_a_model_takes_its_tokenizer_and_weights(tmp_path):
    config = quickstart.settings("full", tmp_path, [], 0)
    shipped = run.ROOT / "assets" / "nano"
    job = quickstart.Job(world="full", workdir=tmp_path, config=config, seed=0, scale=1.0, start=str(shipped))
    quickstart.make_tokenizer(job)
    made = pathlib.Path(config.tokenizer, "tokenizer.json")
    assert json.loads(made.read_text()) == json.loads((shipped / "tokenizer.json").read_text())
    params = train.first_params(config, str(shipped), tmp_path)
    wanted = trained.load(shipped).params
    assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted))
    assert train.first_params(config, None, tmp_path) is None
    markers = dataclasses.replace(config.inputs, use_frame_special_tokens=False)
    with pytest.raises(ValueError, match="use_frame_special_tokens = True; got False"):
        train.first_params(dataclasses.replace(config, inputs=markers), str(shipped), tmp_path)


def test_the_corpus_is_the_same_every_time_and_holds_no_markup(drawn):
    inputs = config_lib.InputConfig(max_frames=4)
    texts = list(corpus.texts([drawn], inputs, num_templates=1))
    assert texts == list(corpus.texts([drawn], inputs, num_templates=1))
    assert not [text for text in texts if "<|im_" in text]
    assert "assistant\n" in texts and "0.0 " in texts
    assert any(text.startswith("user\n") for text in texts)
    assert any("<points coords=" in text for text in texts)
    assert any(text.endswith("Point to the object.") for text in texts)


def test_a_tokenizer_of_the_corpus_writes_answers_in_few_tokens(drawn):
    texts = list(corpus.texts([drawn], config_lib.InputConfig(max_frames=4), num_templates=1))
    tokenizer = tokenizers.train_small(texts, 512)
    answer = '<points coords="0.0 1 300 700">red circle</points>'
    ids = tokenizer.encode(answer)
    assert tokenizer.decode(ids) == answer and len(ids) < len(answer) * 2 / 3


def rows_of_the_truth(examples, texts=None):
    """Returns rows as from showcase.as_rows, with `texts` or "" as answers."""
    return [{"example": e, "annotation": a, "question": "?", "answer": (texts or {}).get((e, a), "")}
            for e, example in enumerate(examples) for a in range(len(example.annotations))]


def test_cases_are_taken_in_turns_and_show_no_example_twice(drawn):
    examples = sources.examples(drawn)
    found = showcase.cases(examples, rows_of_the_truth(examples))
    for kind in ("video", "tracks", "words"):
        chosen = showcase.choose(found, kind, 4)
        assert chosen and {case.kind for case in chosen} == {kind}
        assert len({id(case.example) for case in chosen}) == len(chosen) <= 4
    assert {case.variety for case in showcase.choose(found, "video", 4)} == {1, 2}


def test_the_right_answer_is_drawn_with_full_score(drawn):
    examples = sources.examples(drawn)
    inputs = config_lib.InputConfig(max_frames=16)
    for kind in ("video", "image", "words"):
        [case] = showcase.choose(showcase.cases(examples, rows_of_the_truth(examples)), kind, 1)
        wrong = showcase.shown(case, inputs)
        right = showcase.shown(case._replace(answer=wrong.truth), inputs)
        assert (wrong.score, right.score) == (0.0, 1.0)
        assert right.frames and right.truth
    [case] = showcase.choose(showcase.cases(examples, rows_of_the_truth(examples)), "tracks", 1)
    truth = showcase.shown_track(case, inputs).truth
    right = showcase.shown_track(case._replace(answer=truth), inputs)
    assert right.score == pytest.approx(1.0) and len(right.animation) >= 10


@pytest.mark.parametrize("tracking_fps", [None, 1.0])
def test_what_is_drawn_is_what_the_model_saw_also_of_a_part_of_a_clip(drawn, tracking_fps):
    whole = next(example for example in sources.examples(drawn) if example.video)
    config, inputs = config_lib.nano(), config_lib.InputConfig(max_frames=4)
    tokenizer = tokenizers.train_small(["0.0"], config.text.vocab_size)
    example = dataclasses.replace(whole, clip=(0.25, 0.75), tracking_fps=tracking_fps)
    _, seen = media.see(example, config, inputs, tokenizer)
    pixels, shown = showcase._media(example, inputs)
    assert shown.seconds.tolist() == seen.seconds.tolist() and shown.duration == seen.duration == 0.5
    later = showcase._frames_at(whole, shown.seconds + 0.25)
    assert np.array_equal(pixels, later)
    assert np.array_equal(showcase._frames_at(example, shown.seconds), later)
    assert not np.array_equal(pixels, showcase._frames_at(whole, shown.seconds))


def test_points_of_a_track_move_evenly_between_its_times():
    tracked = {0.0: {"1": (10.0, 0.0)}, 0.5: {"1": (20.0, 4.0), "2": (1.0, 1.0)}}
    assert showcase._between(tracked, 0.25) == {"1": (15.0, 2.0)}
    assert showcase._between(tracked, 0.5) == {"1": (20.0, 4.0), "2": (1.0, 1.0)}
    assert showcase._between(tracked, 0.6) == {}


def test_the_commands_name_a_clip_and_an_object_in_it():
    asked = annotations.QA(question="?", answer="!"), annotations.Count(label="red circle", count=1)
    example = types.Example(annotations=asked, video="/data/clip.mp4")
    lines = showcase.commands("runs/x", [example], str).splitlines()
    assert "--model=runs/x --video=/data/clip.mp4 --prompt='Point to the red circle.'" in lines[0]


def test_the_summary_holds_every_key_and_says_none_where_nothing_was_asked():
    costs = {"train_seconds": 471.2, "total_seconds": 600.0, "peak_memory_gib": 2.5}
    content = scoreboard.summary({"video_point_f1": 0.9}, {"video_point_f1": 0.1}, (0.1, 6.0), costs)
    assert {"video_point_f1", "image_point_f1", "count_accuracy", "track_jf", "choice_accuracy",
            "train_seconds", "total_seconds", "peak_memory_gib"} <= set(content)
    assert content["image_point_f1"] is None and content["untrained"]["video_point_f1"] == 0.1
    lines = scoreboard.table(content).splitlines()
    assert re.search(r"video pointing, F1\s+0\.900\s+0\.100\s+0\.800", "\n".join(lines))
    assert "7 min 51 s of 10 min 00 s" in lines[-1] and "2.5 GiB" in lines[-1]


@pytest.mark.parametrize("finished", [True, False])
def test_training_that_was_interrupted_ends_the_command_before_anything_is_scored(
        tmp_path, monkeypatch, capsys, finished):
    done = []
    for name in ("draw", "make_tokenizer", "ask_untrained", "ask_trained", "export"):
        monkeypatch.setattr(quickstart, name, lambda job, name=name: done.append(name))
    monkeypatch.setattr(quickstart, "report", lambda job, watch: sys.exit("report"))
    monkeypatch.setattr(quickstart.train, "fit",
                        lambda config, workdir, params: types_lib.SimpleNamespace(finished=finished))
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
        cli.start(quickstart.main, ["quickstart", f"--workdir={tmp_path}"])
    flags.FLAGS.mark_as_parsed()
    if finished:
        assert caught.value.code == "report" and done[-1] == "export"
    else:
        assert caught.value.code == cli.INTERRUPTED and done == ["draw", "make_tokenizer"]
        assert "the same command resumes" in capsys.readouterr().out.splitlines()[-1]


def start(workdir, *arguments):
    """Returns (exit status, stdout, stderr) of a tiny quickstart on one device, as on a laptop."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "launch.quickstart", f"--workdir={workdir}", "--examples_scale=0.001",
         *(f"--gin={binding}" for binding in SMALL), *arguments],
        cwd=run.ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow(145)
def test_the_quickstart_ends_with_scores_and_a_report_and_does_nothing_twice(tmp_path):
    status, out, error = start(tmp_path)
    assert status == 0, error
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["train_seconds"] < summary["total_seconds"]
    assert summary["video_point_f1"] is not None and summary["peak_memory_gib"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "data:image/webp" in page and "launch.generate" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "video pointing, F1" in out and "--prompt=" in out

    scored = tmp_path / "scores.json"
    heldout = tmp_path / "data" / quickstart.HELDOUT
    assert commands.start(evaluate.main, f"--model={tmp_path}", f"--data={heldout}", f"--output={scored}",
                          f"--max_new_tokens={quickstart.MAX_NEW_TOKENS}") == 0
    again = json.loads(scored.read_text())[str(heldout)]
    own = json.loads((tmp_path / "answers" / "trained.json").read_text())["scores"]
    assert own == {name: again[name] for name in own} and own["video_point_examples"] > 0

    written = (tmp_path / "report.html").stat().st_mtime_ns
    status, out, error = start(tmp_path)
    assert status == 0, error
    assert out.count("done before") == 7 and "video pointing, F1" in out
    assert (tmp_path / "report.html").stat().st_mtime_ns == written


@pytest.mark.slow(75)
def test_the_quickstart_with_points_as_choices_ends_with_scores_and_a_report(tmp_path):
    status, out, error = start(tmp_path, "--pointing=tokens")
    assert status == 0, error
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["video_point_f1"] is not None and "video pointing, F1" in out
    assert "patch_loss" in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert "data:image/webp" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "molmo_point"
