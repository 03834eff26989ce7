"""Scores a trained model on data folders: pointing, counting, tracking, multiple choice, questions.

  python -m launch.evaluate --model=runs/mine --data=runs/quickstart/data/heldout

--model is the work directory of a run or a Hugging Face folder; --workdir says the same. Settings of a run
can be changed with --gin, for example --gin='config.InputConfig.max_frames = 8'. The scores are printed, and
written to --output (JSON) as soon as a folder is done. Records that cannot be used are left out, counted and
listed, as in training; so are, from a score, annotations that it cannot judge, such as points without masks.
A folder that fails is named at the end, and the exit status is then not 0; other folders keep their scores.
"""

import collections
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import flags
from absl import logging

from data_pipelines import sources
from launch import cli
from launch import questions
from launch import trained
from molmo2_jax import evaluate
from molmo2_jax import files
from molmo2_jax import generate
from molmo2_jax import types

_LIMIT = flags.DEFINE_integer("limit", None, "Only so many records of each folder.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 8, "Records answered at a time.", lower_bound=1)
_LONGEST = 500  # characters of an error
for _name in ("model", "data", "gin", "workdir", "max_new_tokens", "dtype", "output", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    folders = cli.data()
    if cli.MODEL.value and cli.WORKDIR.value:
        raise ValueError(f"--model and --workdir say the same here; got {cli.MODEL.value} and "
                         f"{cli.WORKDIR.value}")
    if not (cli.MODEL.value or cli.WORKDIR.value):
        raise ValueError("--model must name the work directory of a run or a Hugging Face folder")
    output = cli.output_file(cli.OUTPUT.value) if cli.OUTPUT.value else None
    data = {folder: _read(folder) for folder in folders}
    source = trained.load(cli.MODEL.value or cli.workdir(), cli.bindings())
    answerer = generate.Answerer(source.params, source.model, source.inputs, source.tokenizer,
                                 max_new_tokens=cli.MAX_NEW_TOKENS.value, dtype=cli.DTYPE.value)
    ask = functools.partial(questions.ask, is_pretraining=source.is_pretraining)
    scores, failed, not_finite = {}, {}, 0
    for folder, found in data.items():
        try:
            result = evaluate.evaluate(answerer, found.examples, ask, questions.score, rows=_ROWS.value,
                                       title=folder)
        except generate.NotFinite:
            raise
        except Exception as error:  # other folders may have scores
            if not isinstance(error, ValueError):
                logging.exception("%s", folder)
            failed[folder] = error
        else:
            left_out = [*found.left_out, *result.refused]
            scores[folder] = {**result.scores, **found.unscored, "records_left_out": len(left_out)}
            not_finite += result.not_finite
            _show(folder, result, scores[folder], left_out)
        if output:
            output.write_text(files.to_json(scores, indent=1), encoding="utf-8")
    if output:
        print(f"wrote {output}")
    _end(failed, not_finite)


class _Data(NamedTuple):
    """Of a folder: what can be scored, sentences about records that cannot be used, and the number of
    annotations that each score leaves out, by KIND_left_out."""
    examples: list[types.Example]
    left_out: list[str]
    unscored: dict[str, float]


def _read(folder: str) -> _Data:
    """Returns what is in a folder, and lists what scores will leave out."""
    examples, errors = sources.read_folder(folder)
    examples = examples[:_LIMIT.value]
    unscored: collections.Counter[str] = collections.Counter()
    for example in examples:
        for kind, sentence in questions.obstacles(example):
            unscored[f"{kind}_left_out"] += 1
            print(f"{folder}: left out of the score: {sentence}")
    for name, number in unscored.items():
        print(f"{folder}: {name}: {number} annotations")
    return _Data(list(filter(questions.is_scored, examples)), list(map(str, errors)),
                 {name: float(number) for name, number in unscored.items()})


def _end(failed: dict[str, Exception], not_finite: int) -> None:
    """Ends the command with a sentence if a folder has no scores, or answers were not finite.

    Raises:
      ValueError: for what a user can correct. SystemExit: something else went wrong.
    """
    problems = [f"{folder} has no scores: {' '.join(str(error).split())[:_LONGEST]}"
                for folder, error in failed.items()]
    if not_finite:
        problems.append(f"{not_finite} records were left out because their logits were not finite")
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
