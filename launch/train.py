"""Trains a model, or resumes an interrupted run.

  python -m launch.train --gin_file=gin_configs/runs/quickstart.gin --workdir=runs/mine

Ctrl-C and SIGTERM save a checkpoint and end the run with status 75; the same command resumes it with the next
batch. If the disk is full or cannot be written, the run ends with status 74 and a message that names the
checkpoints that are kept. The work directory receives checkpoints, metrics.jsonl, TensorBoard files, the
tokenizer, and config.gin, the record of every setting. Paths in flags are relative to the current folder;
paths in gin files are relative to the root of the repository (in an installed package, to the current
folder). hosts/<index>.json records how each process ended; on SIGUSR1 a process prints the stacks of all its
threads. docs/training.md describes the other files and the monitoring of a run.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import pathlib
import signal
import sys
import tempfile
import traceback

import jax
import numpy as np
from absl import flags

from data_pipelines import pipeline
from launch import run
from launch.support import adapted
from launch.support import cli
from launch.support import evals
from launch.support import hosts
from launch.support import lock
from launch.support import notices
from launch.support import places
from launch.support import record
from launch.support import trained
from molmo2_jax import checkpoint
from molmo2_jax import files
from molmo2_jax import finetune
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax import train
from molmo2_jax import types
from molmo2_jax.attention import tree_mask
from molmo2_jax.hf import remote_code
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.monitor import exits
from molmo2_jax.monitor import guard
from molmo2_jax.monitor import profiling
from molmo2_jax.render import rows

_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "Steps FIRST:LAST to profile into <workdir>/profile, for TensorBoard or Perfetto.")
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder or gs:// URL that keeps compiled programs, so that a resumed run need "
    "not compile again. Default: ~/.cache/molmo2_jax/programs; with several hosts <workdir>/programs, which "
    "only the first host writes. Empty: no cache. JAX_COMPILATION_CACHE_DIR takes precedence.")
for _name in ("gin_file", "gin", "workdir", "init_from", "allow_missing", "cache", "traceback"):
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
    try:
        with lock.held(workdir), exits.spoken(workdir):
            _train(config, workdir, profile)
    except files.StorageError as error:
        if cli.TRACEBACK.value:
            traceback.print_exc()
        # At a normal exit, threads of the failed save would print after the message, and with several hosts
        # wait minutes for each other.
        cli.silence_threads()
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(cli.DISK_ERROR)


def _train(config: run.RunConfig, workdir, profile: tuple[int, int] | None) -> None:
    """Trains and exits with the status of an unfinished run.

    Raises:
      files.StorageError: the disk could not be written. SystemExit: the run diverged or was stopped.
    """
    try:
        start = first_params(config, cli.INIT_FROM.value, workdir)
        finished = fit(config, workdir, start, profile).finished
    except guard.Divergence as error:
        sys.exit(f"error: {error}")
    except files.StorageError:
        raise
    except Exception as error:  # any writer may be the first to hit a full disk
        explained = checkpoint.explain(str(workdir), error)
        if explained is None:
            raise
        raise explained from error
    if not finished:
        print("the same command continues")
        sys.exit(cli.UNFINISHED)


def _keep_programs(workdir) -> None:
    """Turns on jax's compilation cache, for programs that take a second or more to compile."""
    folder = _COMPILATION_CACHE.value
    if folder is None:
        folder = str(workdir / "programs") if jax.process_count() > 1 else "~/.cache/molmo2_jax/programs"
    if folder and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        folder = folder if files.is_remote(folder) else str(pathlib.Path(folder).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)


