"""Reads annotations.jsonl: one record per line, validated to the last field (docs/data_format.md).

Whatever the format does not know or allow is refused with file, line, field, rule and value. `read_jsonl`
stops at the first such record; `read_jsonl_collecting` returns the good ones and the list of refusals, and
`read_folder` does so for data that must be of use.

In the Examples returned, media are absolute paths, defaults of the record are copied into its annotations,
and times are relative to the start of the clip.
"""

import collections
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from molmo2_jax import types
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import text_file

POINT_MODES = ("bare", "point_count", "count_point", "count")
TRACK_MODES = ("per_frame", "start_end", "single_point")
TIME_TOLERANCE = 0.01  # seconds an annotated time may lie outside its clip
_SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer takes them
_LARGEST = 1e300       # numbers beyond are as good as infinite
_HIGHEST_RATE = 1000   # points per second

_RECORD_FIELDS = ("video", "images", "clip", "tracking_fps", "subtitles", "size", "weight", "scale",
                  "dialogue", "annotations", "masks")
_ANY_TYPE = ("type", "weight", "prompt")


def read_jsonl(path: str | os.PathLike, *, source: str = "") -> list[types.Example]:
    """Returns the examples of a file, in order.

    Args:
      source: name of the data set for counts and reports; by default the name of the folder.

    Raises:
      ValueError: the file or one of its records breaks the format.
    """
    examples = []
    for item in _read(path, source):
        if isinstance(item, ValueError):
            raise item
        examples.append(item)
    return examples


def read_jsonl_collecting(path: str | os.PathLike, *,
                          source: str = "") -> tuple[list[types.Example], list[ValueError]]:
    """Returns the good examples of a file, and one error per record that was skipped."""
    items = list(_read(path, source))
    errors = [item for item in items if isinstance(item, ValueError)]
    return [item for item in items if isinstance(item, types.Example)], errors


def read_folder(folder: str | os.PathLike, *,
                source: str = "") -> tuple[list[types.Example], list[ValueError]]:
    """Returns what read_jsonl_collecting does, of the annotations.jsonl in a data folder.

    Raises:
      ValueError: no record can be used.
    """
    path = pathlib.Path(folder) / "annotations.jsonl"
    examples, errors = read_jsonl_collecting(path, source=source)
    if not examples:
        raise ValueError(f"a data folder must hold a record that can be used; got none in {path}"
                         + (f", the first because {errors[0]}" if errors else ""))
    return examples, errors


def _read(path, source) -> Iterator[types.Example | ValueError]:
    path = pathlib.Path(path)
    if not path.is_file():
        yield ValueError(f"{path}: an annotation file must exist; found none")
        return
    try:
        text_file.check_start(path)
    except ValueError as error:
        yield error
        return
    number_of_records = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            number_of_records += 1
            try:
                yield parse_record(_parse_json(line), path.parent, key=f"{path.name}:{number}",
                                   source=source or path.resolve().parent.name)
            except ValueError as error:
                yield ValueError(f"{path}:{number}: {error}")
    if not number_of_records:
        yield ValueError(f"{path}: an annotation file must hold at least one record; "
                         f"got {path.stat().st_size} bytes")


def _parse_json(line: bytes) -> Any:
    def unique(pairs):
        _require(len(dict(pairs)) == len(pairs), "record", "must not repeat a field", [k for k, _ in pairs])
        return dict(pairs)
    try:
        return json.loads(line, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"record: must be one JSON object per line ({error}); got {_short(line)}") from None


def parse_record(record: Any, folder: str | os.PathLike, *, key: str = "", source: str = "") -> types.Example:
    """Returns the Example of one parsed JSON record whose media paths are relative to `folder`.

    Raises:
      ValueError: naming the field, the rule it breaks and its value.
    """
    _object(record, "record", _RECORD_FIELDS, required=("annotations",))
    _require("video" not in record or "images" not in record, "video", "must not stand beside images",
             record.get("video"))
    video = _media(record["video"], folder, "video") if "video" in record else None
    images = tuple(_media(name, folder, f"images[{i}]")
                   for i, name in enumerate(_list(record.get("images", []), "images", "images" in record)))
    clip = _clip(record["clip"], video) if "clip" in record else None
    media = _Media(num_images=len(images), is_video=video is not None, clip=clip,
                   sizes=_sizes(record, video, images))
    shared = {name: record[name] for name in ("weight", "scale") if name in record}
    masks = tuple(_mask(mask, f"masks[{i}]", media)
                  for i, mask in enumerate(_list(record.get("masks", []), "masks", False)))
    _unique([(m["id"], m.get("time"), m.get("image")) for m in masks], "masks", "object, time and image")
    annotations = tuple(_annotation(annotation, f"annotations[{i}]", media, shared, masks)
                        for i, annotation in enumerate(_list(record["annotations"], "annotations", True)))
    return types.Example(
        annotations=annotations, video=video, images=images, clip=clip, tracking_fps=_rate(record, video),
        subtitles=_subtitles(record.get("subtitles", []), media), source=source, key=key,
        dialogue_share=_number(record.get("dialogue", 0.0), "dialogue", low=0.0, high=1.0))


