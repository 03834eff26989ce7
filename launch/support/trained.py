"""Loads a trained model from the work directory of a run or from a Hugging Face folder."""

import atexit
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from launch import run
from launch.support import adapted
from launch.support import places
from launch.support import record
from molmo2_jax import checkpoint
from molmo2_jax import config
from molmo2_jax import decode
from molmo2_jax import files
from molmo2_jax import finetune
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.hf import remote_code
from molmo2_jax.hf import shards
from molmo2_jax.hf import source
from molmo2_jax.hf import weights
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2


class Trained(NamedTuple):
    """Everything needed to answer questions. `params` is the parameter tree, without Flax boxes.

    `code` is the folder of the remote code that came with a Hugging Face folder, if any. `is_pretraining`:
    the model knows only the questions of the first stage (pipeline.DataConfig.is_pretraining). `adapter`: if
    the folder holds adapters, which `params` contain already.
    """
    model: config.Molmo2Config
    inputs: config.InputConfig
    tokenizer: tokenizers.Tokenizer
    params: Any
    code: pathlib.Path | None = None
    is_pretraining: bool = False
    adapter: "Adapter | None" = None


class Adapter(NamedTuple):
    """What a run with adapters trained (finetune.py), and the note about its base."""
    params: Any
    note: adapted.Note


class Settings(NamedTuple):
    """What a model's folder says besides its parameters; `mesh` is that of the bindings, if they name one."""
    model: config.Molmo2Config
    inputs: config.InputConfig
    mesh: sharding.MeshConfig | None


def load(path: str | pathlib.Path, bindings: Sequence[str] = (),
         mesh: jax.sharding.Mesh | Callable[[Settings], jax.sharding.Mesh] | None = None,
         dtype: str | None = None, weights: str | None = None,
         kept: Callable[[str, Any], Any] | None = None) -> Trained:
    """Returns the newest checkpoint of a work directory, or the model in a Hugging Face folder.

    Adapters of a work directory are merged into their base, which is read from its own folder.

    A work directory may be in a bucket ("gs://..."). Models that are part of the package, such as
    "assets/nano", are found from any folder.

    Args:
      bindings: change the settings of the run that a work directory records.
      mesh: parameters are read directly onto their shards; or chooses the mesh, given the settings.
      dtype: of a computation; parameters are read in the dtype in which it stores them. None: float32.
      weights: "int8" stores matrices in 8 bits as soon as they are read, see decode.stored.
      kept: (path of a parameter, its array) -> what is returned in its place, instead of dtype and weights;
        needs a mesh.

    Raises:
      ValueError: the folder is neither, its parts do not fit together, the base of adapters is gone or is
        another one, or bindings are given for a Hugging Face folder.
    """
    path = places.model(os.fspath(path))
    folder, is_pretraining = _on_disk(path), False
    asked = dtype or weights or kept
    kept = kept or functools.partial(decode.stored, dtype=dtype or "float32", weights=weights)
    adapter = None
    if (folder / record.NAME).is_file():
        run_config = run.resolve([(folder / record.NAME).resolve()], bindings)
        model, inputs = run_config.model, run_config.inputs
        is_pretraining = run_config.data is not None and run_config.data.is_pretraining
        names_mesh = any("MeshConfig" in binding for binding in bindings)
        mesh = _chosen(mesh, Settings(model, inputs, run_config.mesh if names_mesh else None))
        note = adapted.read(folder)
        if note is not None:
            params, adapter = _merged(path, note, model, mesh, dtype)
            params = finetune.nested({path: kept(path, leaf) for path, leaf in finetune.flat(params).items()})
        else:
            params = checkpoint.load_params(str(path), molmo2.Molmo2(model), mesh,
                                            kept if asked not in (None, "float32") else None)
        code = folder / remote_code.NAME
    elif (folder / "config.json").is_file():
        if bindings:
            raise ValueError(f"a Hugging Face folder takes no gin bindings; got {list(bindings)}")
        mesh = _chosen(mesh, Settings(*hf_checkpoint.read_config(folder), None))
        params, model, inputs = hf_checkpoint.import_checkpoint(
            folder, functools.partial(decode.stored_dtype, dtype=dtype or "float32"),
            None if mesh is None else _placed(source.onto(_shardings(folder, mesh)), kept))
        code = folder
    else:
        shards.refuse_adapter(folder)
        raise ValueError("a model must be the work directory of a run (with config.gin) or a Hugging Face "
                         f"folder on this machine (with config.json); got {path}"
                         + ("" if files.path(path).exists() else ", which does not exist"))
    tokenizer = tokenizers.Tokenizer.from_file(folder, model.text.vocab_size)
    return Trained(model, inputs, tokenizer, params, code if code.is_dir() else None, is_pretraining, adapter)


