"""One class per kind of annotation, and its reader from JSON.

Attributes have the names of the JSON fields (docs/data_format.md), and every field is validated. Times are
seconds from the start of the clip. Images are numbered from 1. Coordinates are in units of `scale`, the
coordinates of the right and the lower edge of the frame, or in pixels if `scale` is None; `relative` converts
them to fractions.

To add a kind: a subclass of Annotation, and rows in _READERS here, formats.ASK and scoring.suite.SCORES.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from data_pipelines import fields
from data_pipelines import masks
from molmo2_jax import types

POINT_MODES = ("bare", "point_count", "count_point", "count")
TRACK_MODES = ("per_frame", "start_end", "single_point")
CLIP_TOLERANCE = 0.01   # seconds by which an annotated time may lie outside its clip
TIME_TOLERANCE = 0.01   # seconds within which an annotated and a shown time are the same
HIGHEST_RATE = 1000     # points per second

Size = tuple[int, int]  # (width, height) in pixels


# Points, tracks and masks are numerous: named tuples are the cheapest to build and to pickle.

class Point(NamedTuple):
    """A location of object `id`, at a time of a video or in an image. Only tracks set `occluded`."""
    id: int
    x: float
    y: float
    time: float | None = None
    image: int | None = None
    occluded: bool = False

    @property
    def place(self) -> int:
        """Returns the index of its medium in the sizes of a Media."""
        return 0 if self.image is None else self.image - 1


class Track(NamedTuple):
    """The points of one object, at distinct times."""
    id: int
    points: tuple[Point, ...]


class Mask(NamedTuple):
    """The pixels of object `id`, at a time of a video or in an image: run lengths as in masks.py."""
    id: int
    size: tuple[int, int]     # (height, width)
    counts: tuple[int, ...]
    time: float | None = None
    image: int | None = None

    def decode(self) -> np.ndarray:
        """Returns bool[H, W]."""
        return masks.decode({"size": self.size, "counts": self.counts})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
    """Fields common to all kinds. `type` is the name of the kind in JSON.

    prompt: replaces the question. weight: replaces the recipe's loss weight.
    """
    type: ClassVar[str]
    prompt: str | Mapping[str, str] | tuple[str, ...] | None = None
    weight: types.LossWeight | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points(Annotation):
    """Locations of all objects that `label` names; no points means there are none.

    sizes: of each image or of the video, if the record declares them. masks: all masks of the record.
    modes: some of POINT_MODES; each use draws one. prompt: one text, one per mode, or several of which each
    use draws one. prompt_share: of the uses in training that are asked with a prompt.
    """
    type: ClassVar[str] = "points"
    label: str
    points: tuple[Point, ...]
    scale: tuple[float, float] | None = None
    sizes: tuple[Size, ...] | None = None
    masks: tuple[Mask, ...] = ()
    modes: tuple[str, ...] = ("bare",)
    style: str | None = None
    prompt: str | Mapping[str, str] | tuple[str, ...] | None = None
    prompt_share: float = 1.0

    @property
    def mode(self) -> str:
        """Returns the mode used outside training."""
        return self.modes[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracks(Annotation):
    """Trajectories of all objects that `label` names. mode: one of TRACK_MODES. fps: points per second."""
    type: ClassVar[str] = "tracks"
    label: str
    tracks: tuple[Track, ...]
    scale: tuple[float, float] | None = None
    sizes: tuple[Size, ...] | None = None
    masks: tuple[Mask, ...] = ()
    mode: str = "per_frame"
    fps: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count(Annotation):
    """The number of objects that `label` names."""
    type: ClassVar[str] = "count"
    label: str
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class QA(Annotation):
    """A free-form answer to a question, which may have several wordings."""
    type: ClassVar[str] = "qa"
    question: str | tuple[str, ...]
    answer: str
    style: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Annotation):
    """A conversation: user, model, user, model, ..."""
    type: ClassVar[str] = "chat"
    turns: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(Annotation):
    """A multiple-choice question; `answer` is the index of an option.

    shuffle: training draws the order of the options. labelled: options are shown as "A. text".
    """
    type: ClassVar[str] = "choice"
    question: str
    options: tuple[str, ...]
    answer: int
    shuffle: bool = False
    labelled: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption(Annotation):
    """A description, or several of which each use draws one. length: "long" or "short".

    It describes the moment `time`, the interval from `start` to `end`, or `object`, where they are given.
    """
    type: ClassVar[str] = "caption"
    text: str | tuple[str, ...]
    length: str = "long"
    style: str | None = None
    time: float | None = None
    start: float | None = None
    end: float | None = None
    object: str | None = None


def relative(annotation: Points | Tracks, point: Point, media: types.Media) -> tuple[float, float]:
    """Returns (x, y) of a point as fractions of the width and height of its image or frame.

    Raises:
      ValueError: the point lies outside, or the declared size differs from that of the media.
    """
    size, declared = media.sizes[point.place], annotation.sizes
    if declared is not None and declared[point.place] != size:
        raise ValueError(f"the declared size must be that of the media, {size}; got {declared[point.place]}")
    width, height = annotation.scale or size
    if not (0 <= point.x <= width and 0 <= point.y <= height):
        raise ValueError(f"a point must lie inside the frame of {width} x {height}; got {(point.x, point.y)}")
    return point.x / width, point.y / height


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """The media of one record, which its annotations refer to.

    clip: (start, end) in seconds. sizes: of each image or of the video; None if not declared.
    """
    num_images: int
    is_video: bool
    clip: tuple[float, float] | None
    sizes: tuple[Size, ...] | None
    masks: tuple[Mask, ...] = ()

    @property
    def has_media(self) -> bool:
        """Returns whether there is a video or an image."""
        return self.is_video or self.num_images > 0

    def where(self, point: Mapping, field: str) -> tuple[float | None, int | None]:
        """Returns (seconds from the clip's start, None) of a point or mask in a video, else (None, image).

        Raises:
          ValueError: the time or the image is missing, not allowed or out of range.
        """
        if self.is_video:
            fields.require("image" not in point, f"{field}.image", "must only be given with images",
                           point.get("image"))
            fields.require("time" in point, f"{field}.time", "must be given for a video", None)
            return self.time(point["time"], f"{field}.time"), None
        fields.require("time" not in point, f"{field}.time", "must only be given with a video",
                       point.get("time"))
        fields.require("image" in point or self.num_images == 1, f"{field}.image",
                       "must be given unless there is exactly one image", None)
        image = point.get("image", 1)
        fields.require(fields.is_int(image) and 1 <= image <= self.num_images, f"{field}.image",
                       f"must be an integer from 1 to {self.num_images}", image)
        return None, image

    def time(self, seconds: Any, field: str) -> float:
        """Returns seconds from the clip's start.

        Raises:
          ValueError: the time lies outside the clip by more than CLIP_TOLERANCE, or is negative.
        """
        start, end = self.clip or (0.0, math.inf)
        fields.number(seconds, field, low=0.0)
        fields.require(start - CLIP_TOLERANCE <= seconds <= end + CLIP_TOLERANCE, field,
                       f"must lie in the clip from {start} to {end} seconds", seconds)
        return max(float(seconds) - start, 0.0)

    def position(self, point: Mapping, field: str, scale, image: int = 1) -> tuple[float, float]:
        """Returns (x, y) of a point in the frame.

        Raises:
          ValueError: a coordinate is missing, or outside the frame where its size is known.
        """
        limits = scale or (self.sizes[image - 1] if self.sizes else (math.inf, math.inf))
        for axis, limit in zip("xy", limits):
            fields.require(axis in point, f"{field}.{axis}", "must be given", None)
            fields.number(point[axis], f"{field}.{axis}")
            fields.require(0 <= point[axis] <= limit, f"{field}.{axis}",
                           f"must lie inside the frame, 0 to {limit}", point[axis])
        return float(point["x"]), float(point["y"])


def read(value: Any, field: str, scope: Scope, shared: Mapping[str, Any]) -> Annotation:
    """Returns the annotation of a parsed JSON object; `shared` holds the defaults of its record.

    Raises:
      ValueError: a field breaks the format; the message names the field, the rule and the value.
    """
    fields.require(isinstance(value, dict), field, "must be an object", value)
    name = value.get("type")
    is_known = isinstance(name, str) and name in KINDS
    fields.require(is_known, f"{field}.type", f"must be one of {', '.join(KINDS)}", name)
    kind = KINDS[name]
    required, optional, read_kind = _READERS[kind]
    fields.check_object(value, field, ("type", "weight", "prompt", *required, *optional), required=required)
    merged = {**{k: v for k, v in shared.items() if k in ("weight", *optional)}, **value}
    found = read_kind(merged, field, scope)
    if "prompt" in merged:
        found["prompt"] = _prompt(merged["prompt"], f"{field}.prompt", kind)
    if "weight" in merged:
        found["weight"] = _weight(merged["weight"], f"{field}.weight")
    return kind(**found)


def read_masks(value: Any, scope: Scope) -> tuple[Mask, ...]:
    """Returns the masks of a record.

    Raises:
      ValueError: a mask breaks the format, or two have the same object, time and image.
    """
    found = tuple(_mask(mask, f"masks[{i}]", scope)
                  for i, mask in enumerate(fields.items(value, "masks", False)))
    fields.unique([(mask.id, mask.time, mask.image) for mask in found], "masks", "object, time and image")
    return found


def points_per_second(value: Any, field: str) -> int:
    """Returns a rate of tracks, in points per second.

    Raises:
      ValueError: it is not an integer from 1 to HIGHEST_RATE.
    """
    fields.require(fields.is_positive_int(value) and value <= HIGHEST_RATE, field,
                   f"must be an integer from 1 to {HIGHEST_RATE}, points per second", value)
    return value


def _mask(mask, field, scope: Scope) -> Mask:
    fields.check_object(mask, field, ("id", "time", "image", "size", "counts"),
                        required=("id", "size", "counts"))
    height, width = fields.pair(mask["size"], f"{field}.size", fields.is_positive_int,
                                "[height, width] in pixels")
    counts = fields.items(mask["counts"], f"{field}.counts", True)
    is_cover = all(fields.is_int(n) and n >= 0 for n in counts) and sum(counts) == height * width
    fields.require(is_cover, f"{field}.counts",
                   f"must be integers >= 0 that sum to height x width = {height * width}", counts)
    time, image = scope.where(mask, field)
    expected = scope.sizes[(image or 1) - 1] if scope.sizes else (width, height)
    fields.require((width, height) == expected, f"{field}.size", "must be [height, width] of the media",
                   mask["size"])
    return Mask(id=fields.identity(mask["id"], f"{field}.id"), size=(height, width), counts=tuple(counts),
                time=time, image=image)


def _prompt(value, field, kind: type[Annotation]) -> str | tuple[str, ...] | dict[str, str]:
    """Returns the prompt: a text, or for points optionally several or {mode: text}."""
    if kind is not Points:
        return fields.text(value, field)
    if not isinstance(value, dict):
        return fields.texts(value, field)
    fields.check_object(value, field, POINT_MODES, required=())
    return {mode: fields.text(text, f"{field}.{mode}") for mode, text in value.items()}


def _weight(weight, field) -> types.LossWeight:
    """Returns a LossWeight. A number sets the scale and keeps both factors; an object sets all of them."""
    if not isinstance(weight, dict):
        return types.LossWeight(scale=fields.number(weight, field, low=0))
    fields.check_object(weight, field, ("scale", "by_length", "by_branches"), required=("scale",))
    for name in ("by_length", "by_branches"):
        fields.require(isinstance(weight.get(name, True), bool), f"{field}.{name}", "must be true or false",
                       weight)
    return types.LossWeight(**{**weight, "scale": fields.number(weight["scale"], f"{field}.scale", low=0)})


def _scale(annotation, field) -> tuple[float, float] | None:
    """Returns the coordinates of the right and the lower edge; None for pixels."""
    if "scale" not in annotation:
        return None
    scale = annotation["scale"]
    if fields.is_finite(scale):
        scale = [scale, scale]
    width, height = fields.pair(scale, f"{field}.scale", lambda value: fields.is_finite(value) and value > 0,
                                "> 0: one or [x, y]")
    return float(width), float(height)


def _label(annotation, field) -> str:
    return fields.text(annotation["label"], f"{field}.label")


def _style(annotation, field) -> str | None:
    return fields.text(annotation["style"], f"{field}.style") if "style" in annotation else None


def _points(annotation, field, scope: Scope) -> dict[str, Any]:
    fields.require(scope.has_media, field, "of type points must have a video or images", None)
    scale = _scale(annotation, field)
    points = []
    for i, point in enumerate(fields.items(annotation["points"], f"{field}.points", False)):
        name = f"{field}.points[{i}]"
        fields.check_object(point, name, ("time", "image", "x", "y", "id"), required=())
        time, image = scope.where(point, name)
        x, y = scope.position(point, name, scale, image or 1)
        points.append(Point(fields.identity(point.get("id", i + 1), f"{name}.id"), x, y, time, image))
    fields.unique([point.id for point in points], f"{field}.points", "id")
    mode = annotation.get("mode", "bare")
    modes = mode if isinstance(mode, list) and mode else [mode]
    is_known = all(one in POINT_MODES for one in modes)
    fields.require(is_known, f"{field}.mode", f"must be one or a list of {', '.join(POINT_MODES)}", mode)
    share = fields.number(annotation.get("prompt_share", 1), f"{field}.prompt_share", low=0, high=1)
    return {"label": _label(annotation, field), "points": tuple(points), "scale": scale,
            "modes": tuple(modes), "style": _style(annotation, field), "sizes": scope.sizes,
            "masks": scope.masks, "prompt_share": share}


def _tracks(annotation, field, scope: Scope) -> dict[str, Any]:
    fields.require(scope.is_video, field, "of type tracks must have a video", None)
    scale = _scale(annotation, field)
    tracks = [_track(track, f"{field}.tracks[{i}]", scope, scale)
              for i, track in enumerate(fields.items(annotation["tracks"], f"{field}.tracks", False))]
    fields.unique([track.id for track in tracks], f"{field}.tracks", "id")
    mode, fps = annotation.get("mode", "per_frame"), annotation.get("fps", 2)
    fields.require(mode in TRACK_MODES, f"{field}.mode", f"must be one of {', '.join(TRACK_MODES)}", mode)
    fields.require(mode != "single_point" or len(tracks) == 1, f"{field}.tracks",
                   "must hold exactly one track in mode single_point", len(tracks))
    points_per_second(fps, f"{field}.fps")
    return {"label": _label(annotation, field), "tracks": tuple(tracks), "scale": scale, "mode": mode,
            "fps": fps, "sizes": scope.sizes, "masks": scope.masks}


def _track(track, field, scope: Scope, scale) -> Track:
    fields.check_object(track, field, ("id", "points"), required=("id", "points"))
    places = []
    for i, point in enumerate(fields.items(track["points"], f"{field}.points", True)):
        name = f"{field}.points[{i}]"
        fields.check_object(point, name, ("time", "x", "y", "occluded"), required=("time", "x", "y"))
        occluded = fields.flag(point.get("occluded", False), f"{name}.occluded")
        time = scope.time(point["time"], f"{name}.time")
        places.append((*scope.position(point, name, scale), time, None, occluded))
    fields.unique([time for _, _, time, _, _ in places], f"{field}.points", "time")
    name = fields.identity(track["id"], f"{field}.id")
    return Track(name, tuple(Point(name, *place) for place in places))


def _count(annotation, field, scope: Scope) -> dict[str, Any]:
    fields.require(scope.has_media, field, "of type count must have a video or images", None)
    count = fields.identity(annotation["count"], f"{field}.count")
    return {"label": _label(annotation, field), "count": count}


def _qa(annotation, field, scope: Scope) -> dict[str, Any]:
    return {"question": fields.texts(annotation["question"], f"{field}.question"),
            "answer": fields.text(annotation["answer"], f"{field}.answer"),
            "style": _style(annotation, field)}


def _chat(annotation, field, scope: Scope) -> dict[str, Any]:
    turns = fields.items(annotation["turns"], f"{field}.turns", True)
    fields.require(len(turns) % 2 == 0, f"{field}.turns",
                   "must alternate user and model and end with the model", len(turns))
    return {"turns": tuple(fields.text(turn, f"{field}.turns[{i}]") for i, turn in enumerate(turns))}


def _choice(annotation, field, scope: Scope) -> dict[str, Any]:
    options = [fields.text(option, f"{field}.options[{i}]")
               for i, option in enumerate(fields.items(annotation["options"], f"{field}.options", True))]
    fields.require(2 <= len(options) <= 26, f"{field}.options", "must be 2 to 26 texts", options)
    labelled = fields.flag(annotation.get("labelled", True), f"{field}.labelled")
    fields.unique(options, f"{field}.options", "text")
    answer = annotation["answer"]
    fields.require(fields.is_int(answer) and 0 <= answer < len(options), f"{field}.answer",
                   f"must be the index of an option, 0 to {len(options) - 1}", answer)
    shuffle = fields.flag(annotation.get("shuffle", False), f"{field}.shuffle")
    return {"question": fields.text(annotation["question"], f"{field}.question"), "options": tuple(options),
            "answer": answer, "shuffle": shuffle, "labelled": labelled}


def _caption(annotation, field, scope: Scope) -> dict[str, Any]:
    fields.require(scope.has_media, field, "of type caption must have a video or images", None)
    length = annotation.get("length", "long")
    fields.require(length in ("long", "short"), f"{field}.length", "must be long or short", length)
    found = {"text": fields.texts(annotation["text"], f"{field}.text"), "length": length,
             "style": _style(annotation, field)}
    fields.require(("start" in annotation) == ("end" in annotation), f"{field}.end",
                   "must be given with start, and only then", annotation.get("end"))
    for name in ("time", "start", "end"):
        if name in annotation:
            fields.require(scope.is_video, f"{field}.{name}", "must only be given with a video",
                           annotation[name])
            found[name] = scope.time(annotation[name], f"{field}.{name}")
    is_part = found.get("start", 0.0) < found.get("end", math.inf)
    fields.require(is_part, f"{field}.end", "must be after start", annotation.get("end"))
    if "object" in annotation:
        found["object"] = fields.text(annotation["object"], f"{field}.object")
    return found


# kind: (required JSON fields, optional ones, function that validates them and returns the class's arguments)
_READERS: dict[type[Annotation], tuple[Sequence[str], Sequence[str], Callable[..., dict[str, Any]]]] = {
    Points: (("label", "points"), ("scale", "mode", "style", "prompt_share"), _points),
    Tracks: (("label", "tracks"), ("scale", "mode", "fps"), _tracks),
    Count: (("label", "count"), (), _count),
    QA: (("question", "answer"), ("style",), _qa),
    Chat: (("turns",), (), _chat),
    Choice: (("question", "options", "answer"), ("shuffle", "labelled"), _choice),
    Caption: (("text",), ("length", "style", "time", "start", "end", "object"), _caption),
}
KINDS: dict[str, type[Annotation]] = {kind.type: kind for kind in _READERS}