class _Media:
    """What the annotations of a record may refer to."""

    def __init__(self, *, num_images, is_video, clip, sizes):
        self.num_images = num_images
        self.is_video = is_video
        self.clip = clip
        self.sizes = sizes      # ((width, height), ...) or None if the record does not say

    def where(self, point: Mapping, field: str) -> dict:
        """Returns {"time": seconds from the clip's start} or {"image": from 1} of a point or mask."""
        if self.is_video:
            _require("image" not in point, f"{field}.image", "must only be given with images",
                     point.get("image"))
            _require("time" in point, f"{field}.time", "must be given for a video", None)
            return {"time": self.time(point["time"], f"{field}.time")}
        _require("time" not in point, f"{field}.time", "must only be given with a video", point.get("time"))
        _require("image" in point or self.num_images == 1, f"{field}.image",
                 "must be given unless there is exactly one image", None)
        image = point.get("image", 1)
        _require(_is_int(image) and 1 <= image <= self.num_images, f"{field}.image",
                 f"must be an integer from 1 to {self.num_images}", image)
        return {"image": image}

    def time(self, seconds, field: str) -> float:
        start, end = self.clip or (0.0, math.inf)
        _number(seconds, field, low=0.0)
        _require(start - TIME_TOLERANCE <= seconds <= end + TIME_TOLERANCE, field,
                 f"must lie in the clip from {start} to {end} seconds", seconds)
        return max(float(seconds) - start, 0.0)

    def position(self, point: Mapping, field: str, scale, image: int = 1) -> dict:
        limits = scale or (self.sizes[image - 1] if self.sizes else (math.inf, math.inf))
        for axis, limit in zip("xy", limits):
            _require(axis in point, f"{field}.{axis}", "must be given", None)
            _number(point[axis], f"{field}.{axis}")
            _require(0 <= point[axis] <= limit, f"{field}.{axis}",
                     f"must lie inside the frame, 0 to {limit}", point[axis])
        return {"x": float(point["x"]), "y": float(point["y"])}


def _annotation(annotation, field: str, media: _Media, shared: Mapping, masks: tuple) -> dict:
    """Returns a checked annotation with the defaults of its record filled in."""
    _require(isinstance(annotation, dict), field, "must be an object", annotation)
    kind = annotation.get("type")
    is_known = isinstance(kind, str) and kind in _TYPES
    _require(is_known, f"{field}.type", f"must be one of {', '.join(_TYPES)}", kind)
    required, optional, check = _TYPES[kind]
    _object(annotation, field, (*_ANY_TYPE, *required, *optional), required=required)
    merged = {**{k: v for k, v in shared.items() if k in ("weight", *optional)}, **annotation}
    checked = {"type": kind, **check(merged, field, media)}
    if "prompt" in merged:
        checked["prompt"] = _prompt(merged["prompt"], f"{field}.prompt", kind)
    if "weight" in merged:
        checked["weight"] = _weight(merged["weight"], f"{field}.weight")
    if kind in ("points", "tracks"):
        checked["masks"] = masks
        checked["sizes"] = media.sizes
    return checked


def _prompt(value, field, kind) -> str | dict[str, str]:
    """Returns the text to ask, for points perhaps one text by mode."""
    if kind != "points" or not isinstance(value, dict):
        return _text(value, field)
    _object(value, field, POINT_MODES, required=())
    return {mode: _text(text, f"{field}.{mode}") for mode, text in value.items()}


