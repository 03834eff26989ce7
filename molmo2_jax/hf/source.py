"""Reads parameters, or parts of them, from opened shards; only the rows of the part are read."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from molmo2_jax.hf import shards
from molmo2_jax.hf import weights

# read(index) -> the part of a parameter selected by a tuple of slices.
Read = Callable[[tuple[slice, ...]], np.ndarray]
# place(path, shape, dtype, read) -> the array of one parameter.
Place = Callable[[str, tuple[int, ...], np.dtype, Read], Any]

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STRIP = 16  # float32 values in 64 bytes
_CHUNK = 1 << 26  # bytes read at a time, where they must be converted
# The axis of our parameter that runs along torch's rows: slicing it saves reading.
_ROW_AXIS = {"linear": 1, "merge": 2, "vector": 0, "table": 0, "convolution": 1}


def dtype_of(name: str) -> np.dtype:
    """Returns the numpy dtype of "float32" or "bfloat16".

    Raises:
      ValueError: the name is neither.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {tuple(_DTYPES)}; got {name!r}")
    return _DTYPES[name]


def _all(size: int) -> slice:
    return slice(0, size, 1)


def _layer_shape(shape: tuple[int, ...], entry: weights.Entry) -> tuple[int, ...]:
    return shape if entry.layer is None else shape[1:]


def tensor_shapes(entry: weights.Entry, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns the shape of each tensor of an entry, from the shapes of our parameters."""
    parts = [weights.torch_shape(_layer_shape(shapes[path], entry), entry.layout) for path in entry.paths]
    if len(entry.tensors) == len(parts):
        return parts
    return [(sum(part[0] for part in parts), *parts[0][1:])]


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, set[int]]:
    """Returns the total rows of matrices, and the set of their widths, a single one if they concatenate."""
    return sum(rows for rows, _ in shapes), {width for _, width in shapes}


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """Fills `out`; transposed values are copied in strips of a cache line, which is four times as fast."""
    if values.flags.c_contiguous or values.ndim < 2:
        out[...] = values
        return
    # Join the split axis of a kernel, [in, heads, head_dim] or [heads, head_dim, out].
    split = next((axis for axis in range(1, values.ndim)
                  if values.strides[axis - 1] != values.strides[axis] * values.shape[axis]), 1)
    count = math.prod(values.shape[:split])
    flat, source = out.reshape(count, -1, copy=False), values.reshape(count, -1)
    for first in range(0, flat.shape[1], _STRIP):
        flat[:, first:first + _STRIP] = source[:, first:first + _STRIP]


class Source:
    """Opened shards, and which of their rows make up each parameter."""

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
        """Returns which tensors are missing, of another shape or unused, in words."""
        missing, wrong, used = [], [], set()
        for entry in self.table:
            used.update(entry.tensors)
            absent = [name for name in entry.tensors if name not in self.tensors]
            missing += absent
            if absent:
                continue
            found = [self.tensors[name].shape for name in entry.tensors]
            wanted = tensor_shapes(entry, self.shapes)
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
        """Returns rows first .. last - 1 of the entry's tensors, concatenated along axis 0."""
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
        axis = _ROW_AXIS[layout]
        start, stop, _ = index[axis].indices(shape[axis])
        inner = math.prod(shape[axis + 1:]) if layout != "table" else 1
        values = self.rows(entry, base + start * inner, base + stop * inner)
        shape[axis] = stop - start
        rest = tuple(slice(None) if k == axis else part for k, part in enumerate(index))
        return weights.from_torch(values, tuple(shape), layout)[rest]

    def _fill(self, out: np.ndarray, path: str, place: tuple[weights.Entry, int],
              index: tuple[slice, ...]) -> None:
        """Writes the part `index` of one layer's parameter into `out`, some rows at a time."""
        entry = place[0]
        axis, tensor = _ROW_AXIS[entry.layout], self.tensors[entry.tensors[0]]
        start, stop, _ = index[axis].indices(_layer_shape(self.shapes[path], entry)[axis])
        total = math.prod(_layer_shape(self.shapes[path], entry)) * tensor.dtype.itemsize
        step = max(1, _CHUNK * (stop - start) // max(total, 1))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part = (*index[:axis], slice(first, last), *index[axis + 1:])
            target = out[(slice(None),) * axis + (slice(first - start, last - start),)]
            _copy(target, self.read_layer(path, place, part))

    def read(self, path: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Returns the part `index` of a parameter, layers stacked on axis 0."""
        shape, places = self.shapes[path], self.places[path]
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape))
        entry = places[0][0]
        is_stack = entry.layer is not None
        has_whole_rows = entry.layout in ("table", "vector") and index[1:] == tuple(map(_all, shape[1:]))
        if not is_stack and has_whole_rows and self.tensors[entry.tensors[0]].dtype == dtype:
            return self.read_layer(path, places[0], index)
        out = shards.empty([len(range(*part.indices(size))) for part, size in zip(index, shape)], dtype)
        for one, place in zip(out, places[index[0]]) if is_stack else [(out, places[0])]:
            self._fill(one, path, place, index[1:] if is_stack else index)
        return out


def onto(shardings: Mapping[str, jax.sharding.Sharding]) -> Place:
    """Returns a `place` that creates each parameter on its shards and reads only those of this process.

    A part that several devices hold is read once.
    """
    def place(path: str, shape: tuple[int, ...], dtype: np.dtype, read: Read) -> jax.Array:
        parts: dict[tuple, np.ndarray] = {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            key = tuple((one.start, one.stop) for one in index)
            if key not in parts:
                parts[key] = read(index)
            return parts[key]

        return jax.make_array_from_callback(shape, shardings[path], part)
    return place


def load(source: Source, paths: Iterable[str], dtype: str | Callable[[str], str], place: Place | None
         ) -> dict[str, Any]:
    """Returns {path: array}, arrays by `place`, or numpy arrays without it.

    Args:
      dtype: of all parameters, or a function of the path.

    Raises:
      ValueError: a dtype is unknown, or a file is shorter than its header says.
    """
    flat = {}
    for path in paths:
        kind = dtype_of(dtype if isinstance(dtype, str) else dtype(path))
        read = lambda index, path=path, kind=kind: source.read(path, index, kind)
        shape = source.shapes[path]
        flat[path] = (read((slice(None),) * len(shape)) if place is None
                      else place(path, shape, kind, read))
    return flat