def adapter(path: str | pathlib.Path) -> tuple[config.Molmo2Config, Adapter]:
    """Returns (model, what was trained) of a work directory with adapters; the base is not read.

    Raises:
      ValueError: it has none.
    """
    path = places.model(os.fspath(path))
    folder = _on_disk(path)
    note = adapted.read(folder)
    if note is None:
        raise ValueError("adapters must be in the work directory of a run that trained them, or of "
                         f"launch.convert import --adapter; got {path} without {adapted.NAME}")
    model = run.resolve([(folder / record.NAME).resolve()]).model
    return model, Adapter(checkpoint.load_params(str(path), molmo2.Molmo2(model), lora=note.lora), note)


def _merged(path, note: adapted.Note, model: config.Molmo2Config, mesh, dtype) -> tuple[Any, Adapter]:
    """Returns (the parameters with adapters merged, the adapters) of a work directory.

    Raises:
      ValueError: the base is gone, or is not the one that the adapters belong to.
    """
    try:
        base = load(note.base, mesh=mesh, dtype=dtype).params
    except ValueError as error:
        raise ValueError(f"the adapters in {path} need their base in {note.base} (or in another folder that "
                         f"{adapted.NAME} names): {error}") from error
    adapted.check(path, note, finetune.fingerprint(base))
    held = checkpoint.load_params(str(path), molmo2.Molmo2(model), mesh, lora=note.lora)
    frozen = {name: value for name, value in base.items() if name not in note.lora.full}
    return finetune.merged(note.lora, frozen, held), Adapter(held, note)


def _placed(place: source.Place, kept: Callable) -> source.Place:
    """Returns a `place` that gives what `kept(path, array)` makes of each array before the next is read."""
    return lambda path, *how: kept(path, place(path, *how))


def _chosen(mesh, settings: Settings) -> jax.sharding.Mesh | None:
    return mesh if mesh is None or isinstance(mesh, jax.sharding.Mesh) else mesh(settings)


def _on_disk(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the folder; for a bucket, a local copy without arrays that is deleted when the process ends."""
    if not files.is_remote(path):
        return pathlib.Path(path)
    copy = files.path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    copy_settings(files.path(path), copy)
    return pathlib.Path(copy)


def copy_settings(workdir, target) -> None:
    """Copies everything that a model consists of, but for its arrays, from one work directory to another."""
    for name in (record.NAME, adapted.NAME, "tokenizer.json", "tokenizer_config.json"):
        if (workdir / name).is_file():
            (workdir / name).copy(target / name, overwrite=True)
    if (workdir / remote_code.NAME).is_dir():
        files.copy(workdir / remote_code.NAME, target / remote_code.NAME)


def _shardings(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> dict[str, jax.sharding.Sharding]:
    """Returns {path: sharding} of the model in a Hugging Face folder, including a head even if it is tied."""
    model, _ = hf_checkpoint.read_config(folder)
    untied = dataclasses.replace(model, text=dataclasses.replace(model.text, tied_head=False))
    abstract = state.abstract_params(molmo2.Molmo2(untied), mesh)
    return {path: leaf.sharding for path, leaf in weights.flatten(abstract).items()}