def _points(annotation, field, media) -> dict:
    _require(media.is_video or media.num_images, field, "of type points must have a video or images", None)
    scale = _scale(annotation, field)
    points = []
    for i, point in enumerate(_list(annotation["points"], f"{field}.points", False)):
        name = f"{field}.points[{i}]"
        _object(point, name, ("time", "image", "x", "y", "id"), required=())
        where = media.where(point, name)
        position = media.position(point, name, scale, where.get("image", 1))
        points.append({**where, **position, "id": _identity(point.get("id", i + 1), f"{name}.id")})
    _unique([p["id"] for p in points], f"{field}.points", "id")
    mode = annotation.get("mode", "bare")
    modes = mode if isinstance(mode, list) and mode else [mode]
    is_known = all(one in POINT_MODES for one in modes)
    _require(is_known, f"{field}.mode", f"must be one or a list of {', '.join(POINT_MODES)}", mode)
    return {"label": _text(annotation["label"], f"{field}.label"), "points": tuple(points), "scale": scale,
            "mode": modes[0], "modes": tuple(modes), **_style(annotation, field)}


def _style(annotation, field) -> dict[str, str]:
    return {"style": _text(annotation["style"], f"{field}.style")} if "style" in annotation else {}


def _tracks(annotation, field, media) -> dict:
    _require(media.is_video, field, "of type tracks must have a video", None)
    scale = _scale(annotation, field)
    tracks = [_track(track, f"{field}.tracks[{i}]", media, scale)
              for i, track in enumerate(_list(annotation["tracks"], f"{field}.tracks", False))]
    _unique([track["id"] for track in tracks], f"{field}.tracks", "id")
    mode, fps = annotation.get("mode", "per_frame"), annotation.get("fps", 2)
    _require(mode in TRACK_MODES, f"{field}.mode", f"must be one of {', '.join(TRACK_MODES)}", mode)
    _require(mode != "single_point" or len(tracks) == 1, f"{field}.tracks",
             "must hold exactly one track in mode single_point", len(tracks))
    _points_per_second(fps, f"{field}.fps")
    return {"label": _text(annotation["label"], f"{field}.label"), "tracks": tuple(tracks), "scale": scale,
            "mode": mode, "fps": fps}


def _track(track, field, media, scale) -> dict:
    _object(track, field, ("id", "points"), required=("id", "points"))
    points = []
    for i, point in enumerate(_list(track["points"], f"{field}.points", True)):
        name = f"{field}.points[{i}]"
        _object(point, name, ("time", "x", "y", "occluded"), required=("time", "x", "y"))
        occluded = point.get("occluded", False)
        _require(isinstance(occluded, bool), f"{name}.occluded", "must be true or false", occluded)
        points.append({"time": media.time(point["time"], f"{name}.time"),
                       **media.position(point, name, scale), "occluded": occluded})
    _unique([p["time"] for p in points], f"{field}.points", "time")
    return {"id": _identity(track["id"], f"{field}.id"), "points": tuple(points)}


def _count(annotation, field, media) -> dict:
    _require(media.is_video or media.num_images, field, "of type count must have a video or images", None)
    count = annotation["count"]
    _require(_is_int(count) and count >= 0, f"{field}.count", "must be an integer >= 0", count)
    return {"label": _text(annotation["label"], f"{field}.label"), "count": count}


def _qa(annotation, field, media) -> dict:
    return {"question": _texts(annotation["question"], f"{field}.question"),
            "answer": _text(annotation["answer"], f"{field}.answer"), **_style(annotation, field)}


def _chat(annotation, field, media) -> dict:
    turns = _list(annotation["turns"], f"{field}.turns", True)
    _require(len(turns) % 2 == 0, f"{field}.turns", "must alternate user and model and end with the model",
             len(turns))
    return {"turns": tuple(_text(turn, f"{field}.turns[{i}]") for i, turn in enumerate(turns))}


def _choice(annotation, field, media) -> dict:
    options = [_text(option, f"{field}.options[{i}]")
               for i, option in enumerate(_list(annotation["options"], f"{field}.options", True))]
    _require(2 <= len(options) <= 26, f"{field}.options", "must be 2 to 26 texts", options)
    is_labelled = annotation.get("labelled", True)
    _require(isinstance(is_labelled, bool), f"{field}.labelled", "must be true or false", is_labelled)
    _unique(options, f"{field}.options", "text")
    answer = annotation["answer"]
    _require(_is_int(answer) and 0 <= answer < len(options), f"{field}.answer",
             f"must be the index of an option, 0 to {len(options) - 1}", answer)
    shuffle = annotation.get("shuffle", False)
    _require(isinstance(shuffle, bool), f"{field}.shuffle", "must be true or false", shuffle)
    return {"question": _text(annotation["question"], f"{field}.question"), "options": tuple(options),
            "answer": answer, "shuffle": shuffle, "labelled": is_labelled}


