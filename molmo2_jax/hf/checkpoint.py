"""Checkpoint folders in the hub layout: read into our parameter tree, and written from it.

Everything that can be wrong with a folder is found from its config and the headers of its shards, before
the first weight is read. Reading takes bytes straight from the shards; `place` decides how much of a
parameter is read at once, so a sharded import never holds more than what its devices need.
"""

import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax.hf import config as hf_config
from molmo2_jax.hf import processor
from molmo2_jax.hf import remote_code
from molmo2_jax.hf import shards
from molmo2_jax.hf import source as source_lib
from molmo2_jax.hf import weights
from molmo2_jax.inputs import tokenizer as tokenizer_lib

_ROWS_COMPARED = 4096
_VIT_LAYER = re.compile(r"model\.vision_backbone\.image_vit\.transformer\.resblocks\.(\d+)\.")


def _spelling(names: Iterable[str], folder: pathlib.Path) -> weights.Spelling:
    names = sorted(names)
    for spelling, prefix in (("legacy", "model.transformer."), ("native", "model.language_model.")):
        if any(name.startswith(prefix) for name in names):
            return spelling
    raise ValueError("tensors must be named model.transformer... or model.language_model...; "
                     f"{folder} has {names[:3]}")


def read_config(folder: str | pathlib.Path) -> tuple[config_lib.Molmo2Config, config_lib.InputConfig]:
    """Returns the configs of a checkpoint folder, from its JSON files alone.

    Raises:
      ValueError: what hf.config.read and hf.processor.read refuse.
    """
    folder = pathlib.Path(folder)
    config = hf_config.read(processor.read_json(folder / "config.json"), str(folder / "config.json"))
    return processor.read(folder, config)


class Opened(NamedTuple):
    """A folder whose parts fit each other; no weight has been read but those that tell a tied head."""
    config: config_lib.Molmo2Config
    inputs: config_lib.InputConfig
    spelling: weights.Spelling
    source: source_lib.Source


def open_checkpoint(folder: str | pathlib.Path) -> Opened:
    """Returns what a folder holds.

    Raises:
      ValueError: the folder is incomplete, broken, or its parts contradict each other; all findings of one
        kind in one message.
    """
    folder = pathlib.Path(folder)
    config, inputs = read_config(folder)
    tensors = shards.open_folder(folder)
    spelling = _spelling(tensors, folder)
    has_head = weights.HEAD.legacy[0] in tensors
    section = processor.read_json(folder / "config.json").get("vit_config") or {}
    declared = section.get("num_hidden_layers", 0)

    def source_of(config: config_lib.Molmo2Config) -> source_lib.Source:
        shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
        table = weights.entries(config, spelling)
        if config.text.tied_head and not has_head:
            table = [entry for entry in table if entry.tensors != weights.HEAD.legacy]
        return source_lib.Source(table, shapes, tensors)

    def is_spare_layer(name: str) -> bool:
        match = _VIT_LAYER.match(name)
        return bool(match) and config.vision.num_layers <= int(match[1]) < declared

    promised = config.text.tied_head
    config = _with_head(config, tied=promised and not has_head)
    source = source_of(config)
    problems = source.problems(is_spare_layer)
    if problems:
        raise ValueError(f"the tensors in {folder} must be those of its config.json: " + "; ".join(problems))
    if has_head:
        config = _with_head(config, tied=_head_is_base_table(source, config, spelling))
        if promised and not config.text.tied_head:
            raise ValueError("tie_word_embeddings is true, so lm_head.weight must equal the embedding of "
                             f"the base vocabulary; they differ in {folder}")
        source = source_of(config)
    return Opened(config, inputs, spelling, source)


def _with_head(config: config_lib.Molmo2Config, tied: bool) -> config_lib.Molmo2Config:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tied_head=tied))


def _head_is_base_table(source: source_lib.Source, config: config_lib.Molmo2Config,
                        spelling: weights.Spelling) -> bool:
    """Returns whether the head repeats the base table bit for bit, as in the released 4B."""
    names = weights.EMBEDDING.legacy if spelling == "legacy" else weights.EMBEDDING.native
    table = weights.Entry(weights.EMBEDDING.ours, names, "table", None)
    head = source.tensors[weights.HEAD.legacy[0]]
    if any(source.tensors[name].dtype != head.dtype for name in names):
        return False
    for first in range(0, config.text.vocab_size, _ROWS_COMPARED):
        last = min(first + _ROWS_COMPARED, config.text.vocab_size)
        if not np.array_equal(head.read(first, last).view(np.uint8),
                              source.rows(table, first, last).view(np.uint8)):
            return False
    return True