def fit(config: run.RunConfig, workdir: pathlib.Path, params=None,
        profile: tuple[int, int] | None = None) -> train.Result:
    """Trains the run that a RunConfig describes, or resumes it; returns the result of molmo2_jax.train.fit.

    `params` are the initial parameters; None: random ones. `workdir` must be absolute; it also receives the
    tokenizer, the record of all settings, and counts of the data read.

    Raises:
      ValueError: the settings, the data and the devices do not fit together. guard.Divergence: the loss or
        gradients are not finite, or spike.
    """
    with contextlib.chdir(places.base()):  # paths in configurations are relative to it
        tokenizer = tokenizers.Tokenizer.from_file(
            places.model(config.tokenizer), config.model.text.vocab_size)
        mesh = sharding.make_mesh(config.mesh, rows=config.micro_batch_rows)
        share, shares = sharding.row_share(mesh)
        with contextlib.closing(pipeline.make_iterator(
                config.data, config.model, config.inputs, tokenizer, shard_index=share,
                shard_count=shares)) as batches:
            hosts.check_same("records of each data set", batches.records)
            sharding.check_batch(mesh, config.data.batch_rows, config.data.row_tokens,
                                 config.train.accumulate)
            evaluate = evals.Evals(config, workdir, tokenizer, mesh) if config.evals else None
            if jax.process_index() == 0:
                with tempfile.TemporaryDirectory() as folder:
                    tokenizer.save(folder)
                    files.copy(files.path(folder), workdir)
                for line in record.save(workdir, record.gin_text(config)):
                    print(f"setting changed since the last start: {line}")
            try:
                result = train.fit(model_config=config.model, config=config.train, optimiser=config.optim,
                                   mesh=mesh, batches=batches, workdir=str(workdir), params=params,
                                   profile=profile, evaluate=evaluate,
                                   draw=functools.partial(_picture, config, tokenizer))
            except guard.Divergence as error:
                _write_texts(tokenizer, files.path(error.folder))
                raise
            _report(workdir, result, batches.counters())
    return result


def _picture(config: run.RunConfig, tokenizer: tokenizers.Tokenizer, batch: types.Batch) -> np.ndarray:
    """Returns the first row of a batch as uint8[h, w, 3]: its frames and its attention mask."""
    group = np.asarray(tree_mask.from_batch(batch, config.model.visual_attention).group)
    return rows.picture(batch, 0, group, tokenizer)


def first_params(config: run.RunConfig, start: str | None, workdir: pathlib.Path):
    """Returns the parameters of `start`, a work directory or Hugging Face folder; None if it is empty.

    A run with adapters always has a base, in the dtype of its computation: `start`, or when it resumes the
    one that it began with.

    Raises:
      ValueError: `start` holds no model, a model of other sizes, or one that marks frames in another way; or
        the adapters do not fit the model or the optimiser, there is no base, or it is another than before.
    """
    assert config.train and config.optim
    lora, kept, seen = config.train.lora, None, finetune.Fingerprint()
    mesh = sharding.make_mesh(config.mesh, rows=config.micro_batch_rows)
    if lora is not None:
        tx = optim.make(config.optim, config.train.steps)
        state.abstract(config.train.model(config.model), tx, mesh, lora)   # refuses mistakes at once
        start = adapted.begin(workdir, start, lora)
        store = functools.partial(finetune.stored, lora, dtype=config.train.dtype)
        kept = lambda path, leaf: store(path, seen.of(path, leaf))
    if not start:
        return None
    source = trained.load(start, mesh=mesh, kept=kept)
    wanted, got = (_sizes(dataclasses.asdict(model)) for model in (config.model, source.model))
    if wanted != got:
        raise ValueError(f"--init_from must hold a model with the sizes of this run, {wanted}; got {got}")
    markers = source.inputs.use_frame_special_tokens
    if markers != config.inputs.use_frame_special_tokens:
        raise ValueError("a run must mark frames as the model of --init_from does: bind "
                         f"config.InputConfig.use_frame_special_tokens = {markers}; got {not markers}")
    if lora is not None:
        adapted.keep(workdir, start, lora, seen.text())
    remote_code.write(remote_code.read(source.code), workdir / remote_code.NAME)
    return source.params


def _sizes(values: dict) -> dict:
    """Returns a model's settings without those that no parameter depends on."""
    free = ("init_std", "embedding_init_std", "position_init_std", "max_positions", "visual_attention",
            "visual_merge", "freeze_patch_row", "image_window", "video_window", "score_scale", "loss_weight",
            "raw_location_reference")
    return {name: _sizes(value) if isinstance(value, dict) else value
            for name, value in values.items() if name not in free}


def _write_texts(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path) -> None:
    """Writes the text of this host's rows of a saved batch next to them, as host_INDEX.txt."""
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
