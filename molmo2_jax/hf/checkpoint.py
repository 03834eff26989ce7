"""Checkpoint folders in the hub layout: read into our parameter tree, and written from it.

Everything that can be wrong with a folder is found from its config and the headers of its shards, before
the first weight is read. Reading takes bytes straight from the shards; `place` decides how much of a
parameter is read at once, so a sharded import never holds more than what its devices need.
"""

import dataclasses
import json
import math
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax.hf import config as hf_config
from molmo2_jax.hf import processor
from molmo2_jax.hf import shards
from molmo2_jax.hf import weights
from molmo2_jax.inputs import tokenizer as tokenizer_lib

# read(index) -> the part of a parameter that a tuple of slices asks for.
Read = Callable[[tuple[slice, ...]], np.ndarray]
# place(path, shape, dtype, read) -> the array to put into the tree.
Place = Callable[[str, tuple[int, ...], np.dtype, Read], Any]

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_ROWS_COMPARED = 4096
_STRIP = 16  # float32 values in 64 bytes
# Parts of a SigLIP2 checkpoint that no Molmo2 model reads.
_SIGLIP2_UNUSED = re.compile(r"text_model\.|vision_model\.(head|post_layernorm)\.|logit_(scale|bias)$")
_VIT_LAYER = re.compile(r"(?:model\.vision_backbone\.image_vit\.transformer\.resblocks"
                        r"|vision_model\.encoder\.layers)\.(\d+)\.")


def _dtype(name: str) -> np.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {tuple(_DTYPES)}; got {name!r}")
    return _DTYPES[name]


def _layer_shape(shape: tuple[int, ...], entry: weights.Entry) -> tuple[int, ...]:
    return shape if entry.layer is None else shape[1:]


