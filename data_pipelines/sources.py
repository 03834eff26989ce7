"""Reads annotations.jsonl: one record per line, validated to the last field (docs/data_format.md).

Whatever the format does not know or allow is refused with file, line, field, rule and value. `read_jsonl`
stops at the first such record; `read_jsonl_collecting` returns the good ones and the list of refusals, and
`read_folder` refuses a folder without a good one. This file knows the record; annotations.py knows what is in
its annotations and masks.

In the Examples returned, media are absolute paths, defaults of the record are copied into its annotations,
and times are relative to the start of the clip.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from data_pipelines import annotations
from data_pipelines import fields
from molmo2_jax import types
from molmo2_jax.inputs import text_file

_RECORD_FIELDS = ("video", "images", "clip", "tracking_fps", "subtitles", "size", "weight", "scale",
                  "dialogue", "annotations", "masks")


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
        fields.require(len(dict(pairs)) == len(pairs), "record", "must not repeat a field",
                       [name for name, _ in pairs])
        return dict(pairs)
    try:
        return json.loads(line, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"record: must be one JSON object per line ({error}); "
                         f"got {fields.shorten(line)}") from None


def parse_record(record: Any, folder: str | os.PathLike, *, key: str = "", source: str = "") -> types.Example:
    """Returns the Example of one parsed JSON record whose media paths are relative to `folder`.

    Raises:
      ValueError: naming the field, the rule it breaks and its value.
    """
    fields.check_object(record, "record", _RECORD_FIELDS, required=("annotations",))
    fields.require("video" not in record or "images" not in record, "video", "must not stand beside images",
                   record.get("video"))
    video = _media(record["video"], folder, "video") if "video" in record else None
    named = fields.items(record.get("images", []), "images", "images" in record)
    images = tuple(_media(name, folder, f"images[{i}]") for i, name in enumerate(named))
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


def _media(name, folder, field) -> str:
    fields.text(name, field)
    path = os.path.abspath(os.path.join(folder, name))
    fields.require(os.path.isfile(path), field, f"must be a file (relative to {folder})", name)
    fields.require(os.path.getsize(path) > 0, field, "must not be an empty file", name)
    return path


def _clip(clip, video) -> tuple[float, float]:
    fields.require(video is not None, "clip", "must only be given with a video", clip)
    start, end = fields.pair(clip, "clip", fields.is_finite, "[start, end] in seconds")
    fields.require(0 <= start < end, "clip", "must be 0 <= start < end seconds", clip)
    return float(start), float(end)


def _sizes(record, video, images):
    """Returns ((width, height), ...), one per image or one for the video, or None."""
    if "size" not in record:
        return None
    size, rule = record["size"], "[width, height] in pixels"
    if video is not None:
        return (fields.pair(size, "size", fields.is_positive_int, rule),)
    fields.require(isinstance(size, list) and len(size) == len(images) and images, "size",
                   f"must hold {rule} of each of the {len(images)} images", size)
    return tuple(fields.pair(one, f"size[{i}]", fields.is_positive_int, rule) for i, one in enumerate(size))


def _rate(record, video) -> float | None:
    """Returns the rate of the tracks by which the video is to be sampled, if the record says one."""
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
