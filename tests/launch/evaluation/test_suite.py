"""`launch.evaluate --suite`, `score` and `compare`: from files of benchmarks and a tiny model to tables."""

import json
import multiprocessing
import pathlib
import shutil
import time

import pytest

from data_pipelines import suites
from data_pipelines.suites import predictions
from launch import evaluate
from launch.evaluation import suite
from launch.support import cli
from launch.support import lock
from molmo2_jax import generate
from tests.data_pipelines.suites import cases
from tests.data_pipelines.suites import files
from tests.data_pipelines.suites import test_benchmarks
from tests.launch import commands
from tests.launch import test_mains
from tests.launch.support import test_answering

model_folder, film = test_mains.model_folder, test_benchmarks.film
flags_as_before, start = commands.flags_as_before, commands.start
NAMES = "tomato,screenspot_pro"


@pytest.fixture(scope="module")
def root(tmp_path_factory, film):
    """Files of some benchmarks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in ("tomato", "screenspot_pro", "cap_eval"):
        cases.write(name, folder / name, film)
    return folder


def arguments(model, root, output, *more, names=NAMES):
    return [f"--model={model}", f"--benchmarks={root}", f"--suite={names}", f"--output={output}", "--rows=2",
            "--max_new_tokens=4", *more]


@pytest.fixture(scope="module")
def evaluated(model_folder, root, tmp_path_factory):
    """The output folder of an evaluation."""
    output = tmp_path_factory.mktemp("evaluated") / "scores"
    assert start(evaluate.main, *arguments(model_folder, root, output)) == 0
    return output


def answers(output):
    """Returns all that does not depend on time of the answers in an output folder."""
    return {name: {one: (found.key, found.prompt, found.answer, found.new_tokens, found.frames)
                   for one, found in of_benchmark.items()}
            for name, of_benchmark in predictions.of_path(output, suites.BENCHMARKS).items() if of_benchmark}


def test_an_evaluation_writes_answers_scores_a_table_and_a_page(evaluated, model_folder):
    found = answers(evaluated)
    assert {name: len(of) for name, of in found.items()} == {"tomato": 2, "screenspot_pro": 2}
    assert found["tomato"]["count_0"][1].endswith("\nA. once\nB. twice\nC. never")
    *_, new_tokens, frames = found["tomato"]["count_0"]
    assert frames == test_mains.INPUTS.max_frames and new_tokens <= 4
    content = json.loads((evaluated / suite.RESULTS).read_text())
    assert content["model"] == str(model_folder) and len(content["weights"]) == 32
    tomato = content["benchmarks"]["tomato"]
    assert tomato["examples"] == tomato["questions"] == 2 and 0 <= tomato["score"] <= 1
    assert tomato["interval"][0] <= tomato["score"] <= tomato["interval"][1] and tomato["frames"] == 4
    assert "| TOMATO | accuracy | 2 of 2 |" in (evaluated / suite.TABLE).read_text()
    page = (evaluated / suite.PAGE).read_text()
    assert "TOMATO: the worst answers" in page and "<img" in page and "39.6" in page
    assert not (evaluated / lock.NAME).exists()


def test_the_same_command_asks_nothing_again_and_other_weights_or_settings_all(
        evaluated, model_folder, root, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(evaluated, tmp_path / "scores")   # other tests read what is replaced here
    before, asked = answers(output), []
    real = generate.Answerer.run
    monkeypatch.setattr(generate.Answerer, "run", lambda self, prompts, *how: asked.extend(prompts) or real(
        self, prompts, *how))
    content = (output / suite.RESULTS).read_text()
    assert start(evaluate.main, *arguments(model_folder, root, output)) == 0
    assert not asked and answers(output) == before and (output / suite.RESULTS).read_text() == content
    assert "TOMATO" in capsys.readouterr().out
    assert start(evaluate.main, *arguments(model_folder, root, output, "--max_new_tokens=3",
                                           names="tomato")) == 0
    assert len(asked) == 2


def test_an_answer_that_is_missing_is_asked_for(evaluated, model_folder, root, tmp_path):
    output = tmp_path / "scores"
    for name, of in predictions.of_path(evaluated, ["tomato", "screenspot_pro"]).items():
        predictions.Store.of(output, name).append(list(of.values())[:1])
    assert start(evaluate.main, *arguments(model_folder, root, output)) == 0
    assert {name: set(of) for name, of in answers(output).items()} == {
        name: set(of) for name, of in answers(evaluated).items()}


@pytest.mark.parametrize("more, words", [
    (["--suite=mlvu"], "mlvu (MLVU) needs MLVU/json/*.json | json/*.json in"),
    (["--suite=tomto"], "did you mean 'tomato'"),
    (["--suite=caption"], "needs a judge of captions: --judge_url and --judge_model, or --judgements"),
    (["--suite=mlvu", "--allow_missing"], "mlvu (MLVU) needs"),   # nothing would be left
    (["--suite=tomato", "--data=x"], "--suite and --data are evaluated by separate commands"),
    (["--suite=tomato", "--output=gs://a/b"], "its output must be a folder of this machine; got gs://a/b"),
    (["scroe"], "must be score or compare, or there must be flags only; got 'scroe'"),
    (["score"], "score takes one file of predictions and --suite"),
    (["compare", "a", "--suite=tomato"], "compare takes two output folders or files of predictions"),
    (["score", "none.jsonl", "--suite=tomato"], "must be a file of JSON lines, or the output folder"),
])
def test_mistakes_are_answered_with_one_sentence(more, words, model_folder, root, tmp_path, capsys):
    given = [f"--model={model_folder}", f"--benchmarks={root}", f"--output={tmp_path / 'out'}", *more]
    assert start(evaluate.main, *given) == cli.USER_ERROR
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and words in message
    assert not (tmp_path / "out" / "predictions").exists()


def test_a_missing_data_set_leaves_its_cell_and_its_average_empty(model_folder, root, tmp_path, capsys):
    output = tmp_path / "out"
    assert start(evaluate.main, *arguments(model_folder, root, output, "--allow_missing", "--limit=1",
                                           names="short_video,caption")) == 0
    content = json.loads((output / suite.RESULTS).read_text())
    assert content["averages"] == {"short_video": None}
    assert content["benchmarks"]["tomato"]["examples"] == 1
    assert content["benchmarks"]["mvbench"]["score"] is None
    assert "OpenGVLab/MVBench" in content["benchmarks"]["mvbench"]["reason"]
    assert "needs a judge" in content["benchmarks"]["cap_eval"]["reason"]
    assert "mvbench has no score: mvbench (MVBench) needs" in capsys.readouterr().out


def test_a_folder_in_use_refuses_a_second_evaluation(model_folder, root, tmp_path, capsys):
    output = tmp_path / "out"
    with lock.held(output):
        assert start(evaluate.main, *arguments(model_folder, root, output)) == cli.USER_ERROR
    assert "must be used by one run at a time" in capsys.readouterr().err
    assert not (output / "predictions").exists()


def test_answers_of_any_program_are_scored_without_a_model(root, tmp_path, capsys):
    mine, output = tmp_path / "mine.jsonl", tmp_path / "out"
    mine.write_text('{"id": "count_0", "answer": "B. twice"}\n{"id": "count_7", "answer": "B"}\n')
    assert start(evaluate.main, "score", mine, "--suite=tomato", f"--benchmarks={root}",
                 f"--output={output}") == 0
    content = json.loads((output / suite.RESULTS).read_text())["benchmarks"]["tomato"]
    assert (content["score"], content["published_score"], content["parsed"]) == (0.5, 0.5, 1)
    assert "TOMATO accuracy 2 of 2 50.0" in " ".join(capsys.readouterr().out.split())


def test_recorded_judgements_score_captions(root, tmp_path):
    said, mine, output = tmp_path / "judge.jsonl", tmp_path / "cap_eval.jsonl", tmp_path / "out"
    facts, caption = ["A dog runs.", "The dog is brown."], "A dog runs."
    lines = [{"caption": caption, "split": "A dog runs. | Action"},
             {"statements": facts, "caption": caption, "check": "1. Stated\n2. Not Stated"},
             {"statements": ["A dog runs."], "caption": "A brown dog runs.", "check": "1. Stated"}]
    said.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = ("77_None_None", "e1_2.0_6.0", "e2_1.5_3.0")
    mine.write_text("".join(json.dumps({"id": one, "answer": caption}) + "\n" for one in ids))
    given = ["score", mine, "--suite=caption", f"--benchmarks={root}", f"--output={output}"]
    assert start(evaluate.main, *given, f"--judgements={said}") == 0
    found = json.loads((output / suite.RESULTS).read_text())["benchmarks"]["cap_eval"]
    assert (found["scores"]["recall"], found["scores"]["precision"]) == (0.5, 1)
    assert found["score"] == pytest.approx(2 / 3)
    said.write_text(json.dumps(lines[0]) + "\n")
    assert start(evaluate.main, *given, f"--judgements={said}") == cli.USER_ERROR   # never skipped


def test_two_evaluations_are_compared_with_the_answers_that_flipped(root, tmp_path, capsys):
    first, second = (tmp_path / f"{name}.jsonl" for name in "ab")
    first.write_text('{"id": "count_0", "answer": "A"}\n{"id": "count_7", "answer": "A"}\n')
    second.write_text('{"id": "count_0", "answer": "B. twice"}\n{"id": "count_7", "answer": "A. left"}\n')
    output = tmp_path / "compared.json"
    assert start(evaluate.main, "compare", first, second, "--suite=tomato", f"--benchmarks={root}",
                 f"--output={output}") == 0
    told = capsys.readouterr().out
    assert "50.0   100.0       +50.0   +0.0 to +100.0" in told
    assert "TOMATO: 1 answers flipped, 1 for the better" in told
    assert "count_0: 0.00 -> 1.00: 'A' -> 'B. twice'" in told and "count_7:" not in told
    found = json.loads(output.read_text())["benchmarks"]["tomato"]
    assert (found["difference"], found["examples"], len(found["flips"])) == (0.5, 2, 1)


@pytest.mark.slow(60)
def test_two_processes_evaluate_as_one(evaluated, model_folder, root, tmp_path):
    output = tmp_path / "two"
    first, second = test_answering.two_processes("launch.evaluate", arguments(model_folder, root, output))
    assert "TOMATO" in first and not second
    assert answers(output) == answers(evaluated)
    both = [json.loads((folder / suite.RESULTS).read_text())["benchmarks"] for folder in (output, evaluated)]
    for one, other in zip(*(found.values() for found in both)):
        assert one["scores"] == other["scores"] and one["interval"] == other["interval"]


def _evaluate(given):
    cli.start(evaluate.main, ["command", *given])


@pytest.mark.slow(160)
def test_twenty_kills_change_neither_answers_nor_scores(model_folder, film, tmp_path):
    root = tmp_path / "benchmarks"
    files.perception_test(root / "perception_test", film)
    row = {"video_name": "video_8241", "question": "Is it so?", "options": ["Yes", "No"], "answer_id": "0"}
    files.table(root / "perception_test/mc_question_val/validation-00000-of-00001.parquet",
                [row | {"question_id": str(n), "question": f"Is it {n}?"} for n in range(48)])
    outputs = tmp_path / "hurt", tmp_path / "unhurt"

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["launch.evaluate"])   # imports once, so that a start takes seconds

    def command(output):
        given = arguments(model_folder, root, output, "--rows=1", names="perception_test")
        process = processes.Process(target=_evaluate, args=(list(map(str, given)),))
        process.start()
        return process

    def size(path):
        return path.stat().st_size if path.exists() else 0

    path = pathlib.Path(outputs[0]) / "predictions/perception_test.jsonl"
    for _ in range(20):
        before, running = size(path), command(outputs[0])
        while size(path) == before and running.is_alive():
            time.sleep(0.01)
        running.kill()
        running.join()
        with open(path, "ab") as file:   # as if the kill had come in the middle of a line
            file.write(b'{"benchmark": "perception_test", "id": "vid')
    asked = len(path.read_bytes().splitlines()) - 1
    for output in outputs:
        last = command(output)
        last.join()
        assert last.exitcode == 0
    assert 20 <= asked <= 48 and answers(outputs[0]) == answers(outputs[1])
    hurt, unhurt = (json.loads((output / suite.RESULTS).read_text())["benchmarks"]["perception_test"]
                    for output in outputs)
    same = ("score", "interval", "published_score", "parsed", "tokens", "frames", "examples", "scores")
    assert {name: hurt[name] for name in same} == {name: unhurt[name] for name in same}
    lines = path.read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 48   # nothing was asked twice
