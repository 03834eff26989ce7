"""Checkpoint folders in the hub layout: read into our parameter tree, and written from it.

A folder is checked by its config and the headers of its shards before the first weight is read. Parameters
are read directly from the shards; `place` decides how much of a parameter is read at once, so a sharded
import never holds more than its devices need.
"""

import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
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
_VIT_LAYER = re.compile(r"model\.(?:vision_backbone\.image_)?vit\.transformer\.resblocks\.(\d+)\.")


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
      ValueError: as hf.config.read and hf.processor.read.
    """
    folder = pathlib.Path(folder)
    config = hf_config.read(processor.read_json(folder / "config.json"), str(folder / "config.json"))
    return processor.read(folder, config)


class Opened(NamedTuple):
    """A consistent folder; the only weights read are those compared to detect a tied head."""
    config: config_lib.Molmo2Config
    inputs: config_lib.InputConfig
    spelling: weights.Spelling
    source: source_lib.Source


def open_checkpoint(folder: str | pathlib.Path) -> Opened:
    """Returns the configs of a folder and a source of its parameters.

    Raises:
      ValueError: the folder is incomplete or broken, or its parts contradict each other; the message
        lists all problems of one kind.
    """
    folder = pathlib.Path(folder)
    config, inputs = read_config(folder)
    tensors = shards.open_folder(folder)
    spelling = _spelling(tensors, folder)
    heads = weights.head_names(config)
    if spelling == "native" and config.pointer is not None:
        raise ValueError("the tensors of a model with a pointer must have the released names, "
                         f"model.transformer...; {folder} has {sorted(tensors)[:3]}")
    has_head = any(name in tensors for name in heads)
    section = processor.read_json(folder / "config.json").get("vit_config") or {}
    declared = section.get("num_hidden_layers", 0)

    def source_of(config: config_lib.Molmo2Config) -> source_lib.Source:
        shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
        table = weights.entries(config, spelling)
        if config.text.tied_head and not has_head:
            table = [entry for entry in table if entry.tensors[0] not in heads]
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
        config = _with_head(config, tied=_head_is_table(source, config, spelling))
        if promised and not config.text.tied_head:
            raise ValueError(f"tie_word_embeddings is true, so {' and '.join(heads)} must equal the "
                             f"embedding; they differ in {folder}")
        source = source_of(config)
    return Opened(config, inputs, spelling, source)


def _with_head(config: config_lib.Molmo2Config, tied: bool) -> config_lib.Molmo2Config:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tied_head=tied))


def _head_is_table(source: source_lib.Source, config: config_lib.Molmo2Config, spelling: weights.Spelling
                   ) -> bool:
    """Returns whether the head equals the base table bit for bit, as in the released 4B; with a pointer, also
    the head of the added tokens their table."""
    names = weights.EMBEDDING.legacy if spelling == "legacy" else weights.EMBEDDING.native
    table = weights.Entry(weights.EMBEDDING.ours, names, "table", None)
    heads = weights.head_names(config)
    head = weights.Entry(("head", "new_head"), heads, "table", None)
    kinds = {source.tensors[name].dtype for name in (*names, *heads)}
    total = config.text.vocab_size + (config.text.additional_vocab_size if len(heads) > 1 else 0)
    if len(kinds) > 1:
        return False
    for first in range(0, total, _ROWS_COMPARED):
        last = min(first + _ROWS_COMPARED, total)
        if not np.array_equal(source.rows(head, first, last).view(np.uint8),
                              source.rows(table, first, last).view(np.uint8)):
            return False
    return True


def import_checkpoint(folder: str | pathlib.Path, dtype: str | Callable[[str], str] = "float32",
                      place: source_lib.Place | None = None
                      ) -> tuple[dict[str, Any], config_lib.Molmo2Config, config_lib.InputConfig]:
    """Returns (parameter tree without boxes, Molmo2Config, InputConfig) of a checkpoint folder.

    Args:
      dtype: of the parameters, "float32" or "bfloat16", or a function of their paths.
      place: creates the array of one parameter, e.g. directly on its shards (source.onto). None gives numpy
        arrays.

    Raises:
      ValueError: as open_checkpoint, before weights are read; or the dtype is neither.
    """
    config, inputs, _, source = open_checkpoint(folder)
    return weights.unflatten(source_lib.load(source, source.shapes, dtype, place)), config, inputs


def _pending(params: Mapping[str, Any], config: config_lib.Molmo2Config) -> list[shards.Pending]:
    """Returns the tensors of a model in the legacy spelling, each computed when it is written.

    Raises:
      ValueError: parameters are missing, left over or of another shape than the config's.
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
    is_left_out = config.pointer is not None and config.text.tied_head   # heads, as in the released folders
    for entry in weights.entries(config, "legacy"):
        if is_left_out and entry.tensors[0] in weights.head_names(config):
            continue
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
    """Returns `out_dir`, a folder that transformers, the released remote code and vLLM load; with a pointer,
    one that the released remote code of MolmoPoint loads.

    The folder gets its name only when it is complete. Besides the parameters, host memory holds a few rows of
    one tensor at a time. ViT layers after the last tap are left out, since no reader creates them.

    Args:
      params: the tree, boxed or not, of numpy arrays or of jax arrays that this process can read in full.
      dtype: of the stored tensors, "float32" or "bfloat16".
      overwrite: replace an existing folder; otherwise a folder that is not empty is refused.
      code_from: a folder whose remote-code files and `auto_map`s are copied, if it has them.

    Raises:
      ValueError: the hub format cannot represent this model, the tree does not fit the config, the tokenizer
        has another vocabulary, the dtype is neither, or out_dir is not empty.
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
            processor.write_tokenizer(folder, tokenizer, model_config)
        processor.write_json(folder / "config.json", values)
        remote_code.write(code, folder)
        if out.exists():
            out.rename(pathlib.Path(scratch) / "old")
        folder.rename(out)
    return out
