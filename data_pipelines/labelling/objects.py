"""Marks on one medium -> points, tracks and masks of its record.

A box becomes the centre of its part inside the frame; a mask or a polygon the inner point farthest from its
edge, and stays as mask. An object of an image, or of one moment of a video, is a point. One with several
moments is a track, sampled at 0, 1/FPS, 2/FPS ... seconds: the mark of the frame on display, else between two
marks at most 1/FPS seconds apart; it is also a point, at the first of these times at which it is visible.
Integer ids of the tool are kept; other objects are numbered after them.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data_pipelines import masks
from data_pipelines.labelling import labels

FPS = 2             # points per second of a track, the recipe's rate
MODES = ("bare", "point_count")
XY = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Seen:
    """An opened medium: file, (width, height); of a video when each frame appears, and its duration."""
    path: pathlib.Path
    size: tuple[int, int]
    elapsed: np.ndarray | None = None
    duration: float = 0.0

    def frame(self, seconds: float) -> int:
        """Returns the number of the frame of a video on display."""
        assert self.elapsed is not None
        return max(int(np.searchsorted(self.elapsed, seconds + 1e-6, side="right")) - 1, 0)


class Placed(NamedTuple):
    """A mark in the frame: (x, y) in pixels, its mask if it has one; seconds is None in an image."""
    seconds: float | None
    xy: XY
    is_occluded: bool
    mask: dict | None


@dataclasses.dataclass(frozen=True)
class Described:
    """What a record says of a medium."""
    annotations: list[dict]
    masks: list[dict]
    points: int
    tracks: int


def describe(marks: Sequence[labels.Mark], seen: Seen, left_out: list[str]) -> Described:
    """Returns what a record says of a medium; appends to `left_out` a sentence per mark that is not used."""
    objects: dict[tuple[str, Hashable], list[Placed]] = {}
    first: dict[tuple[str, Hashable], str] = {}
    for number, mark in enumerate(marks):
        name = (mark.label, ("mark", number) if mark.key is None else mark.key)
        try:
            objects.setdefault(name, []).append(_placed(mark, seen))
            first.setdefault(name, mark.where)
        except ValueError as error:
            left_out.append(f"{mark.where}: {mark.label}: {error}")
    objects = {name: found for name, found in objects.items() if found}
    ids = _ids(objects)
    points: dict[str, list[dict]] = {}
    tracks: dict[str, list[dict]] = {}
    shapes: list[dict] = []
    for (label, key), found in objects.items():
        identity, moments = ids[label, key], sampled(found, seen)
        if not moments:
            left_out.append(f"{first[label, key]}: {label}: a track must have marks at most 1/{FPS} seconds "
                            f"apart around a multiple of 1/{FPS} seconds; got none")
        if len({one.seconds for one in found}) > 1 and moments:
            places = [_spot(one) | ({"occluded": True} if one.is_occluded else {}) for one in moments]
            tracks.setdefault(label, []).append({"id": identity, "points": places})
        visible = next((one for one in moments if not one.is_occluded or one.seconds is None), None)
        if visible:
            points.setdefault(label, []).append({"id": identity, **_spot(visible)})
        shapes += [one.mask | _when(one) | {"id": identity} for one in moments if one.mask]
    annotations: list[dict] = [{"type": "points", "label": label, "mode": list(MODES), "points": some}
                               for label, some in points.items()]
    annotations += [{"type": "tracks", "label": label, "fps": FPS, "tracks": some}
                    for label, some in tracks.items()]
    return Described(annotations, shapes, sum(map(len, points.values())), sum(map(len, tracks.values())))


def _when(one: Placed) -> dict:
    return {} if one.seconds is None else {"time": one.seconds}


def _spot(one: Placed) -> dict:
    return {**_when(one), "x": one.xy[0], "y": one.xy[1]}


def _ids(objects: Mapping[tuple[str, Hashable], object]) -> dict[tuple[str, Hashable], int]:
    """Returns an integer per object, all different: the tool's own, else the next ones above these."""
    keys = [key for _, key in objects]
    own = [_own_id(key) for key in keys]
    uses = collections.Counter(own)
    free = max((one for one in own if one is not None), default=0) + 1
    ids: dict[tuple[str, Hashable], int] = {}
    for name, identity in zip(objects, own, strict=True):
        if identity is None or uses[identity] > 1:
            identity, free = free, free + 1
        ids[name] = identity
    return ids


def _own_id(key: Hashable) -> int | None:
    is_number = isinstance(key, int) and key >= 0 or isinstance(key, str) and key.isascii() and key.isdigit()
    return int(key) if is_number else None  # type: ignore[call-overload]  # int or digits


