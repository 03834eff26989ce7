"""A trained model by the path a person gives: the work directory of a run, or a Hugging Face folder."""

import atexit
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from launch import places
from launch import record
from launch import run
from molmo2_jax import checkpoint
from molmo2_jax import config
from molmo2_jax import files
from molmo2_jax import state
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.hf import remote_code
from molmo2_jax.hf import shards
from molmo2_jax.hf import source
from molmo2_jax.hf import weights
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2


class Trained(NamedTuple):
    """All that is needed to answer questions. `params` is the parameter tree, without boxes.

    `code` is where the remote code lies that a Hugging Face folder came with, if it did. `is_pretraining`
    says whether it knows only the questions of the first stage (pipeline.DataConfig.is_pretraining).
    """
    model: config.Molmo2Config
    inputs: config.InputConfig
    tokenizer: tokenizers.Tokenizer
    params: Any
    code: pathlib.Path | None = None
    is_pretraining: bool = False


def load(path: str | pathlib.Path, bindings: Sequence[str] = (), mesh: jax.sharding.Mesh | None = None
         ) -> Trained:
    """Returns the newest checkpoint of a work directory, or the model in a Hugging Face folder.

    `bindings` change the settings of the run that a work directory records. With a `mesh` parameters are
    read straight onto their shards. A work directory may lie in a bucket ("gs://..."). The names of models
    that ship, such as "assets/nano", are found from any folder.

    Raises:
      ValueError: the folder is neither, or what it holds does not fit together.
    """
    path = places.model(os.fspath(path))
    folder, is_pretraining = _on_disk(path), False
    if (folder / record.NAME).is_file():
        run_config = run.resolve([(folder / record.NAME).resolve()], bindings)
        model, inputs = run_config.model, run_config.inputs
        is_pretraining = run_config.data is not None and run_config.data.is_pretraining
        params = checkpoint.load_params(str(path), molmo2.Molmo2(model), mesh)
        code = folder / remote_code.NAME
    elif (folder / "config.json").is_file():
        if bindings:
            raise ValueError(f"a Hugging Face folder takes no gin bindings; got {list(bindings)}")
        place = None if mesh is None else source.onto(_shardings(folder, mesh))
        params, model, inputs = hf_checkpoint.import_checkpoint(folder, place=place)
        code = folder
    else:
        shards.refuse_adapter(folder)
        raise ValueError("a model must be the work directory of a run (with config.gin) or a Hugging Face "
                         f"folder on this machine (with config.json); got {path}"
                         + ("" if files.path(path).exists() else ", which does not exist"))
    tokenizer = tokenizers.Tokenizer.from_file(folder, model.text.vocab_size)
    return Trained(model, inputs, tokenizer, params, code if code.is_dir() else None, is_pretraining)


def _on_disk(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the folder; of a run's in a bucket a copy that lives as long as the process, without arrays."""
    if not files.is_remote(path):
        return pathlib.Path(path)
    folder, copy = files.path(path), files.path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for name in (record.NAME, "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            (folder / name).copy(copy / name)
    if (folder / remote_code.NAME).is_dir():
        files.copy(folder / remote_code.NAME, copy / remote_code.NAME)
    return pathlib.Path(copy)


def _shardings(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> dict[str, jax.sharding.Sharding]:
    """Returns {path: sharding} of the model of a Hugging Face folder, and of a head even if it is tied."""
    model, _ = hf_checkpoint.read_config(folder)
    untied = dataclasses.replace(model, text=dataclasses.replace(model.text, tied_head=False))
    abstract = state.abstract_params(molmo2.Molmo2(untied), mesh)
    return {path: leaf.sharding for path, leaf in weights.flatten(abstract).items()}
