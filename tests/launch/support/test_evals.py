"""Evaluation inside training: it changes no step, is repeated after a kill, and can end the run."""

import contextlib
import dataclasses
import json
import math
import types as python_types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kills
from data_pipelines.suites import predictions
from launch import evaluate as evaluate_command
from launch import run
from launch import train
from launch.evaluation import suite
from launch.support import evals
from launch.support import folders
from launch.support import trained
from molmo2_jax import checkpoint
from molmo2_jax import finetune
from molmo2_jax import generate
from molmo2_jax import sharding
from molmo2_jax import train as train_lib
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import quantized
from molmo2_jax.monitor import metrics
from tests import packs
from tests import tiny
from tests.data_pipelines.suites import test_benchmarks
from tests.launch import commands
from tests.launch import test_train
from tests.launch.evaluation import test_suite

flags_as_before, film, world = commands.flags_as_before, test_benchmarks.film, test_train.world
benchmarks = test_suite.root
STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The run of six steps that the tests change; its records are scored, too."""
    gin = test_train.write_world(tmp_path_factory.mktemp("world"))
    return run.resolve([gin], [
        f"train.TrainConfig.steps = {STEPS}", "train.TrainConfig.save_every = 4",
        "run.RunConfig.evals = @train.EvalsConfig()", f"train.EvalsConfig.folders = ('{gin.parent}',)",
        f"train.EvalsConfig.every = {EVERY}", "train.EvalsConfig.limit = 3", "train.EvalsConfig.rows = 3",
        "train.EvalsConfig.max_new_tokens = 4"])


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    mesh = tiny.mesh(tensor=2)
    monkeypatch.setattr(sharding, "make_mesh", lambda *_, **__: mesh)


def lines(workdir):
    """Returns the evaluations of a run, without what depends on the clock."""
    return [{name: value for name, value in line.items() if name != "seconds"}
            for line in metrics.read(workdir / evals.NAME)]


def kept(workdir):
    return checkpoint.Manager(str(workdir / evals.BEST)).steps(("state",))


@pytest.fixture(scope="module")
def straight():
    return {}


def trained_straight(config, straight, tmp_path_factory):
    """Returns the work directory of the run with its evaluations, made once."""
    if not straight:
        workdir = tmp_path_factory.mktemp("runs") / "straight"
        assert train.fit(config, workdir).finished
        straight["workdir"] = workdir
    return straight["workdir"]


@pytest.mark.slow(40)
def test_evaluations_change_no_step_copy_no_weights_and_score_as_the_saved_weights_do(
        config, straight, tmp_path, tmp_path_factory, monkeypatch, capsys):
    given = []
    make = generate.Answerer
    monkeypatch.setattr(generate, "Answerer", lambda params, *args, **options: given.append(
        (params, make(params, *args, **options))) or given[-1][1])
    workdir = trained_straight(config, straight, tmp_path_factory)
    assert all(one.params is params for params, one in given) and len(given) == STEPS // EVERY
    printed = capsys.readouterr().out
    assert "evaluation after step 4" in printed and "choice_accuracy" in printed

    train.fit(dataclasses.replace(config, evals=None), tmp_path / "without")
    assert test_train.losses(workdir) == test_train.losses(tmp_path / "without")
    assert [line["step"] for line in lines(workdir)] == [2, 4, 6]
    assert json.loads((workdir / "goodput.json").read_text())["seconds"]["evaluation"] > 0

    [folder] = config.evals.folders
    saved = trained.load(workdir)
    answerer = make(saved.params, saved.model, saved.inputs, saved.tokenizer, max_new_tokens=4)
    wanted = folders.score(answerer, folders.read(folder, 3), rows=3, is_pretraining=False).scores
    assert lines(workdir)[-1]["scores"][folder] == wanted and len(wanted) > 3


@pytest.mark.slow(40)
def test_a_killed_evaluation_is_repeated_when_the_run_resumes(
        config, straight, tmp_path, tmp_path_factory, monkeypatch):
    class Killed(BaseException):
        pass

    score = folders.score

    def killed(*args, **options):
        if len(lines(tmp_path)) == 1:
            raise Killed
        return score(*args, **options)

    monkeypatch.setattr(folders, "score", killed)
    with pytest.raises(Killed):
        train.fit(config, tmp_path)
    assert checkpoint.saved_steps(str(tmp_path)) == [4] and [line["step"] for line in lines(tmp_path)] == [2]
    monkeypatch.setattr(folders, "score", score)
    assert train.fit(config, tmp_path).finished
    workdir = trained_straight(config, straight, tmp_path_factory)
    assert lines(tmp_path) == lines(workdir) and test_train.losses(tmp_path) == test_train.losses(workdir)


@pytest.mark.slow(40)
def test_a_run_whose_metric_grows_no_more_ends_and_keeps_its_best_weights(config, tmp_path):
    changed = dataclasses.replace(config.evals, metric="records_left_out", patience=1)  # always 0
    config = dataclasses.replace(config, evals=changed)
    for _ in range(2):  # the same command makes no further step
        result = train.fit(config, tmp_path)
        assert result.finished and int(result.state.step) == 4
        assert list(test_train.losses(tmp_path)) == [1, 2, 3, 4] and len(lines(tmp_path)) == 2
    best, last = trained.load(tmp_path / evals.BEST), trained.load(tmp_path)
    assert best.model == last.model and kept(tmp_path) == [2]
    assert not np.array_equal(best.params["head"], last.params["head"])


@pytest.mark.slow(30)
def test_adapters_are_evaluated_beside_their_base(config, tmp_path, monkeypatch):
    given = []
    make = generate.Answerer
    monkeypatch.setattr(generate, "Answerer", lambda params, *args, **options: given.append(params) or make(
        params, *args, **options))
    lora = finetune.LoraConfig(targets="text/layers/attn/[qv]/kernel", rank=2, base="int8")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, lora=lora),
                                 evals=dataclasses.replace(config.evals, metric="records_left_out"))
    train.fit(config, tmp_path, packs.random_params(config.model))
    [whole] = given
    query = whole["text"]["layers"]["attn"]["q"]
    assert quantized.is_int8(query["kernel"]) and float(abs(query["lora"].b).max()) > 0
    assert kept(tmp_path) == [line["step"] for line in lines(tmp_path)] == [2]


# Benchmarks


def of_suites(config, benchmarks, **fields):
    """Returns the run with these benchmarks instead of its folder."""
    return dataclasses.replace(config, evals=dataclasses.replace(
        config.evals, folders=(), suites=("tomato", "screenspot_pro"), benchmarks=str(benchmarks), **fields))


def said(workdir, step):
    """Returns what does not depend on the clock of the answers of one evaluation, by benchmark and id."""
    names = ["tomato", "screenspot_pro"]
    return {name: {one: (found.key, found.answer) for one, found in answers.items()} for name, answers in
            predictions.of_path(workdir / evals.FOLDER / f"step_{step}", names).items()}


@pytest.mark.slow(60)
def test_benchmarks_are_scored_as_the_saved_weights_do_and_a_killed_evaluation_asks_nothing_again(
        config, benchmarks, tmp_path, monkeypatch, capsys):
    config = of_suites(config, benchmarks, metric="score", rows=1)
    assert train.fit(config, tmp_path / "straight").finished
    found = lines(tmp_path / "straight")
    assert [line["step"] for line in found] == [2, 4, 6]
    assert [set(line["scores"]) for line in found] == [{"suites/tomato", "suites/screenspot_pro"}] * 3
    last = found[-1]["scores"]
    assert found[-1]["value"] == (last["suites/tomato"]["score"] + last["suites/screenspot_pro"]["score"]) / 2
    assert "suites/tomato: score " in capsys.readouterr().out

    output = tmp_path / "scores"
    assert commands.start(
        evaluate_command.main, f"--model={tmp_path}/straight", "--suite=tomato,screenspot_pro", "--rows=1",
        f"--benchmarks={benchmarks}", f"--output={output}", "--max_new_tokens=4", "--limit=3") == 0
    content = json.loads((output / suite.RESULTS).read_text())["benchmarks"]
    for name, scores in last.items():
        wanted = content[name.removeprefix("suites/")]
        assert scores == {"score": wanted["score"], "questions_left_out": 0.0, **wanted["scores"]}

    class Killed(BaseException):
        pass

    asked, run_ = [], generate.Answerer.run

    def killed(self, prompts, *how):
        if len(asked) == 7:   # at step 4, after three of its four questions
            raise Killed
        asked.append(prompts)
        return run_(self, prompts, *how)

    monkeypatch.setattr(generate.Answerer, "run", killed)
    hurt = tmp_path / "hurt"
    with pytest.raises(Killed):
        train.fit(config, hurt)
    assert [line["step"] for line in lines(hurt)] == [2] and sum(map(len, said(hurt, 4).values())) == 3
    asked[:] = []
    assert train.fit(config, hurt).finished
    assert len(asked) == 1 + 4 and lines(hurt) == found
    assert all(said(hurt, step) == said(tmp_path / "straight", step) for step in (2, 4, 6))


@pytest.mark.slow(150)
def test_two_processes_score_benchmarks_and_go_on_after_a_kill(world, benchmarks, tmp_path):
    fields = ("suites = ('tomato', 'screenspot_pro')", f"benchmarks = '{benchmarks}'", "every = 2",
              "rows = 1", "max_new_tokens = 4")
    bindings = ("train.TrainConfig.steps = 4", "train.TrainConfig.save_every = 1",
                "run.RunConfig.evals = @train.EvalsConfig()",
                *(f"train.EvalsConfig.{field}" for field in fields))
    runs = [kills.Run(world[0], tmp_path / name, bindings, limit=math.inf) for name in ("unhurt", "hurt")]
    with contextlib.closing(runs[0]), contextlib.closing(runs[1]):
        runs[0].start(2)
        runs[0].finish()
        runs[1].start(2)
        runs[1].until(lambda: (runs[1].workdir / evals.FOLDER / "step_2").exists())
        runs[1].kill()   # while the programs of the second benchmark are compiled
        runs[1].start(2)
        runs[1].finish()
    unhurt, hurt = (one.workdir for one in runs)
    assert [line["step"] for line in lines(hurt)] == [2, 4] and lines(hurt) == lines(unhurt)
    assert [set(line["scores"]) for line in lines(hurt)] == [{"suites/tomato", "suites/screenspot_pro"}] * 2
    assert all(said(hurt, step) == said(unhurt, step) for step in (2, 4))
    assert {name: len(of) for name, of in said(hurt, 4).items()} == {"tomato": 2, "screenspot_pro": 2}
    text = (hurt / evals.FOLDER / "step_2/predictions/tomato.jsonl").read_text().splitlines()
    assert len(text) == len({json.loads(line)["key"] for line in text})   # nothing was asked twice


def test_absent_and_unknown_benchmarks_are_one_sentence(evaluate, benchmarks, tmp_path):
    given = {"folders": (), "benchmarks": str(benchmarks)}
    with pytest.raises(ValueError, match="did you mean 'tomato'"):
        evaluate([], [], suites=("tomto",), **given)
    with pytest.raises(ValueError, match=r"mlvu \(MLVU\) needs MLVU/json"):
        evaluate([], [], suites=("tomato", "mlvu"), **given)
    with pytest.raises(ValueError, match="that need no judge of captions .*; got cap_eval"):
        evaluate([], [], suites=("caption",), **given)


# The rule, without a model


class Report:
    """Stands in for monitor.report.Report."""
    during = staticmethod(contextlib.nullcontext)
    previous = alive = evaluated = staticmethod(lambda *_: None)


@pytest.fixture
def evaluate(config, tmp_path, monkeypatch):
    """Returns what runs an evaluation at every step with given values of the score "f1", and its steps."""
    def start(values, steps, workdir=tmp_path, **fields):
        monkeypatch.setattr(generate, "Answerer", lambda *_, **__: None)
        monkeypatch.setattr(folders, "score", lambda *_, **__: python_types.SimpleNamespace(
            scores={"f1": values.pop(0)}))
        changed = dataclasses.replace(config, evals=dataclasses.replace(config.evals, **fields))
        tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer, config.model.text.vocab_size)
        one = evals.Evals(changed, workdir, tokenizer, sharding.make_mesh())
        return [one(step, None, {"head": jnp.full(3, step)}, Report()) for step in steps]
    return start


def test_the_run_ends_after_patience_evaluations_without_a_new_highest_value(evaluate, tmp_path):
    found = evaluate([0.1, 0.3, 0.2, 0.3, 0.1], range(6), every=1, metric="f1", patience=3)
    assert found == [False] * 5 + [True]
    assert kept(tmp_path) == [2]
    assert evaluate([], [5], every=1, metric="f1", patience=3) == [True]    # resumed
    assert evaluate([0.4], [4, 5], every=1, metric="f1", patience=3) == [False, False]  # one step is repeated
    assert [line["value"] for line in lines(tmp_path)] == [0.1, 0.3, 0.2, 0.3, 0.4]


def test_values_that_are_not_numbers_are_never_the_best(evaluate, tmp_path):
    assert evaluate([float("nan"), 0.0], range(3), every=1, metric="f1", patience=2) == [False] * 3
    assert kept(tmp_path) == [2]
    assert [line["value"] for line in lines(tmp_path)] == [None, 0.0]


def test_only_due_steps_are_evaluated_and_the_last_one_is(evaluate, tmp_path):
    assert not any(evaluate([0.1, 0.2], range(STEPS + 1), every=4))
    assert [line["step"] for line in lines(tmp_path)] == [4, STEPS] and not (tmp_path / evals.BEST).exists()


def test_mistakes_are_one_sentence(evaluate, config, tmp_path):
    with pytest.raises(ValueError, match="metric must be a score of its folders or benchmarks, f1; got f2"):
        evaluate([0.1], [2], metric="f2")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "annotations.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="none"):
        evaluate([], [], folders=(str(tmp_path / "none"),))
    for fields, words in (({"every": 0}, "must be >= 1"), ({"folders": ()}, "at least one folder"),
                          ({"patience": 2}, "needs the metric"), ({"limit": 0}, "must be >= 1"),
                          ({"max_new_tokens": 0}, "must be >= 1")):
        with pytest.raises(ValueError, match=words):
            train_lib.EvalsConfig(**{"folders": ("a",), "every": 1} | fields)
