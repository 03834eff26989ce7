"""Scores a trained model on data folders: pointing, counting, tracking, multiple choice, questions.

  python -m launch.evaluate --workdir=runs/mine --data=runs/quickstart/data/heldout

--workdir is the work directory of a run or a Hugging Face folder. Settings of the run can be changed
with --gin, for example --gin='config.InputConfig.max_frames = 8'. The scores are printed, and written
to --output.
"""

import functools
import json
import pathlib

from absl import flags

from data_pipelines import sources
from launch import cli
from launch import questions
from launch import trained
from molmo2_jax import evaluate
from molmo2_jax import generate

_DATA = flags.DEFINE_multi_string(
    "data", [], "Folder with annotations.jsonl (docs/data_format.md); may be repeated.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only so many records of each folder.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 8, "Records answered at a time.", lower_bound=1)
for _name in ("gin", "workdir", "max_new_tokens", "dtype", "output", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    if not _DATA.value:
        raise ValueError("--data must name at least one folder with annotations.jsonl")
    files = {folder: sources.read_jsonl(pathlib.Path(folder) / "annotations.jsonl")[:_LIMIT.value]
             for folder in _DATA.value}
    source = trained.load(cli.workdir(), cli.bindings())
    answerer = generate.Answerer(source.params, source.model, source.inputs, source.tokenizer,
                                 max_new_tokens=cli.MAX_NEW_TOKENS.value, dtype=cli.DTYPE.value)
    ask = functools.partial(questions.ask, is_pretraining=source.is_pretraining)
    scores = {}
    for folder, examples in files.items():
        result = evaluate.evaluate(answerer, examples, ask, questions.score,
                                   rows=_ROWS.value, title=folder)
        scores[folder] = dict(result.scores)
        _show(folder, result)
    if cli.OUTPUT.value:
        pathlib.Path(cli.OUTPUT.value).write_text(json.dumps(scores, indent=1), encoding="utf-8")


def _show(folder: str, result: evaluate.Result) -> None:
    print(f"{folder}: {len(result.answered)} answers in {result.seconds:.0f} s")
    for name, value in result.scores.items():
        print(f"  {name:32s} {value:.4f}")
    for sentence in result.refused:
        print(f"  left out: {sentence}")


if __name__ == "__main__":
    cli.start(main)
