"""Trains a model, or goes on where an interrupted run stopped.

  python -m launch.train --gin_file=gin_configs/runs/quickstart.gin --workdir=runs/mine

Ctrl-C and SIGTERM save and end the run with status 75; the same command continues it with the next
batch. A disk that is full or cannot be written ends it with status 74 and a sentence that says what is kept.
The work directory receives checkpoints, metrics.jsonl, TensorBoard files, the tokenizer and config.gin, the
record of every setting. Paths in flags are relative to the current folder, paths in configurations to the
root of the repository (of an installed package, to the current folder). hosts/<index>.json says how each
process ended; SIGUSR1 makes one print the stacks of all its threads. docs/training.md describes what else a
run writes and watches.
"""

import contextlib
import dataclasses
import faulthandler
import json
import pathlib
import signal
import sys
import tempfile

import jax
from absl import flags

from data_pipelines import pipeline
from launch import cli
from launch import hosts
from launch import notices
from launch import places
from launch import record
from launch import run
from launch import trained
from molmo2_jax import checkpoint
from molmo2_jax import files
from molmo2_jax import guard
from molmo2_jax import last_words
from molmo2_jax import profiling
from molmo2_jax import sharding
from molmo2_jax import train
from molmo2_jax.hf import remote_code
from molmo2_jax.inputs import tokenizer as tokenizers

_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST steps to record into <workdir>/profile, for TensorBoard or Perfetto.")
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder of compiled programs, also gs://...; a run that resumes then need not "
    "compile again. Default: ~/.cache/molmo2_jax/programs; of a run on several hosts, of which only the "
    "first one writes, <workdir>/programs. Empty: none. JAX_COMPILATION_CACHE_DIR wins over it.")
for _name in ("gin_file", "gin", "workdir", "init_from", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    config, workdir = cli.resolve("tokenizer", "data", "optim", "train"), files.path(cli.workdir())
    profile = profiling.parse(_PROFILE_STEPS.value)
    hosts.join()
    _keep_programs(workdir)
    if jax.default_backend() == "tpu":
        notices.listen()
    faulthandler.enable(sys.__stderr__)
    faulthandler.register(signal.SIGUSR1, sys.__stderr__)
    with last_words.spoken(workdir):
        try:
            start = first_params(config, cli.INIT_FROM.value, workdir)
            finished = fit(config, workdir, start, profile).finished
        except guard.Divergence as error:
            sys.exit(f"error: {error}")
        except Exception as error:  # a full disk is reported by whatever wrote
            explained = checkpoint.explain(str(workdir), error)
            if explained is None:
                raise
            raise explained from error
        if not finished:
            print("the same command continues")
            sys.exit(cli.UNFINISHED)


def _keep_programs(workdir) -> None:
    """Makes jax keep programs that took a second or more to compile, and read them back."""
    folder = _COMPILATION_CACHE.value
    if folder is None:
        folder = str(workdir / "programs") if jax.process_count() > 1 else "~/.cache/molmo2_jax/programs"
    if folder and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        folder = folder if files.is_remote(folder) else str(pathlib.Path(folder).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)


def fit(config: run.RunConfig, workdir: pathlib.Path, params=None,
        profile: tuple[int, int] | None = None) -> train.Result:
    """Trains what a RunConfig describes, or goes on with it, and returns what molmo2_jax.train.fit does.

    `params` is where to start, if not from scratch. The work directory (absolute) also receives the
    tokenizer, the record of all settings, and counts of what was read.
    """
    with contextlib.chdir(places.base()):  # paths in configurations are relative to it
        tokenizer = tokenizers.Tokenizer.from_file(
            places.model(config.tokenizer), config.model.text.vocab_size)
        mesh = sharding.make_mesh(config.mesh)
        share, shares = sharding.row_share(mesh)
        batches = pipeline.make_iterator(config.data, config.model, config.inputs, tokenizer,
                                         shard_index=share, shard_count=shares)
        sharding.check_batch(mesh, config.data.batch_rows, config.data.row_tokens)
        if jax.process_index() == 0:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save(folder)
                files.copy(files.path(folder), workdir)
            for line in record.save(workdir, record.gin_text(config)):
                print(f"setting changed since the last start: {line}")
        with contextlib.closing(batches):
            try:
                result = train.fit(model_config=config.model, config=config.train, optimiser=config.optim,
                                   mesh=mesh, batches=batches, workdir=str(workdir), params=params,
                                   profile=profile)
            except guard.Divergence as error:
                _write_texts(tokenizer, files.path(error.folder))
                raise
            _report(workdir, result, batches.counters())
    return result


def first_params(config: run.RunConfig, start: str | None, workdir: pathlib.Path):
    """Returns the parameters of `start`, a work directory or Hugging Face folder; None for None."""
    if not start:
        return None
    source = trained.load(start, mesh=sharding.make_mesh(config.mesh))
    wanted, got = (_sizes(dataclasses.asdict(model)) for model in (config.model, source.model))
    if wanted != got:
        raise ValueError(f"--init_from must hold a model of the sizes of this run, {wanted}; got {got}")
    markers = source.inputs.use_frame_special_tokens
    if markers != config.inputs.use_frame_special_tokens:
        raise ValueError("a run must mark frames as the model of --init_from does: bind "
                         f"config.InputConfig.use_frame_special_tokens = {markers}; got {not markers}")
    remote_code.write(remote_code.read(source.code), workdir / remote_code.NAME)
    return source.params


def _sizes(values: dict) -> dict:
    """Returns a model's values without those that no parameter depends on."""
    free = ("init_std", "embedding_init_std", "position_init_std", "max_positions", "visual_attention",
            "visual_merge", "freeze_patch_row", "image_window", "video_window")
    return {name: _sizes(value) if isinstance(value, dict) else value
            for name, value in values.items() if name not in free}


def _write_texts(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path) -> None:
    """Writes what this host's rows of a kept batch say beside them."""
    name = f"host_{jax.process_index()}"
    batch = guard.load(folder / f"{name}.npz")
    texts = []
    for row in range(len(batch.tokens)):
        for place in sorted(set(zip(batch.example[row].tolist(), batch.branch[row].tolist())) - {(-1, -1)}):
            example, branch = place
            tokens = batch.tokens[row][(batch.example[row] == example) & (batch.branch[row] == branch)]
            kind = "root" if branch < 0 else f"branch {branch}"
            texts.append(f"row {row}, example {example}, {kind}:\n{tokenizer.decode(tokens)}\n")
    (folder / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")


def _report(workdir: pathlib.Path, result: train.Result, counters: dict) -> None:
    host = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
    (workdir / f"data_counters{host}.json").write_text(json.dumps(counters, indent=1), encoding="utf-8")
    if not result.finished:
        print(f"stopped and saved after step {int(result.state.step)}")


if __name__ == "__main__":
    cli.start(main)
