"""Points and tracks as text, both directions.

    <points coords="GROUP;GROUP;...">LABEL</points>      GROUP = INDEX ID X Y ID X Y ...
    <tracks coords="GROUP;GROUP;...">LABEL</tracks>

INDEX is an image number (from 1) or seconds with one decimal; X and Y are thousandths of width and height.
Point ids count through the whole answer, so the last one is the count; ids of tracks name objects.

Source: reference: olmo/preprocessing/point_formatter.py. Deliberate differences: coordinates are always
clipped to the frame (the reference misses some cases), groups are always in ascending order, and readers skip
a group whose index is not a number or not an image instead of raising.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

NONE = "There are none."
NO_TRACKS = "No tracks available."
SEPARATOR, PRETRAINING_SEPARATOR = ";", "\t"  # html-v2, html-v1

XY = tuple[float, float]
Group = tuple[float | int | str, Sequence[XY]]                # index, points
TrackFrame = tuple[float, Mapping[Hashable, XY | None]]       # seconds, object -> point or None if hidden


class Point(NamedTuple):
    """A parsed point: image number or seconds, id as written, position in pixels."""
    index: float  # type: ignore[assignment]  # hides tuple.index
    id: str
    x: float
    y: float


class Tracked(NamedTuple):
    """The parsed objects at one time: frame number, seconds, id -> (x, y) in pixels."""
    frame: int
    seconds: float
    points: dict[str, XY]


def time_text(value: float | int | str) -> str:
    """Returns seconds with one decimal: 1.25 -> "1.2", "01:02.30" -> "62.3"; integers have no decimal.

    Raises:
      ValueError: the time is negative, not finite, or text that is not [HH:]MM:SS.
    """
    if isinstance(value, str):
        try:
            parts = [float(part) for part in value.split(":")]
        except ValueError as error:
            raise ValueError(f"a time must be seconds or [HH:]MM:SS text; got {value!r}") from error
        value = float(sum(part * 60 ** place for place, part in enumerate(reversed(parts))))
    if isinstance(value, (int, np.integer)):
        text, value = str(int(value)), float(value)
    else:
        value = round(float(value), 1) + 0.0  # turns -0.0 into 0.0
        text = str(value)
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"a time must be >= 0 seconds and finite; got {text}")
    return text


def _seconds(index: float | int | str) -> float:
    return float(time_text(index)) if isinstance(index, str) else float(index)


def _thousandths(point: XY, scale: np.ndarray) -> tuple[int, int]:
    x, y = (float(value) / float(size) for value, size in zip(point, scale, strict=True))
    if not (np.isfinite(x) and np.isfinite(y)):
        raise ValueError(f"coordinates must be finite; got {tuple(point)}")
    return round(1000 * min(max(x, 0.0), 1.0)), round(1000 * min(max(y, 0.0), 1.0))


def _scales(scale, num_groups: int) -> np.ndarray:
    scales = np.asarray(scale, np.float64)
    if scales.ndim > 2 or scales.shape not in ((), (2,), (num_groups, 2)) or not np.all(scales > 0):
        raise ValueError("scale must be a number > 0, (width, height), or one such pair per group; "
                         f"got {scale!r}")
    return np.broadcast_to(scales, (num_groups, 2))


def _tag(name: str, groups: Sequence[str], label: str, separator: str, alt: str | None = None) -> str:
    attribute = "" if alt is None else f'alt="{alt}" '
    return f'<{name} {attribute}coords="{separator.join(groups)}">{label}</{name}>'


def format_points(groups: Sequence[Group], label: str, *, scale=100, separator: str = SEPARATOR,
                  alt: str | None = None) -> str:
    """Returns the bare tag, or "There are none.".

    groups: (index, points); a single image is [(1, points)]. Groups without points are omitted.
    scale: the coordinates of the lower right corner: 100 for percent, (width, height) for pixels, or one such
      pair per group.

    Raises:
      ValueError: a coordinate or time is not finite, or scale is not positive.
    """
    pairs = zip(groups, _scales(scale, len(groups)), strict=True)
    texts, number = [], 0
    for (index, points), size in sorted(pairs, key=lambda pair: _seconds(pair[0][0])):
        fields = []
        for x, y in sorted(_thousandths(point, size) for point in points):
            number += 1
            fields.append(f"{number} {x:03d} {y:03d}")
        if fields:
            texts.append(" ".join([time_text(index), *fields]))
    return _tag("points", texts, label, separator, alt) if texts else NONE


def _num_points(groups: Sequence[Group]) -> int:
    return sum(len(points) for _, points in groups)


def format_point_count(groups: Sequence[Group], label: str, write: Callable[..., str] = format_points, **how
                       ) -> str:
    """Returns "Counting the TAG shows a total of N.", or "There are none."; `write` makes the tag."""
    count = _num_points(groups)
    return f"Counting the {write(groups, label, **how)} shows a total of {count}." if count else NONE


def format_count_point(groups: Sequence[Group], label: str, write: Callable[..., str] = format_points, **how
                       ) -> str:
    """Returns "There are N TAG.", or "There are none."; `write` makes the tag."""
    count = _num_points(groups)
    return f"There are {count} {write(groups, label, **how)}." if count else NONE


def format_count(count: int) -> str:
    """Returns "N", or "There are none."."""
    return str(count) if count else NONE


def format_tracks(frames: Sequence[TrackFrame], label: str, *, scale, separator: str = SEPARATOR) -> str:
    """Returns the tag of tracks: objects are numbered in the order in which they become visible.

    Returns "No tracks available." without frames, and "" if every object is hidden in all of them; training
    should drop both. scale: (width, height) in pixels, or 100 for percent.

    Raises:
      ValueError: a coordinate or time is not finite, or scale is not positive.
    """
    if not frames:
        return NO_TRACKS
    size = _scales(scale, 1)[0]
    numbers, texts = {}, []
    for seconds, points in sorted(frames, key=lambda frame: _seconds(frame[0])):
        visible = sorted((_thousandths(point, size), order, name)
                         for order, (name, point) in enumerate(points.items()) if point is not None)
        for _, _, name in visible:
            numbers.setdefault(name, len(numbers) + 1)
        fields = sorted((numbers[name], place) for place, _, name in visible)
        if fields:
            text = " ".join(f"{number} {x:03d} {y:03d}" for number, (x, y) in fields)
            texts.append(f"{time_text(seconds)} {text}")
    return _tag("tracks", texts, label, separator) if texts else ""


def match_frames(frames: Sequence[TrackFrame], shown_seconds: Sequence[float] | np.ndarray,
                 tolerance: float = 0.01) -> list[TrackFrame]:
    """Returns the annotated frames whose times the model sees, within `tolerance` seconds."""
    shown = np.asarray(shown_seconds, np.float64)
    return [frame for frame in frames if np.any(np.abs(shown - _seconds(frame[0])) <= tolerance)]


def on_grid(frames: Sequence[TrackFrame], rate: float, tolerance: float = 0.01) -> list[TrackFrame]:
    """Returns the frames at multiples of 1/rate seconds, within `tolerance` seconds."""
    return [frame for frame in frames
            if abs(round(_seconds(frame[0]) * rate) / rate - _seconds(frame[0])) <= tolerance]


def start_end(frames: Sequence[TrackFrame]) -> list[TrackFrame]:
    """Returns frames in which each object is kept at its first and last annotated time only.

    An object hidden at one of the two times stays hidden there, so it is written once or not at all.
    """
    frames = sorted(frames, key=lambda frame: _seconds(frame[0]))
    first, last = {}, {}
    for place, (_, points) in enumerate(frames):
        for name in points:
            first.setdefault(name, place)
            last[name] = place
    kept = [(seconds, {name: point for name, point in points.items() if place in (first[name], last[name])})
            for place, (seconds, points) in enumerate(frames)]
    return [(seconds, points) for seconds, points in kept if points]


def start_point(frames: Sequence[TrackFrame], name: Hashable, rng=None,
                p_any: float = 0.2) -> tuple[float, XY] | None:
    """Returns the (seconds, point) from which to track one object; None if it is never visible.

    That is its first visible point; with `rng` (training), any visible one with probability `p_any`.
    """
    visible = [(_seconds(seconds), points[name])
               for seconds, points in sorted(frames, key=lambda frame: _seconds(frame[0]))
               if points.get(name) is not None]
    if not visible:
        return None
    place = 0
    if rng is not None and rng.uniform() < p_any:
        place = min(int(rng.uniform() * len(visible)), len(visible) - 1)
    return visible[place]


def later_than(frames: Sequence[TrackFrame], seconds: float) -> list[TrackFrame]:
    """Returns the frames strictly later than `seconds`: the answer to a single-point tracking question."""
    return [frame for frame in frames if _seconds(frame[0]) > seconds]


_TAG = re.compile(r'<(?:points|tracks).*? coords="([0-9\t:;,. ]+)"(?:/>|>([^<]*))')
_UNTERMINATED = re.compile(r'<(?:points|tracks).*? coords="([0-9\t:;,. ]+)\Z')
_GROUP = re.compile(r"(?:^|[\t:,;])([0-9.]+) ([0-9. ]+)")
_POINT = re.compile(r"([0-9]+) ([0-9]{3,4}) ([0-9]{3,4})")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def parse_points(text: str, width: float | None = None, height: float | None = None, *,
                 sizes: Sequence[tuple[float, float]] | None = None,
                 accept_unterminated: bool = False) -> list[Point]:
    """Returns the points of all tags in `text`, in pixels; text without well-formed tags gives [].

    Points outside the frame are dropped, duplicates are kept.
    sizes: (width, height) per image for an answer about several images, instead of width and height; groups
      with an index other than 1 ... n are skipped.
    accept_unterminated: also read a final tag that is cut off before its closing quote. Do not use it for
      reported metrics.

    Raises:
      ValueError: both or neither of (width and height) and sizes are given.
    """
    return [point for _, point in parse_labelled(text, width, height, sizes=sizes,
                                                 accept_unterminated=accept_unterminated)]


def parse_labelled(text: str, width: float | None = None, height: float | None = None, *,
                   sizes: Sequence[tuple[float, float]] | None = None,
                   accept_unterminated: bool = False) -> list[tuple[str, Point]]:
    """Returns the points of parse_points, each with the label of its tag; "" if that is cut off.

    Raises:
      ValueError: both or neither of (width and height) and sizes are given.
    """
    if (width is None or height is None) == (sizes is None):
        raise ValueError("points need either width and height or sizes to be read; "
                         f"got {(width, height)} and {sizes}")
    tags = _TAG.findall(text)
    if accept_unterminated:
        tags += [(coords, "") for coords in _UNTERMINATED.findall(text)]
    found = []
    for coords, label in tags:
        for index_text, body in _GROUP.findall(coords):
            index = _number(index_text)
            size = _size_of(index, width, height, sizes)
            if size is not None:
                found += [(label, point) for point in _points_of(index, body, size)]
    return found


def _size_of(index: float | None, width, height, sizes) -> tuple[float, float] | None:
    if index is None:
        return None
    if sizes is None:
        return width, height
    is_image = index.is_integer() and 1 <= index <= len(sizes)
    return sizes[int(index) - 1] if is_image else None


def _points_of(index: float, body: str, size: tuple[float, float]) -> list[Point]:
    width, height = size
    points = [Point(index, name, int(x) / 1000 * width, int(y) / 1000 * height)
              for name, x, y in _POINT.findall(body)]
    return [point for point in points if 0 <= point.x <= width and 0 <= point.y <= height]


def parse_tracks(text: str, width: float, height: float, fps: float) -> list[Tracked]:
    """Returns the tracked objects by time, ascending; frame = seconds x fps, rounded half to even.

    If an id occurs twice at one time, its first position is kept.
    """
    return tracks_of(parse_points(text, width, height), fps)


def tracks_of(found: Sequence[Point], fps: float) -> list[Tracked]:
    """Returns points of a video by time; see parse_tracks."""
    by_time: dict[float, dict[str, XY]] = {}
    for point in found:
        by_time.setdefault(point.index, {}).setdefault(point.id, (point.x, point.y))
    return [Tracked(round(seconds * fps), seconds, points) for seconds, points in sorted(by_time.items())]


_TOTAL = re.compile(r"a total of (\d{1,18})|the total number.*? is:? (\d{1,18})", re.DOTALL)
_COUNT_POINT = re.compile(r"there (?:are|is) (\d{1,18}) <(?:points|tracks) ")
_NO_COUNT = re.compile(r"(?:there (?:are|is) )?none\b")


def read_count_reference(text: str) -> int | None:
    """Returns the count by the reference's rule: a bare integer or "a total of N"; None if there is none.

    "There are none." and "There are 3 <points ...>." are None. Source: paper's video counting evaluation.
    """
    text = text.lower().strip().rstrip(".")
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    total = _TOTAL.search(text)
    return int(total.group(1) or total.group(2)) if total else None


def read_count(text: str) -> int | None:
    """Returns the count in any sentence that the functions above write; None if there is no count."""
    count = read_count_reference(text)
    text = text.lower().strip()
    if count is None and (found := _COUNT_POINT.match(text)):
        count = int(found.group(1))
    if count is None and _NO_COUNT.match(text):
        count = 0
    return count