def import_checkpoint(folder: str | pathlib.Path, dtype: str = "float32",
                      place: source_lib.Place | None = None
                      ) -> tuple[dict[str, Any], config_lib.Molmo2Config, config_lib.InputConfig]:
    """Returns (parameter tree without boxes, Molmo2Config, InputConfig) of a checkpoint folder.

    Args:
      dtype: of the parameters, "float32" or "bfloat16".
      place: makes the array of one parameter, e.g. straight onto its shards (`onto`). None gives numpy
        arrays.

    Raises:
      ValueError: what open_checkpoint refuses, before weights are read.
    """
    config, inputs, _, source = open_checkpoint(folder)
    return weights.unflatten(source_lib.load(source, source.shapes, dtype, place)), config, inputs


def _pending(params: Mapping[str, Any], config: config_lib.Molmo2Config) -> list[shards.Pending]:
    """Returns the tensors of a model in the legacy spelling, to be computed when they are written.

    Raises:
      ValueError: the tree is not that of the config.
    """
    flat = weights.flatten(params)
    wanted = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    wrong = [f"{path} is {tuple(getattr(flat.get(path), 'shape', ())) if path in flat else 'missing'} "
             f"instead of {wanted.get(path, 'absent')}"
             for path in sorted(set(flat) | set(wanted))
             if path not in flat or path not in wanted or tuple(flat[path].shape) != wanted[path]]
    if wrong:
        raise ValueError("parameters must be those of the model's config: " + "; ".join(wrong))

    def part(path: str, entry: weights.Entry) -> np.ndarray:
        value = flat[path] if entry.layer is None else flat[path][entry.layer]
        return weights.to_torch(value, entry.layout)

    tensors = []
    for entry in weights.entries(config, "legacy"):
        names = source_lib.tensor_shapes(entry, wanted)
        groups = [[path] for path in entry.paths]
        if len(entry.tensors) < len(entry.paths):
            groups = [list(entry.paths)]
        makes = [lambda paths=paths, entry=entry: [part(path, entry) for path in paths] for paths in groups]
        tensors += map(shards.Pending, entry.tensors, names, makes)
    return tensors


def export_checkpoint(params: Mapping[str, Any], model_config: config_lib.Molmo2Config,
                      inputs_config: config_lib.InputConfig, tokenizer: tokenizer_lib.Tokenizer | None,
                      out_dir: str | pathlib.Path, dtype: str = "float32", max_shard_bytes: float = 5e9,
                      overwrite: bool = False, code_from: str | pathlib.Path | None = None) -> pathlib.Path:
    """Returns `out_dir`, a folder that transformers, the released remote code and vLLM load.

    It appears under its name only when complete. Beside the parameters, some rows of one tensor are held in
    host memory at a time. ViT layers that no tap reads are left out, since no reader would create them.

    Args:
      params: the tree, boxed or not, numpy or jax arrays that this process can read in full.
      dtype: of the stored tensors, "float32" or "bfloat16".
      overwrite: replace an existing folder; otherwise one that is not empty is refused.
      code_from: a folder whose remote-code files and `auto_map`s are passed on, if it has them.

    Raises:
      ValueError: the hub format cannot hold this model, the tree does not fit the config, or out_dir exists.
    """
    out = pathlib.Path(out_dir)
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"a checkpoint must go into a new or empty folder (or overwrite); got {out}")
    if tokenizer is not None and tokenizer.vocab_size != model_config.text.vocab_size:
        raise ValueError("the tokenizer must have the model's vocabulary of "
                         f"{model_config.text.vocab_size}; got {tokenizer.vocab_size}")
    kind = source_lib.dtype_of(dtype)
    tensors = _pending(params, model_config)
    values = hf_config.write(model_config, dtype, inputs_config.use_frame_special_tokens)
    files = processor.write(model_config, inputs_config)
    code = remote_code.read(code_from)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = pathlib.Path(scratch) / "new"
        folder.mkdir()
        shards.write_folder(folder, tensors, kind, max_shard_bytes)
        for name, content in files.items():
            processor.write_json(folder / name, content)
        if tokenizer is not None:
            processor.write_tokenizer(folder, tokenizer)
        processor.write_json(folder / "config.json", values)
        remote_code.write(code, folder)
        if out.exists():
            out.rename(pathlib.Path(scratch) / "old")
        folder.rename(out)
    return out