def _placed(mark: labels.Mark, seen: Seen) -> Placed:
    """Returns the mark in the frame.

    Raises:
      ValueError: the mark is outside the frame, empty or not finite, or its moment is not in the video.
    """
    if not mark.label:
        raise ValueError("a label must have a name; got none")
    seconds = None if seen.elapsed is None else _seconds(mark, seen)
    width, height = seen.size
    scale = (1.0, 1.0) if mark.unit is None else (width / mark.unit[0], height / mark.unit[1])
    place = [value * scale[axis % 2] for axis, value in enumerate(mark.place)]
    if not all(map(math.isfinite, place)):
        raise ValueError(f"a place must be finite; got {mark.place}")
    mask = labels.polygon([place], width, height) if len(place) >= 6 else mark.mask
    if mask is not None:
        inside = _cut(masks.decode(mask), width, height)
        return Placed(seconds, inner_point(inside), mark.is_occluded, masks.encode(inside))
    x, y = place if len(place) == 2 else _centre(place, width, height)
    if not (0 <= x <= width and 0 <= y <= height):
        raise ValueError(f"a point must be inside the frame of {width} x {height}; got ({x:g}, {y:g})")
    return Placed(seconds, (round(x, 2), round(y, 2)), mark.is_occluded, None)


def _seconds(mark: labels.Mark, seen: Seen) -> float:
    """Returns when the frame of a mark appears, or the time of a mark."""
    assert seen.elapsed is not None
    if mark.frame is not None:
        if not 0 <= mark.frame < len(seen.elapsed):
            raise ValueError(f"a frame must be one of the {len(seen.elapsed)} of the video; got {mark.frame}")
        return float(seen.elapsed[mark.frame])
    if mark.time is None:
        raise ValueError("a label of a video must have a time or a frame; got neither")
    if not 0 <= mark.time <= seen.duration:
        raise ValueError(f"a time must be in the video, 0 to {seen.duration:g} seconds; got {mark.time:g}")
    return mark.time


def _centre(box: Sequence[float], width: int, height: int) -> XY:
    """Returns the centre of the part of a box that is inside the frame."""
    (x0, x1), (y0, y1) = sorted(box[::2]), sorted(box[1::2])
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        raise ValueError(f"a box must overlap the frame of {width} x {height}; got x {x0:g} to {x1:g}, "
                         f"y {y0:g} to {y1:g}")
    return (max(x0, 0) + min(x1, width)) / 2, (max(y0, 0) + min(y1, height)) / 2


def _cut(inside: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns a mask of the frame's size; that of a video made of frames lacks a last odd row or column."""
    rows, columns = inside.shape[0] - height, inside.shape[1] - width
    if rows not in (0, 1) or columns not in (0, 1):
        raise ValueError(f"a mask must have the frame's size, {width} x {height}; got {inside.shape[1]} x "
                         f"{inside.shape[0]}")
    return inside[:height, :width]


def inner_point(inside: np.ndarray) -> XY:
    """Returns (x, y) of the pixel of a mask bool[H, W] that is farthest from the mask's edge.

    Raises:
      ValueError: the mask is empty.
    """
    if not inside.any():
        raise ValueError("a mask must have a pixel inside the frame; got none")
    distance = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    return float(column), float(row)


def sampled(found: Sequence[Placed], seen: Seen) -> list[Placed]:
    """Returns the moments of an object for its record; of a track, at multiples of 1/FPS seconds."""
    if seen.elapsed is None:
        return list(found[:1])
    rows = sorted(found, key=lambda one: one.seconds)  # type: ignore[arg-type, return-value]  # of a video
    times = [one.seconds for one in rows]
    if len(set(times)) == 1:
        return [rows[0]._replace(seconds=round(times[0], 4))]  # type: ignore[arg-type]
    # of several marks while one frame is on display, the first
    at_frame = {seen.frame(one.seconds): one for one in reversed(rows)}  # type: ignore[arg-type]
    moments = []
    for step in range(math.ceil(seen.duration * FPS - 1e-9)):
        time = step / FPS
        one = at_frame.get(seen.frame(time)) or _between(rows, times, time)
        if one:
            moments.append(one._replace(seconds=time))
    return moments


def _between(rows: Sequence[Placed], times: Sequence, time: float) -> Placed | None:
    """Returns the place between the marks around a time, if they are at most 1/FPS seconds apart."""
    after = int(np.searchsorted(times, time))
    if not 0 < after < len(times) or times[after] - times[after - 1] > 1 / FPS + 1e-6:
        return None
    one, other = rows[after - 1], rows[after]
    share = (time - times[after - 1]) / (times[after] - times[after - 1])
    x, y = (round(a + (b - a) * share, 2) for a, b in zip(one.xy, other.xy, strict=True))
    return Placed(time, (x, y), one.is_occluded or other.is_occluded, None)