def _tensor_shapes(entry: weights.Entry, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns the shape of each tensor of an entry, by our parameters."""
    parts = [weights.torch_shape(_layer_shape(shapes[path], entry), entry.layout) for path in entry.paths]
    if len(entry.tensors) == len(parts):
        return parts
    return [(sum(part[0] for part in parts), *parts[0][1:])]


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, set[int]]:
    """Returns the rows of matrices laid one under the other, and their widths, one if they fit."""
    return sum(rows for rows, _ in shapes), {width for _, width in shapes}


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """Fills `out`; transposed values in strips of a cache line, which is four times as fast."""
    if values.flags.c_contiguous or values.ndim < 2:
        out[...] = values
        return
    # A split axis of a kernel, [in, heads, head_dim] or [heads, head_dim, out], is joined again.
    split = next((axis for axis in range(1, values.ndim)
                  if values.strides[axis - 1] != values.strides[axis] * values.shape[axis]), 1)
    count = math.prod(values.shape[:split])
    flat, source = out.reshape(count, -1), values.reshape(count, -1)
    for first in range(0, flat.shape[1], _STRIP):
        flat[:, first:first + _STRIP] = source[:, first:first + _STRIP]


class _Source:
    """Opened shards and which of their rows each parameter consists of."""

    def __init__(self, table: Iterable[weights.Entry], shapes: Mapping[str, tuple[int, ...]],
                 tensors: Mapping[str, shards.Tensor]):
        self.table, self.shapes, self.tensors = list(table), shapes, tensors
        # path -> per layer: the tensors of the entry, and our first row in them
        self.places: dict[str, list[tuple[weights.Entry, int]]] = {}
        for entry in self.table:
            first = 0
            for path in entry.paths:
                self.places.setdefault(path, []).append((entry, first))
                first += weights.rows(_layer_shape(shapes[path], entry), entry.layout)

    def problems(self, is_ignored: Callable[[str], bool]) -> list[str]:
        """Returns what is missing, misshapen or left over, in words."""
        missing, wrong, used = [], [], set()
        for entry in self.table:
            used.update(entry.tensors)
            absent = [name for name in entry.tensors if name not in self.tensors]
            missing += absent
            if absent:
                continue
            found = [self.tensors[name].shape for name in entry.tensors]
            wanted = _tensor_shapes(entry, self.shapes)
            # transformers saves both embedding tables as two equal halves; only their sum is fixed.
            is_table = entry.paths == weights.EMBEDDING.ours and all(len(shape) == 2 for shape in found)
            if is_table and _joined(found) == _joined(wanted):
                continue
            wrong += [f"{name} is {list(have)} instead of {list(want)}"
                      for name, have, want in zip(entry.tensors, found, wanted) if have != want]
        extra = sorted(name for name in self.tensors if name not in used and not is_ignored(name))
        return ([f"missing {', '.join(missing)}"] if missing else []) + wrong + (
            [f"unexpected {', '.join(extra)}"] if extra else [])

    def rows(self, entry: weights.Entry, first: int, last: int) -> np.ndarray:
        """Returns rows first .. last - 1 of the entry's tensors laid one under the other."""
        parts = []
        for name in entry.tensors:
            tensor = self.tensors[name]
            count = tensor.shape[0]
            if first < count and last > 0:
                parts.append(tensor.read(max(first, 0), min(last, count)))
            first, last = first - count, last - count
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_layer(self, path: str, place: tuple[weights.Entry, int], index: tuple[slice, ...]) -> np.ndarray:
        """Returns the part `index` of one layer's parameter; only the rows it touches are read."""
        entry, base = place
        shape, layout = list(_layer_shape(self.shapes[path], entry)), entry.layout
        # The axis of ours that runs along torch's rows, where a slice of it saves reading.
        axis = {"linear": 1, "merge": 2, "vector": 0, "table": 0, "convolution": 1}[layout]
        start, stop, _ = index[axis].indices(shape[axis])
        inner = math.prod(shape[axis + 1:]) if layout != "table" else 1
        values = self.rows(entry, base + start * inner, base + stop * inner)
        shape[axis] = stop - start
        rest = tuple(slice(None) if k == axis else part for k, part in enumerate(index))
        return weights.from_torch(values, tuple(shape), layout)[rest]

    def read(self, path: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Returns the part `index` of a parameter, layers stacked on axis 0."""
        shape, places = self.shapes[path], self.places[path]
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape))
        if places[0][0].layer is None:
            values = self.read_layer(path, places[0], index)
            if values.dtype == dtype and values.flags.c_contiguous:
                return values
            out = shards.empty(values.shape, dtype)
            _copy(out, values)
            return out
        out = shards.empty([len(range(*part.indices(size))) for part, size in zip(index, shape)], dtype)
        for layer, place in zip(out, places[index[0]]):
            _copy(layer, self.read_layer(path, place, index[1:]))
        return out


def _load(source: _Source, paths: Iterable[str], dtype: str, place: Place | None) -> dict[str, Any]:
    kind = _dtype(dtype)
    flat = {}
    for path in paths:
        read = lambda index, path=path: source.read(path, index, kind)
        shape = source.shapes[path]
        flat[path] = (read((slice(None),) * len(shape)) if place is None
                      else place(path, shape, kind, read))
    return flat


def _spelling(names: Iterable[str], folder: pathlib.Path) -> weights.Spelling:
    names = sorted(names)
    for spelling, prefix in (("legacy", "model.transformer."), ("native", "model.language_model.")):
        if any(name.startswith(prefix) for name in names):
            return spelling
    raise ValueError("tensors must be named model.transformer... or model.language_model...; "
                     f"{folder} has {names[:3]}")


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"a checkpoint folder must hold a readable {path.name}; {error}") from error


def _head_is_tied(config: config_lib.Molmo2Config, spelling: weights.Spelling,
                  tensors: Mapping[str, shards.Tensor]) -> bool:
    """Returns whether the head is the base table, bit for bit; the released 4B stores it twice.

    Raises:
      ValueError: config.json promises a tied head and the two differ.
    """
    names = weights.EMBEDDING.legacy if spelling == "legacy" else weights.EMBEDDING.native
    head = tensors.get(weights.HEAD.legacy[0])
    if head is None or any(name not in tensors for name in names):
        return config.text.tied_head
    V, table = config.text.vocab_size, weights.Entry(weights.EMBEDDING.ours, names, "table", None)
    total = sum(tensors[name].shape[0] for name in names)
    same = (head.shape == (V, config.text.width) and total >= V
            and all(tensors[name].shape[1:] == head.shape[1:] and tensors[name].dtype == head.dtype
                    for name in names))
    source = _Source((), {}, tensors)
    for first in range(0, V if same else 0, _ROWS_COMPARED):
        last = min(first + _ROWS_COMPARED, V)
        same = np.array_equal(head.read(first, last).view(np.uint8),
                              source.rows(table, first, last).view(np.uint8))
        if not same:
            break
    if config.text.tied_head and not same:
        raise ValueError("tie_word_embeddings is true, so lm_head.weight must equal the embedding of the "
                         "base vocabulary; they differ")
    return same


def read_config(folder: str | pathlib.Path) -> tuple[config_lib.Molmo2Config, config_lib.InputConfig]:
    """Returns the configs of a checkpoint folder, from its JSON files alone.

    Raises:
      ValueError: what hf.config.read and hf.processor.read refuse.
    """
    folder = pathlib.Path(folder)
    config = hf_config.read(_read_json(folder / "config.json"), str(folder / "config.json"))
    return processor.read(folder, config)


def import_checkpoint(folder: str | pathlib.Path, dtype: str = "float32", place: Place | None = None
                      ) -> tuple[dict[str, Any], config_lib.Molmo2Config, config_lib.InputConfig]:
    """Returns (parameter tree without boxes, Molmo2Config, InputConfig) of a checkpoint folder.

    Args:
      dtype: of the parameters, "float32" or "bfloat16".
      place: makes the array of one parameter, e.g. straight onto its shards with
        `lambda path, shape, dtype, read: jax.make_array_from_callback(shape, shardings[path], read)`.
        None gives numpy arrays.

    Raises:
      ValueError: the folder is incomplete, broken, or its parts contradict each other; found before
        weights are read, all findings of one kind in one message.
    """
    folder = pathlib.Path(folder)
    config, inputs = read_config(folder)
    tensors = shards.open_folder(folder)
    spelling = _spelling(tensors, folder)
    tied = _head_is_tied(config, spelling, tensors)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tied_head=tied))
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    table = list(weights.entries(config, spelling))
    if tied and weights.HEAD.legacy[0] not in tensors:
        table = [entry for entry in table if entry.tensors != weights.HEAD.legacy]
    source = _Source(table, shapes, tensors)
    section = _read_json(folder / "config.json").get("vit_config") or {}
    declared = section.get("num_hidden_layers", 0)

    def is_spare_layer(name: str) -> bool:
        match = _VIT_LAYER.match(name)
        return bool(match) and config.vision.num_layers <= int(match[1]) < declared

    problems = source.problems(is_spare_layer)
    if problems:
        raise ValueError(f"the tensors in {folder} must be those of its config.json: " + "; ".join(problems))
    flat = _load(source, shapes, dtype, place)
    return weights.unflatten(flat), config, inputs


def import_tower(folder: str | pathlib.Path, spelling: weights.Spelling, config: config_lib.Molmo2Config,
                 dtype: str = "float32", place: Place | None = None) -> dict[str, Any]:
    """Returns {path: array} of the parameters that a tower's own checkpoint gives, to start training from.

    Args:
      spelling: "qwen3" or "olmo3" (decoder, base table, head), or "siglip2" (ViT; the layers behind
        `config.vision.num_layers` and the text tower are left out).

    Raises:
      ValueError: the checkpoint is not the one `config` describes; all differences.
    """
    folder = pathlib.Path(folder)
    if spelling not in ("qwen3", "olmo3", "siglip2"):
        raise ValueError(f"a tower must be 'qwen3', 'olmo3' or 'siglip2'; got {spelling!r}")
    tensors = shards.open_folder(folder)
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    source = _Source(weights.entries(config, spelling), shapes, tensors)

    def is_unused(name: str) -> bool:
        if spelling != "siglip2":
            return config.text.tied_head and name == weights.HEAD.legacy[0]
        match = _VIT_LAYER.match(name)
        return bool(_SIGLIP2_UNUSED.match(name)) or (
            bool(match) and int(match[1]) >= config.vision.num_layers)

    problems = source.problems(is_unused)
    if problems:
        raise ValueError(f"{folder} must hold the {spelling} tower of the model: " + "; ".join(problems))
    return _load(source, source.places, dtype, place)


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
        names = _tensor_shapes(entry, wanted)
        if len(entry.tensors) == len(entry.paths):
            makes = [lambda path=path, entry=entry: part(path, entry) for path in entry.paths]
        else:
            makes = [lambda entry=entry: np.concatenate([part(path, entry) for path in entry.paths])]
        tensors += map(shards.Pending, entry.tensors, names, makes)
    return tensors


def _pass_on_code(source: pathlib.Path, folder: pathlib.Path, values: dict) -> None:
    """Copies the Python files of an imported folder, if its config.json refers to any."""
    auto_map = _read_json(source / "config.json").get("auto_map")
    if auto_map:
        values["auto_map"] = auto_map
        for file in sorted(source.glob("*.py")):
            shutil.copyfile(file, folder / file.name)


def export_checkpoint(params: Mapping[str, Any], model_config: config_lib.Molmo2Config,
                      inputs_config: config_lib.InputConfig, tokenizer: tokenizer_lib.Tokenizer | None,
                      out_dir: str | pathlib.Path, dtype: str = "float32", max_shard_bytes: float = 5e9,
                      overwrite: bool = False, code_from: str | pathlib.Path | None = None) -> pathlib.Path:
    """Returns `out_dir`, a folder that transformers, the released remote code and vLLM load.

    It appears under its name only when complete. One tensor is held in host memory at a time. ViT layers
    that no tap reads are left out, since no reader would create them.

    Args:
      params: the tree, boxed or not, numpy or jax arrays that this process can read in full.
      dtype: of the stored tensors, "float32" or "bfloat16".
      overwrite: replace an existing folder; otherwise one that is not empty is refused.
      code_from: an imported folder whose remote-code files and `auto_map` are passed on, if it has them.

    Raises:
      ValueError: the hub format cannot hold this model, the tree does not fit the config, or out_dir exists.
    """
    out = pathlib.Path(out_dir)
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"a checkpoint must go into a new or empty folder (or overwrite); got {out}")
    if tokenizer is not None and tokenizer.vocab_size != model_config.text.vocab_size:
        raise ValueError("the tokenizer must have the model's vocabulary of "
                         f"{model_config.text.vocab_size}; got {tokenizer.vocab_size}")
    kind = _dtype(dtype)
    tensors = _pending(params, model_config)
    values = hf_config.write(model_config, dtype)
    files = processor.write(model_config, inputs_config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = pathlib.Path(scratch) / "new"
        folder.mkdir()
        shards.write_folder(folder, tensors, kind, max_shard_bytes)
        for name, content in files.items():
            processor.write_json(folder / name, content)
        if tokenizer is not None:
            processor.write_tokenizer(folder, tokenizer)
        if code_from is not None:
            _pass_on_code(pathlib.Path(code_from), folder, values)
        processor.write_json(folder / "config.json", values)
        if out.exists():
            out.rename(pathlib.Path(scratch) / "old")
        folder.rename(out)
    return out
