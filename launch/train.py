"""Trains a model, or goes on where an interrupted run stopped.

  python -m launch.train --gin_file=gin_configs/runs/quickstart.gin --workdir=runs/mine

Ctrl-C and SIGTERM save and end the run; the same command continues it with the next batch. The work
directory receives checkpoints, metrics.jsonl, TensorBoard files, the tokenizer and config.gin, the
record of every setting.
"""

import contextlib
import json
import pathlib

from absl import flags

from data_pipelines import pipeline
from launch import cli
from launch import record
from launch import run
from launch import trained
from molmo2_jax import sharding
from molmo2_jax import train
from molmo2_jax.inputs import tokenizer as tokenizers

_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Work directory or Hugging Face folder whose weights the first step starts from.")
flags.adopt_module_key_flags(cli)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    config = cli.resolve("tokenizer", "data", "optim", "train")
    workdir = cli.workdir()
    tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer, config.model.text.vocab_size)
    tokenizer.save(workdir)
    for line in record.save(workdir, record.gin_text(config)):
        print(f"setting changed since the last start: {line}")
    batches = pipeline.make_iterator(config.data, config.model, config.inputs, tokenizer)
    with contextlib.closing(batches):
        result = train.fit(
            model_config=config.model, config=config.train, optimiser=config.optim,
            mesh=sharding.make_mesh(config.mesh), batches=batches, workdir=str(workdir),
            params=_first_params(config))
        _report(workdir, result, batches.counters())


def _first_params(config: run.RunConfig):
    """Returns the parameters of --init_from, or None to start from scratch."""
    if not _INIT_FROM.value:
        return None
    source = trained.load(_INIT_FROM.value)
    if source.model != config.model:
        raise ValueError(f"--init_from must have the sizes of this run, {config.model}; "
                         f"got {source.model}")
    return source.params


def _report(workdir: pathlib.Path, result: train.Result, counters: dict) -> None:
    (workdir / "data_counters.json").write_text(json.dumps(counters, indent=1), encoding="utf-8")
    if not result.finished:
        print(f"stopped after step {int(result.state.step)}; the same command continues")


if __name__ == "__main__":
    cli.start(main)
