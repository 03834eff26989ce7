"""Scores a trained model on data folders: pointing, counting, tracking, multiple choice, questions.

  python -m launch.evaluate --model=runs/mine --data=runs/quickstart/data/heldout

--model is the work directory of a run or a Hugging Face folder; --workdir says the same. Settings of a run
can be changed with --gin, for example --gin='config.InputConfig.max_frames = 8'. The scores are printed, and
written to --output (JSON). Records that cannot be used are left out, counted and listed, as in training.
"""

import functools
from collections.abc import Sequence

from absl import flags

from data_pipelines import sources
from launch import cli
from launch import questions
from launch import trained
from molmo2_jax import evaluate
from molmo2_jax import files
from molmo2_jax import generate

_LIMIT = flags.DEFINE_integer("limit", None, "Only so many records of each folder.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 8, "Records answered at a time.", lower_bound=1)
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
    data = {folder: sources.read_folder(folder) for folder in folders}
    source = trained.load(cli.MODEL.value or cli.workdir(), cli.bindings())
    answerer = generate.Answerer(source.params, source.model, source.inputs, source.tokenizer,
                                 max_new_tokens=cli.MAX_NEW_TOKENS.value, dtype=cli.DTYPE.value)
    ask = functools.partial(questions.ask, is_pretraining=source.is_pretraining)
    scores = {}
    for folder, (examples, errors) in data.items():
        result = evaluate.evaluate(answerer, examples[:_LIMIT.value], ask, questions.score,
                                   rows=_ROWS.value, title=folder)
        left_out = [*map(str, errors), *result.refused]
        scores[folder] = {**result.scores, "records_left_out": len(left_out)}
        _show(folder, result, left_out)
    if output:
        output.write_text(files.to_json(scores, indent=1), encoding="utf-8")
        print(f"wrote {output}")


def _show(folder: str, result: evaluate.Result, left_out: Sequence[str]) -> None:
    print(f"{folder}: {len(result.answered)} answers in {result.seconds:.0f} s; "
          f"{len(left_out)} records left out")
    for name, value in result.scores.items():
        print(f"  {name:32s} {value:.4f}")
    for sentence in left_out:
        print(f"  left out: {sentence}")


if __name__ == "__main__":
    cli.start(main)