def _caption(annotation, field, media) -> dict:
    _require(media.is_video or media.num_images, field, "of type caption must have a video or images", None)
    length = annotation.get("length", "long")
    _require(length in ("long", "short"), f"{field}.length", "must be long or short", length)
    checked = {"text": _texts(annotation["text"], f"{field}.text"), "length": length,
               **_style(annotation, field)}
    _require(("start" in annotation) == ("end" in annotation), f"{field}.end",
             "must be given with start, and only then", annotation.get("end"))
    for name in ("time", "start", "end"):
        if name in annotation:
            _require(media.is_video, f"{field}.{name}", "must only be given with a video", annotation[name])
            checked[name] = media.time(annotation[name], f"{field}.{name}")
    _require(checked.get("start", 0.0) < checked.get("end", math.inf), f"{field}.end", "must be after start",
             annotation.get("end"))
    if "object" in annotation:
        checked["object"] = _text(annotation["object"], f"{field}.object")
    return checked


# type: (required fields, optional fields, function that checks them)
_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable]] = {
    "points": (("label", "points"), ("scale", "mode", "style"), _points),
    "tracks": (("label", "tracks"), ("scale", "mode", "fps"), _tracks),
    "count": (("label", "count"), (), _count),
    "qa": (("question", "answer"), ("style",), _qa),
    "chat": (("turns",), (), _chat),
    "choice": (("question", "options", "answer"), ("shuffle", "labelled"), _choice),
    "caption": (("text",), ("length", "style", "time", "start", "end", "object"), _caption),
}


def _mask(mask, field, media) -> dict:
    _object(mask, field, ("id", "time", "image", "size", "counts"), required=("id", "size", "counts"))
    height, width = _pair(mask["size"], f"{field}.size", _is_positive_int, "[height, width] in pixels")
    counts = _list(mask["counts"], f"{field}.counts", True)
    is_cover = all(_is_int(n) and n >= 0 for n in counts) and sum(counts) == height * width
    _require(is_cover, f"{field}.counts",
             f"must be integers >= 0 that sum to height x width = {height * width}", counts)
    where = media.where(mask, field)
    expected = media.sizes[where.get("image", 1) - 1] if media.sizes else (width, height)
    _require((width, height) == expected, f"{field}.size", "must be [height, width] of the media",
             mask["size"])
    return {"id": _identity(mask["id"], f"{field}.id"), **where, "size": (height, width),
            "counts": tuple(counts)}


def _rate(record, video) -> float | None:
    """Returns the rate of the tracks by which the video is to be sampled, if the record says one."""
    if "tracking_fps" not in record:
        return None
    rate = record["tracking_fps"]
    _require(video is not None, "tracking_fps", "must only be given with a video", rate)
    return float(_points_per_second(rate, "tracking_fps"))


def _points_per_second(value, field) -> int:
    _require(_is_positive_int(value) and value <= _HIGHEST_RATE, field,
             f"must be an integer from 1 to {_HIGHEST_RATE}, points per second", value)
    return value


def _subtitles(value, media) -> tuple[tuple[float, float, str], ...] | str:
    if isinstance(value, str):
        _require(media.is_video, "subtitles", "must only be given with a video", value)
        return _text(value, "subtitles")
    return tuple(_subtitle(entry, f"subtitles[{i}]", media)
                 for i, entry in enumerate(_list(value, "subtitles", False)))


def _subtitle(entry, field, media) -> tuple[float, float, str]:
    _require(media.is_video, field, "must only be given with a video", entry)
    _object(entry, field, ("start", "end", "text"), required=("start", "end", "text"))
    start, end = _number(entry["start"], f"{field}.start", low=0), _number(entry["end"], f"{field}.end")
    _require(start < end, f"{field}.end", "must be after start", (start, end))
    offset = media.clip[0] if media.clip else 0.0
    return start - offset, end - offset, _text(entry["text"], f"{field}.text")


