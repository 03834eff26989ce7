"""One record: a JSON object, validated in every field (docs/data_format.md), becomes a types.Example.

Errors name field, rule and value. This module parses the record; annotations.py parses its annotations and
masks. `sources` has the data sets that records are read from.

In the Examples returned, media are absolute paths, defaults of the record are copied into its annotations,
and times are relative to the start of the clip.
"""

import dataclasses
import json
import os
import pathlib
import stat
from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Any

from data_pipelines import annotations
from data_pipelines import fields
from molmo2_jax import types

_RECORD_FIELDS = ("video", "images", "clip", "tracking_fps", "subtitles", "size", "weight", "scale",
                  "dialogue", "annotations", "masks")


class BrokenRecord(ValueError):
    """A record that breaks the format, or whose media are missing or empty: "FOLDER/KEY: RULE".

    folder: of the data set. key: file and place in it, such as "annotations.jsonl:17". rule: field, rule and
    value.
    """

    def __init__(self, folder: str | os.PathLike, key: str, rule: str):
        super().__init__(os.fspath(folder), key, rule)  # the arguments, so that it can be pickled
        self.folder, self.key, self.rule = os.fspath(folder), key, rule

    def __str__(self) -> str:
        return f"{pathlib.Path(self.folder) / self.key}: {self.rule}"


def media(record: Mapping[str, Any]) -> list[str]:
    """Returns the names of the media of a record."""
    return [record["video"]] if "video" in record else list(record.get("images", []))


def listed(record: Mapping[str, Any], names: Set[str]) -> dict[str, frozenset[str]]:
    """Returns {medium: names} of those media of a record that `names` has, with or without folder and suffix.
    """
    found = {}
    for path in map(pathlib.PurePath, media(record)):
        if matching := names & {str(path), path.name, path.stem}:
            found[str(path)] = frozenset(matching)
    return found


def parse_line(line: bytes, folder: str | os.PathLike, *, key: str, source: str) -> types.Example:
    """Returns the Example of a record as JSON text, in UTF-8; arguments of parse_record.

    Raises:
      BrokenRecord: (a ValueError) the text is not one JSON object, or parse_record refuses it.
    """
    try:
        return parse_record(parse_json(line), folder, key=key, source=source)
    except ValueError as error:
        raise BrokenRecord(folder, key, str(error)) from error


def parse_json(line: bytes) -> Any:
    """Returns the value of a JSON text in UTF-8.

    Raises:
      ValueError: it is not one JSON value, or an object in it repeats a field.
    """
    def unique(pairs):
        fields.require(len(dict(pairs)) == len(pairs), "record", "must not repeat a field",
                       [name for name, _ in pairs])
        return dict(pairs)
    try:
        return json.loads(line, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"record: must be one JSON object per line ({error}); "
                         f"got {fields.shorten(line)}") from None


def parse_record(record: Any, folder: str | os.PathLike, *, key: str = "", source: str = "",
                 held: Mapping[str, Any] = MappingProxyType({})) -> types.Example:
    """Returns the Example of a parsed JSON record; its media paths are relative to `folder`.

    held: media that are in memory, by their names in the record; files need not exist for them.

    Raises:
      ValueError: a field breaks the format, or a media file is missing or empty; the message names the
        field, the rule and the value.
    """
    fields.check_object(record, "record", _RECORD_FIELDS, required=("annotations",))
    fields.require("video" not in record or "images" not in record, "video",
                   "must not be given together with images", record.get("video"))
    video = _media(record["video"], folder, "video", held) if "video" in record else None
    named = fields.items(record.get("images", []), "images", "images" in record)
    images = tuple(_media(name, folder, f"images[{i}]", held) for i, name in enumerate(named))
    clip = _clip(record["clip"], video) if "clip" in record else None
    scope = annotations.Scope(num_images=len(images), is_video=video is not None, clip=clip,
                              sizes=_sizes(record, video, images))
    scope = dataclasses.replace(scope, masks=annotations.read_masks(record.get("masks", []), scope))
    shared = {name: record[name] for name in ("weight", "scale") if name in record}
    found = tuple(annotations.read(one, f"annotations[{i}]", scope, shared)
                  for i, one in enumerate(fields.items(record["annotations"], "annotations", True)))
    return types.Example(
        annotations=found, video=video, images=images, clip=clip, tracking_fps=_rate(record, video),
        subtitles=_subtitles(record.get("subtitles", []), scope), source=source, key=key,
        dialogue_share=fields.number(record.get("dialogue", 0.0), "dialogue", low=0.0, high=1.0))


def _media(name, folder, field, held: Mapping[str, Any]) -> Any:
    fields.text(name, field)
    if name in held:
        return held[name]
    path = os.path.abspath(os.path.join(folder, name))
    size = _file_size(path)
    fields.require(size is not None, field, f"must be a file (relative to {folder})", name)
    fields.require(size, field, "must not be an empty file", name)
    return path


def _file_size(path: str) -> int | None:
    """Returns the bytes of a file, with one question to the file system; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: the name has a zero byte
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _clip(clip, video) -> tuple[float, float]:
    fields.require(video is not None, "clip", "must only be given with a video", clip)
    start, end = fields.pair(clip, "clip", fields.is_finite, "[start, end] in seconds")
    fields.require(0 <= start < end, "clip", "must be 0 <= start < end seconds", clip)
    return float(start), float(end)


def _sizes(record, video, images):
    """Returns ((width, height), ...), one per image or one for the video; None if not declared."""
    if "size" not in record:
        return None
    size, rule = record["size"], "[width, height] in pixels"
    if video is not None:
        return (fields.pair(size, "size", fields.is_positive_int, rule),)
    fields.require(isinstance(size, list) and len(size) == len(images) and images, "size",
                   f"must hold {rule} of each of the {len(images)} images", size)
    return tuple(fields.pair(one, f"size[{i}]", fields.is_positive_int, rule) for i, one in enumerate(size))


def _rate(record, video) -> float | None:
    """Returns the declared rate of the tracks, at which the video is sampled, or None."""
    if "tracking_fps" not in record:
        return None
    rate = record["tracking_fps"]
    fields.require(video is not None, "tracking_fps", "must only be given with a video", rate)
    return float(annotations.points_per_second(rate, "tracking_fps"))


def _subtitles(value, scope) -> tuple[tuple[float, float, str], ...] | str:
    if isinstance(value, str):
        fields.require(scope.is_video, "subtitles", "must only be given with a video", value)
        return fields.text(value, "subtitles")
    return tuple(_subtitle(entry, f"subtitles[{i}]", scope)
                 for i, entry in enumerate(fields.items(value, "subtitles", False)))


def _subtitle(entry, field, scope) -> tuple[float, float, str]:
    fields.require(scope.is_video, field, "must only be given with a video", entry)
    fields.check_object(entry, field, ("start", "end", "text"), required=("start", "end", "text"))
    start = fields.number(entry["start"], f"{field}.start", low=0)
    end = fields.number(entry["end"], f"{field}.end")
    fields.require(start < end, f"{field}.end", "must be after start", (start, end))
    offset = scope.clip[0] if scope.clip else 0.0
    return start - offset, end - offset, fields.text(entry["text"], f"{field}.text")
