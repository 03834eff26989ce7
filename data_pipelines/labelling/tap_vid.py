"""TAP-Vid files: a pickle of many videos, or an .npz of one, with tracked points.

Each video has `video` (uint8[T, H, W, 3], or T JPEG files), `points` (float[N, T, 2], x and y as fractions)
and `occluded` (bool[N, T]). Points have no names: all are labelled "point".

Source: github.com/google-deepmind/tapnet, tapvid.
"""

import functools
import io
import pathlib
import pickle
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from data_pipelines.labelling import labels

LABEL = "point"
_SAFE = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
         ("numpy._core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
         ("numpy._core.multiarray", "scalar"), ("numpy._core.numeric", "_frombuffer"),
         ("numpy.core.numeric", "_frombuffer"), ("_codecs", "encode")}


class _Unpickler(pickle.Unpickler):
    """Loads arrays and plain values only: any other name in a pickle could run code."""

    def find_class(self, module: str, name: str):
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        raise ValueError(f"a TAP-Vid pickle must hold arrays and plain values only; got {module}.{name}")


def read(path: pathlib.Path, media: pathlib.Path) -> Iterator[labels.Mark | ValueError]:
    """Yields the marks of every video; the videos are inside the file, so `media` is not used.

    Raises:
      ValueError: the file is no pickle or .npz of TAP-Vid.
    """
    del media
    for name, one in _videos(path).items():
        try:
            points, occluded = np.asarray(one["points"], float), np.asarray(one["occluded"], bool)
            if points.shape != (*occluded.shape, 2) or points.shape[1] != len(one["video"]):
                raise ValueError(f"points must be [N, T, 2] and occluded [N, T] with T = {len(one['video'])} "
                                 f"frames; got {points.shape} and {occluded.shape}")
        except (KeyError, TypeError, ValueError) as error:
            yield ValueError(f"{path.name}: {name}: {type(error).__name__}: {error}")
            continue
        medium = labels.Medium(pathlib.Path(str(name).replace("/", "_")), frames=functools.partial(
            _pictures, one["video"]))
        for number, (track, hidden) in enumerate(zip(points, occluded, strict=True)):
            for frame, (x, y) in enumerate(track):
                yield labels.Mark(medium, LABEL, (float(x), float(y)), f"{path.name}: {name}, point {number}",
                                  key=number, frame=frame, is_occluded=bool(hidden[frame]), unit=(1.0, 1.0))


def _videos(path: pathlib.Path) -> dict:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as content:
            return {path.stem: dict(content)}
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: must be a pickle of TAP-Vid; {type(error).__name__}: {error}") from error
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict) or not all(isinstance(one, dict) for one in content.values()):
        raise ValueError(f"{path}: must hold videos by name, or a list of them; got {type(content).__name__}")
    return content


def _pictures(video: Iterable) -> Iterator[np.ndarray]:
    for picture in video:
        yield (np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) if isinstance(picture, bytes)
               else np.asarray(picture))
