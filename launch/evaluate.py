"""Scores a trained model on data folders, or on the benchmarks of the paper's tables.

  python -m launch.evaluate --model=runs/mine --data=runs/quickstart/data/heldout
  python -m launch.evaluate --model=MODEL --suite=molmo2 --output=runs/scores
  python -m launch.evaluate score PREDICTIONS.jsonl --suite=video_point
  python -m launch.evaluate compare runs/scores runs/other_scores --suite=short_video

--model is the work directory of a run or a Hugging Face folder; --workdir is an alias. --gin changes settings
of the run, for example --gin='config.InputConfig.max_frames = 8'.

--data: pointing, counting, tracking, multiple choice and questions of data folders. Scores are printed, and
written to --output (JSON) after each folder. Unusable records are skipped, counted and listed, as in
training. An annotation that a score cannot judge, such as points without masks, is left out of that score,
counted and listed. If a folder fails, the others keep their scores; the failed folder is named at the end and
the exit status is not 0.

--suite: benchmarks, whose files are below --benchmarks; docs/evaluation.md says where each comes from.
--output is a folder: every answer is appended to it at once, and the same command goes on after any stop. It
gets results.json, table.md with the published figures beside ours, and report.html with the worst answers
drawn.
`score` scores the answers of any program, without a model. `compare` says how much two evaluations differ.

All chips of the machine are used: weights are split over as few as the model needs, records are shared among
the rest; --mesh or --gin bindings of sharding.MeshConfig say otherwise. As a job of several processes
(launch/tpu_run.sh), each reads the media of its own rows, and the first prints and writes.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
from absl import flags
from absl import logging

from data_pipelines import suites
from data_pipelines.scoring import statements
from data_pipelines.suites import judges
from data_pipelines.suites import predictions
from data_pipelines.suites import segmenters
from data_pipelines.suites import tables
from launch.evaluation import compare
from launch.evaluation import suite
from launch.support import answering
from launch.support import cli
from launch.support import folders as folders_lib
from launch.support import hosts
from molmo2_jax import evaluate
from molmo2_jax import files
from molmo2_jax import generate

_LIMIT = flags.DEFINE_integer("limit", None, "Maximum number of records per folder, or of questions per "
                              "benchmark.", lower_bound=1)
_SUITE = flags.DEFINE_list("suite", [], f"Suites and benchmarks: {', '.join(suites.SUITES)}, or the name of "
                           "a benchmark.")
_BENCHMARKS = flags.DEFINE_string("benchmarks", "data/benchmarks", "Folder with a folder for each benchmark.")
_JUDGE_URL = flags.DEFINE_string(
    "judge_url", None, "OpenAI-compatible endpoint that judges captions, such as http://localhost:8000/v1; "
    f"its key is read from the environment variable {judges.KEY}.")
_JUDGE_MODEL = flags.DEFINE_string("judge_model", judges.PUBLISHED, "Model of the judge.")
_JUDGEMENTS = flags.DEFINE_string("judgements", None, "File of recorded judgements (JSON lines). With "
                                  "--judge_url new ones are appended.")
_MASKS = flags.DEFINE_string("masks", None, "File of masks for tracked objects (JSON lines), for J&F.")
_SAM2 = flags.DEFINE_string("sam2", None, "Segment tracked objects from their points with this SAM 2 model, "
                            f"such as {segmenters.MODEL}; its package must be installed.")
_LONGEST = 500  # characters of an error message
for _name in ("model", "data", "gin", "workdir", "max_new_tokens", "dtype", "weights", "mesh", "rows",
              "output", "cache", "allow_missing", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    word, *paths = arguments or [""]
    if word == "score":
        _score(paths)
    elif word == "compare":
        _compare(paths)
    elif word:
        raise ValueError("the first argument must be score or compare, or there must be flags only; "
                         f"got {word!r}")
    elif _SUITE.value:
        _of_main_process(_evaluate_suite)
    else:
        _of_main_process(_evaluate_folders)


def _of_main_process(command) -> None:
    """Runs a command that needs a model in every process of the job; only the first prints."""
    if cli.MODEL.value and cli.WORKDIR.value:
        raise ValueError("--model and --workdir are aliases here, give one of them; got "
                         f"{cli.MODEL.value} and {cli.WORKDIR.value}")
    if not (cli.MODEL.value or cli.WORKDIR.value):
        raise ValueError("--model must name the work directory of a run or a Hugging Face folder")
    if command is _evaluate_folders:
        cli.data()
    hosts.join()
    if jax.process_index():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            command()
    else:
        command()


# ---- suites


def _job(output: str | None) -> suite.Job:
    """Returns what the flags ask for.

    Raises:
      ValueError: the output is in a bucket, whose files cannot be appended to.
    """
    if output and files.is_remote(output):
        raise ValueError("an evaluation appends to files, so its output must be a folder of this machine; "
                         f"got {output}")
    return suite.Job(
        benchmarks=suites.load(_SUITE.value), root=pathlib.Path(_BENCHMARKS.value),
        output=pathlib.Path(output or "."), rows=cli.ROWS.value, limit=_LIMIT.value,
        allow_missing=cli.ALLOW_MISSING.value, judge=_judge(output), segment=_segment(output),
        most_new_tokens=cli.MAX_NEW_TOKENS.value if flags.FLAGS["max_new_tokens"].present else None)


def _judge(output: str | None) -> statements.Judge | None:
    record = _JUDGEMENTS.value or (os.path.join(output, "judgements.jsonl") if output else None)
    if _JUDGE_URL.value:
        return judges.endpoint(_JUDGE_URL.value, _JUDGE_MODEL.value, record)
    return statements.recorded(_JUDGEMENTS.value) if _JUDGEMENTS.value else None


def _segment(output: str | None) -> segmenters.Segment | None:
    if _MASKS.value:
        return segmenters.recorded(_MASKS.value)
    if not _SAM2.value or jax.process_index():
        return None
    return segmenters.sam2(_SAM2.value, os.path.join(output, "masks.jsonl") if output else None)


def _evaluate_suite() -> None:
    if not cli.OUTPUT.value:
        raise ValueError("--output must name the folder for answers and scores of --suite")
    if cli.DATA.value:
        raise ValueError("--suite and --data are evaluated by separate commands; got both")
    job, model = _job(cli.OUTPUT.value), cli.MODEL.value or str(cli.workdir())
    longest = max(one.max_new_tokens for one in job.benchmarks)

    def load() -> generate.Answerer:
        _, answerer = answering.load(model, cli.bindings(), rows=cli.ROWS.value,
                                     new_tokens=min(longest, job.most_new_tokens or longest))
        return answerer

    about = {"model": model, "suite": ",".join(_SUITE.value), "dtype": cli.DTYPE.value}
    found, not_finite = suite.evaluate(job, load, about)
    if jax.process_index():
        return
    _print(found)
    print(f"wrote {job.output / suite.RESULTS}, {suite.TABLE}, {suite.PAGE}")
    _end({}, not_finite)


def _print(found) -> None:
    print(tables.text(found))
    for one in found:
        if one.reason:
            print(f"{one.name} has no score: {one.reason}")
        elif one.left_out:
            print(f"{one.name}: {len(one.left_out)} left out, the first: {one.left_out[0]}")


def _score(paths: list[str]) -> None:
    if len(paths) != 1 or not _SUITE.value:
        raise ValueError("score takes one file of predictions and --suite; got "
                         f"{paths} and --suite={','.join(_SUITE.value)}")
    job = _job(cli.OUTPUT.value)
    answers = predictions.of_path(paths[0], [one.name for one in job.benchmarks])
    found = suite.score(job, answers)
    _print(found)
    if cli.OUTPUT.value:
        suite.write(job.output, found, {"predictions": paths[0], "suite": ",".join(_SUITE.value)})
        print(f"wrote {job.output / suite.RESULTS}, {suite.TABLE}")


def _compare(paths: list[str]) -> None:
    if len(paths) != 2 or not _SUITE.value:
        raise ValueError("compare takes two output folders or files of predictions, and --suite; got "
                         f"{paths} and --suite={','.join(_SUITE.value)}")
    job = _job(None)
    found = compare.compare(job, *paths)
    print(compare.text(found, *paths))
    if cli.OUTPUT.value:
        output = cli.output_file(cli.OUTPUT.value)
        output.write_text(files.to_json(compare.as_json(found, *paths), indent=1), encoding="utf-8")
        print(f"wrote {output}")


# ---- data folders


def _evaluate_folders() -> None:
    folders = cli.data()
    output = cli.output_file(cli.OUTPUT.value) if cli.OUTPUT.value and not jax.process_index() else None
    data = {folder: _read(folder) for folder in folders}
    source, answerer = answering.load(cli.MODEL.value or cli.workdir(), cli.bindings(), rows=cli.ROWS.value)
    scores, failed, not_finite = {}, {}, 0
    for folder, found in data.items():
        try:
            result, scores[folder], left_out = folders_lib.score(
                answerer, found, rows=cli.ROWS.value, is_pretraining=source.is_pretraining,
                title=None if jax.process_index() else folder)
        except generate.NotFinite:
            raise
        except Exception as error:  # the other folders can still be scored
            if not isinstance(error, ValueError):
                logging.exception("%s", folder)
            failed[folder] = error
        else:
            not_finite += result.not_finite
            _show(folder, result, scores[folder], left_out)
        if output:
            output.write_text(files.to_json(scores, indent=1), encoding="utf-8")
    if output:
        print(f"wrote {output}")
    _end(failed, not_finite)


def _read(folder: str) -> folders_lib.Scorable:
    """Returns the content of a folder and prints what the scores will leave out."""
    found = folders_lib.read(folder, _LIMIT.value, cli.cache())
    for sentence in found.obstacles:
        print(f"{folder}: left out of the score: {sentence}")
    for name, number in found.unscored.items():
        print(f"{folder}: {name}: {number:g} annotations")
    return found


def _end(failed: dict[str, Exception], not_finite: int) -> None:
    """Ends the command with a one-line message if a folder has no scores or logits were not finite.

    Raises:
      ValueError: every problem is one that the user can correct. SystemExit: another problem occurred.
    """
    problems = [f"{folder} has no scores: {' '.join(str(error).split())[:_LONGEST]}"
                for folder, error in failed.items()]
    if not_finite:
        problems.append(f"{not_finite} records were skipped because their logits were not finite")
    if not all(isinstance(error, ValueError) for error in failed.values()):
        sys.exit(f"error: {'; '.join(problems)}")
    if problems:
        raise ValueError("; ".join(problems)) from next(iter(failed.values()), None)


def _show(folder: str, result: evaluate.Result, scores: Mapping[str, float], left_out: Sequence[str]) -> None:
    print(f"{folder}: {len(result.answered)} answers in {result.seconds:.0f} s; "
          f"{len(left_out)} records left out")
    for name, value in scores.items():
        print(f"  {name:32s} {value:.4f}")
    for sentence in left_out:
        print(f"  left out: {sentence}")


if __name__ == "__main__":
    cli.start(main)
