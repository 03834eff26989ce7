"""The safetensors format: reads tensors by byte range, writes shards one tensor at a time.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. Files
are read with `readinto`, not mapped, so that a checkpoint does not occupy host memory twice; they are written
without holding a whole shard.

Source: https://github.com/huggingface/safetensors (format section).
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from molmo2_jax.inputs import file_kind
from molmo2_jax.inputs import text_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".safetensors")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CHUNK = 1 << 26  # bytes of a tensor converted to torch's layout at a time
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns np.empty aligned to 64 bytes, which jax on CPU uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    data = np.empty(size + 64, np.uint8)
    start = -data.ctypes.data % 64
    return data[start:start + size].view(dtype).reshape(shape)


class Tensor(NamedTuple):
    """The place of a tensor on disk."""
    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Returns rows first .. last - 1, reading only their bytes.

        Raises:
          ValueError: the file ends before the tensor does.
        """
        last = self.shape[0] if last is None else last
        row = math.prod(self.shape[1:])
        out = empty((last - first, *self.shape[1:]), self.dtype)
        view = out.reshape(-1).view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + first * row * self.dtype.itemsize)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"a safetensors file must not shrink while it is read; {self.path}")
                done += count
        return out


def _header(path: pathlib.Path) -> tuple[dict, int]:
    """Returns (header, offset of the first data byte).

    Raises:
      ValueError: the file is truncated or not a safetensors file; the message names its type if known.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            what = file_kind.describe(path, is_binary=True) or (
                f"truncated or no safetensors file: its header length is {length} bytes; download it again")
            raise ValueError(f"a shard must be a complete safetensors file; {path} has {size} bytes and is "
                             f"{what}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            what = file_kind.describe(path)
            raise ValueError("a shard must have a JSON header; "
                             + (f"{path} is {what}" if what else f"{path}: {error}")) from error
        if not isinstance(header, dict):
            raise ValueError(f"a shard's header must be an object; {path} has {type(header).__name__}")
    header.pop("__metadata__", None)
    return header, 8 + length


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns {name: Tensor} of one file.

    Raises:
      ValueError: the file is truncated or no safetensors file, a tensor is not float32, float16 or bfloat16,
        or tensors overlap or leave gaps.
    """
    header, base = _header(path)
    size = path.stat().st_size
    found = {}
    for name, info in header.items():
        code, shape, first, last = _entry(name, info, path)
        if code not in DTYPES:
            raise ValueError(f"tensors must be one of {tuple(DTYPES)}; {name} in {path} is {code}")
        if last - first != math.prod(shape) * DTYPES[code].itemsize:
            raise ValueError(f"a tensor's bytes must fit its shape; {name} in {path}: {shape}, "
                             f"{last - first} bytes")
        found[name] = Tensor(path, DTYPES[code], shape, base + first)
    end = base + max((info["data_offsets"][1] for info in header.values()), default=0)
    if size < end:
        raise ValueError(f"a shard must be complete; {path} has {size} bytes, its header describes {end}: "
                         "download it again")
    # The format has no gaps: bytes that belong to no tensor, or to two, are damage.
    at = base
    for name, one in sorted(found.items(), key=lambda item: item[1].offset):
        if one.offset != at:
            raise ValueError(f"the tensors of a shard must be contiguous; {name} in {path} begins at "
                             f"byte {one.offset} instead of {at}")
        at += math.prod(one.shape) * one.dtype.itemsize
    if at != size:
        raise ValueError(f"a shard must end with its last tensor; {path} has {size} bytes instead of {at}")
    return found


def _entry(name: str, info: Any, path: pathlib.Path) -> tuple[str, tuple[int, ...], int, int]:
    """Returns (dtype, shape, first byte, byte after the last) of a header's entry.

    Raises:
      ValueError: the entry lacks one of these, or has another type.
    """
    try:
        code, shape, (first, last) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        sizes = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        sizes = [-1]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"a header must give dtype, shape and data_offsets; {name} in {path} has {info!r}")
    return code, shape, first, last


def refuse_adapter(folder: pathlib.Path) -> None:
    """Checks that a folder does not contain a PEFT adapter, which is incomplete without its base model.

    Raises:
      ValueError: it does.
    """
    if (folder / ADAPTER).is_file():
        raise ValueError(f"a model must be complete; {folder} contains a PEFT adapter ({ADAPTER}): import it "
                         "with its base (launch.convert import --model=BASE --adapter=FOLDER --output=...)")


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    """Returns {name: Tensor} of a checkpoint folder, sharded or not.

    Raises:
      ValueError: no weights, an adapter, missing shards, or tensors in other shards than the index says; the
        message lists all.
    """
    refuse_adapter(folder)
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            others = sorted(path.name for path in folder.glob("*") if path.suffix in _OTHER_WEIGHTS)
            raise ValueError(f"a checkpoint folder must hold {SINGLE} or {INDEX}; got {folder}" + (
                f" with {', '.join(others[:3])}: save the model again as safetensors" if others else ""))
        return open_file(folder / SINGLE)
    try:
        values = text_file.read_json(folder / INDEX)
    except ValueError as error:
        raise ValueError(f"{INDEX} must be JSON with a weight_map; {error}") from error
    try:
        where = dict(values["weight_map"])
        files = sorted(set(where.values()))
        outside = [file for file in files if pathlib.PurePath(file).name != file]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{INDEX} must be JSON with a weight_map; {folder}: {error!r}") from error
    if outside:
        raise ValueError(f"{INDEX} must name files of its folder; {folder}: {', '.join(outside)}")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"every shard of the index must exist; {folder} lacks {', '.join(missing)}")
    shards = {file: open_file(folder / file) for file in files}
    absent = [f"{name} in {file}" for name, file in where.items() if name not in shards[file]]
    if absent:
        raise ValueError(f"shards must contain the tensors of the index; {folder} lacks {', '.join(absent)}")
    extra = [f"{name} in {file}" for file, tensors in shards.items()
             for name in tensors if where.get(name) != file]
    if extra:
        raise ValueError(f"the index must name every tensor; {folder} also has {', '.join(extra)}")
    return {name: shards[file][name] for name, file in where.items()}


class Pending(NamedTuple):
    """A tensor to be written; `make` returns its parts, which are concatenated along axis 0."""
    name: str
    shape: tuple[int, ...]
    make: Callable[[], Sequence[np.ndarray]]


def write_file(path: pathlib.Path, tensors: Sequence[Pending], dtype: np.dtype) -> None:
    """Writes the tensors in order, one at a time, into one file."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in tensors:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, make in tensors:
            parts = make()
            assert (sum(map(len, parts)), *parts[0].shape[1:]) == tuple(shape), (name, shape)
            step = max(1, _CHUNK // (math.prod(shape[1:]) * dtype.itemsize))
            for part in parts:
                for first in range(0, len(part), step):
                    values = np.ascontiguousarray(part[first:first + step], dtype)
                    file.write(values.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_folder(folder: pathlib.Path, tensors: Sequence[Pending], dtype: np.dtype,
                 max_shard_bytes: float) -> None:
    """Writes the tensors in order, one at a time, into as many shards as needed, and the index.

    A single shard has no index, as in transformers. A tensor larger than the limit has a shard of its own.
    """
    shards: list[list[Pending]] = []
    room = 0.0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], dtype)
        return
    where = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, dtype)
        where |= {tensor.name: file for tensor in shard}
    total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
