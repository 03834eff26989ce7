"""A video with the points of an answer drawn on it, as a file for a client."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from molmo2_jax import render
from molmo2_jax.inputs import points as points_lib
from molmo2_jax.inputs import video as videos

_MOST_FPS = 30.0
_MOST_POINTS = 10_000


@dataclasses.dataclass(frozen=True)
class _Answer:
    points: tuple[points_lib.Point, ...]


def points_of(values: Sequence[Mapping[str, Any]]) -> tuple[points_lib.Point, ...]:
    """Returns the points of a video, given as objects with id, x, y in pixels and frame_time in seconds.

    Raises:
      ValueError: they are no such objects, or too many.
    """
    if not isinstance(values, list) or not 1 <= len(values) <= _MOST_POINTS:
        raise ValueError(f"points must be a list of 1 .. {_MOST_POINTS} objects")
    try:
        return tuple(points_lib.Point(float(one["frame_time"]), str(one["id"]), float(one["x"]),
                                      float(one["y"])) for one in values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("a point must have id, x, y and frame_time; "
                         f"{type(error).__name__}: {error}") from error


def mp4(video, points: Sequence[points_lib.Point]) -> bytes:
    """Returns an H.264 file of a video (anything that videos.read takes) with points at their times.

    Raises:
      MediaError: the video cannot be read.
    """
    fps = min(videos.index(video).fps, _MOST_FPS)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "points.mp4"
        render.save_answer(_Answer(tuple(points)), str(path), video=video, fps=fps)
        return path.read_bytes()
