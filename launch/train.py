"""Trains a model, or goes on where an interrupted run stopped.

  python -m launch.train --gin_file=gin_configs/runs/quickstart.gin --workdir=runs/mine

Ctrl-C and SIGTERM save and end the run with status 75; the same command continues it with the next
batch. The work directory receives checkpoints, metrics.jsonl, TensorBoard files, the tokenizer and
config.gin, the record of every setting. Paths in flags are relative to the current folder, paths in
configurations to the root of the repository.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
from absl import flags

from data_pipelines import pipeline
from launch import cli
from launch import hosts
from launch import record
from launch import run
from launch import trained
from molmo2_jax import sharding
from molmo2_jax import train
from molmo2_jax.hf import remote_code
from molmo2_jax.inputs import tokenizer as tokenizers

_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Work directory or Hugging Face folder whose weights the first step starts from.")
for _name in ("gin_file", "gin", "workdir", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    config, workdir = cli.resolve("tokenizer", "data", "optim", "train"), cli.workdir().absolute()
    hosts.join()
    if not fit(config, workdir, _first_params(config)).finished:
        print("the same command continues")
        sys.exit(cli.UNFINISHED)


def fit(config: run.RunConfig, workdir: pathlib.Path, params=None) -> train.Result:
    """Trains what a RunConfig describes, or goes on with it, and returns what molmo2_jax.train.fit does.

    `params` is where to start, if not from scratch. The work directory (absolute) also receives the
    tokenizer, the record of all settings, and counts of what was read.
    """
    with contextlib.chdir(run.ROOT):  # paths in configurations are relative to it
        tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer, config.model.text.vocab_size)
        mesh = sharding.make_mesh(config.mesh)
        share, shares = sharding.row_share(mesh)
        batches = pipeline.make_iterator(config.data, config.model, config.inputs, tokenizer,
                                         shard_index=share, shard_count=shares)
        sharding.check_batch(mesh, config.data.batch_rows, config.data.row_tokens)
        if jax.process_index() == 0:
            tokenizer.save(workdir)
            for line in record.save(workdir, record.gin_text(config)):
                print(f"setting changed since the last start: {line}")
        with contextlib.closing(batches):
            result = train.fit(
                model_config=config.model, config=config.train, optimiser=config.optim,
                mesh=mesh, batches=batches, workdir=str(workdir), params=params)
            _report(workdir, result, batches.counters())
    return result


def _first_params(config: run.RunConfig):
    """Returns the parameters of --init_from, or None to start from scratch."""
    if not _INIT_FROM.value:
        return None
    source = trained.load(_INIT_FROM.value, mesh=sharding.make_mesh(config.mesh))
    wanted, got = (_sizes(dataclasses.asdict(model)) for model in (config.model, source.model))
    if wanted != got:
        raise ValueError(f"--init_from must hold a model of the sizes of this run, {wanted}; got {got}")
    remote_code.write(remote_code.read(source.code), cli.workdir() / remote_code.NAME)
    return source.params


def _sizes(values: dict) -> dict:
    """Returns a model's values without those that no parameter depends on."""
    free = ("init_std", "embedding_init_std", "position_init_std", "max_positions", "visual_attention")
    return {name: _sizes(value) if isinstance(value, dict) else value
            for name, value in values.items() if name not in free}


def _report(workdir: pathlib.Path, result: train.Result, counters: dict) -> None:
    host = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
    (workdir / f"data_counters{host}.json").write_text(json.dumps(counters, indent=1), encoding="utf-8")
    if not result.finished:
        print(f"stopped and saved after step {int(result.state.step)}")


if __name__ == "__main__":
    cli.start(main)