def _clip(clip, video) -> tuple[float, float]:
    _require(video is not None, "clip", "must only be given with a video", clip)
    start, end = _pair(clip, "clip", _is_finite, "[start, end] in seconds")
    _require(0 <= start < end, "clip", "must be 0 <= start < end seconds", clip)
    return float(start), float(end)


def _sizes(record, video, images):
    """Returns ((width, height), ...), one per image or one for the video, or None."""
    if "size" not in record:
        return None
    size, rule = record["size"], "[width, height] in pixels"
    if video is not None:
        return (_pair(size, "size", _is_positive_int, rule),)
    _require(isinstance(size, list) and len(size) == len(images) and images, "size",
             f"must hold {rule} of each of the {len(images)} images", size)
    return tuple(_pair(one, f"size[{i}]", _is_positive_int, rule) for i, one in enumerate(size))


def _scale(annotation, field) -> tuple[float, float] | None:
    """Returns the coordinates of the right and the lower edge, or None for pixels."""
    if "scale" not in annotation:
        return None
    scale = annotation["scale"]
    if _is_finite(scale):
        scale = [scale, scale]
    width, height = _pair(scale, f"{field}.scale", lambda value: _is_finite(value) and value > 0,
                          "> 0: one or [x, y]")
    return float(width), float(height)


def _weight(weight, field) -> types.LossWeight:
    """A number replaces the scale and keeps both factors; an object says everything."""
    if not isinstance(weight, dict):
        return types.LossWeight(scale=_number(weight, field, low=0))
    _object(weight, field, ("scale", "by_length", "by_branches"), required=("scale",))
    for name in ("by_length", "by_branches"):
        _require(isinstance(weight.get(name, True), bool), f"{field}.{name}", "must be true or false", weight)
    return types.LossWeight(**{**weight, "scale": _number(weight["scale"], f"{field}.scale", low=0)})


def _media(name, folder, field) -> str:
    _text(name, field)
    path = os.path.abspath(os.path.join(folder, name))
    _require(os.path.isfile(path), field, f"must be a file (relative to {folder})", name)
    _require(os.path.getsize(path) > 0, field, "must not be an empty file", name)
    return path


def _require(ok, field: str, rule: str, value) -> None:
    if not ok:
        raise ValueError(f"{field}: {rule}; got {_short(value)}")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _object(value, field, allowed, required) -> None:
    _require(isinstance(value, dict), field, "must be an object", value)
    unknown = [name for name in value if name not in allowed]
    _require(not unknown, field, f"must only have the fields {', '.join(allowed)}", unknown)
    missing = [name for name in required if name not in value]
    _require(not missing, field, f"must have the fields {', '.join(required)}", sorted(value))


def _list(value, field, is_filled: bool) -> list:
    _require(isinstance(value, list), field, "must be a list", value)
    _require(value or not is_filled, field, "must not be empty", value)
    return value


def _text(value, field) -> str:
    _require(isinstance(value, str) and value.strip(), field, "must be a text that is not empty", value)
    is_whole = value.isascii() or not _SURROGATE.search(value)
    _require(is_whole, field, "must not hold half of a surrogate pair", value)
    try:
        prompt.refuse_reserved(value)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    return value


def _texts(value, field) -> str | tuple[str, ...]:
    """Returns a text, or several of which each use draws one."""
    if not isinstance(value, list):
        return _text(value, field)
    return tuple(_text(text, f"{field}[{i}]") for i, text in enumerate(_list(value, field, True)))


def _number(value, field, low: float = -math.inf, high: float = math.inf) -> float:
    _require(_is_finite(value), field, "must be a finite number", value)
    _require(value >= low, field, f"must be >= {low}", value)
    _require(value <= high, field, f"must be <= {high}", value)
    return float(value)


def _identity(value, field) -> int:
    _require(_is_int(value) and value >= 0, field, "must be an integer >= 0", value)
    return value


def _pair(value, field, check, rule) -> tuple:
    _require(isinstance(value, list) and len(value) == 2 and all(map(check, value)), field, f"must be {rule}",
             value)
    return tuple(value)


def _unique(values, field, name) -> None:
    repeated = [value for value, times in collections.Counter(values).items() if times > 1]
    _require(not repeated, field, f"must not repeat the same {name}", repeated)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive_int(value) -> bool:
    return _is_int(value) and value > 0


def _is_finite(value) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -_LARGEST <= value <= _LARGEST
