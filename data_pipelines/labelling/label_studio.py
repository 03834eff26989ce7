"""Label Studio JSON: rectangles of videos; rectangles and key points of images. Places are percent.

The rectangle of a video moves linearly between its key frames, as the tool shows it, and is gone after a key
frame that is not `enabled`. Label Studio counts frames from 1, at a rate of its own (framesCount / duration),
which need not be that of the video.

Source: labelstud.io/tags/videorectangle and /guide/export.
"""

import math
import pathlib
import re
import urllib.parse
from collections.abc import Iterator

from data_pipelines.labelling import labels

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")   # put before the names of uploaded files
PERCENT = (100.0, 100.0)


def read(path: pathlib.Path, media: pathlib.Path) -> Iterator[labels.Mark | ValueError]:
    """Yields the marks of an export in format JSON; media are found below `media` by their file names.

    Raises:
      ValueError: the file is not a list of tasks in JSON.
    """
    tasks = labels.load_json(path)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "data" in task for task in tasks):
        raise ValueError(f"{path}: must be Label Studio's export in format JSON, a list of tasks with `data`")
    for task in tasks:
        where = f"{path.name}: task {task.get('id')}"
        name = next((task["data"][field] for field in ("video", "image") if field in task["data"]), None)
        if name is None:
            yield ValueError(f"{where}: data must have video or image; got {', '.join(task['data'])}")
            continue
        medium = labels.Medium(_file(name, media))
        for annotation in task.get("annotations") or ():
            if annotation.get("was_cancelled"):
                continue
            for region in annotation["result"]:
                try:
                    yield from _marks(region, medium, f"{where}, region {region.get('id')}")
                except (ValueError, LookupError, TypeError) as error:
                    yield ValueError(f"{where}, region {region.get('id')}: {error}")


def _file(name: str, media: pathlib.Path) -> pathlib.Path:
    """Returns the file of a task: a path, a URL of the tool, or an uploaded file with or without its mark."""
    parts = urllib.parse.urlsplit(name)
    local = urllib.parse.parse_qs(parts.query).get("d", [urllib.parse.unquote(parts.path)])[0]
    found = labels.find(local, media)
    if found.is_file():
        return found
    return labels.find(_UPLOAD.sub("", pathlib.PurePosixPath(local).name), media)


def _marks(region: dict, medium: labels.Medium, where: str) -> Iterator[labels.Mark]:
    kind, value = region["type"], region["value"]
    if kind == "videorectangle":
        rate = value["framesCount"] / value["duration"] if value.get("duration") else None
        for label in value["labels"]:
            for frame, place in _moments(value["sequence"], _aspect(region)):
                yield labels.Mark(medium, label, place, where, key=region["id"], unit=PERCENT,
                                  frame=None if rate else frame, time=frame / rate if rate else None)
    elif kind == "rectanglelabels":
        for label in value["rectanglelabels"]:
            yield labels.Mark(medium, label, _box(value, _aspect(region)), where, key=region["id"],
                              unit=PERCENT)
    elif kind == "keypointlabels":
        for label in value["keypointlabels"]:
            yield labels.Mark(medium, label, (value["x"], value["y"]), where, key=region["id"],
                              unit=PERCENT)
    else:
        raise ValueError(f"a region must be videorectangle, rectanglelabels or keypointlabels; got {kind}")


def _aspect(region: dict) -> float | None:
    """Returns width / height of the medium, if the region states its size."""
    width, height = region.get("original_width"), region.get("original_height")
    return width / height if width and height else None


def _moments(sequence: list[dict], aspect: float | None) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yields (frame from 0, box) of every frame between key frames that show the object."""
    ordered = sorted(sequence, key=lambda one: one["frame"])
    for one, following in zip(ordered, [*ordered[1:], None], strict=True):
        first = _box(one, aspect)
        yield one["frame"] - 1, first
        if following is None or not one.get("enabled", True):
            continue
        last, span = _box(following, aspect), following["frame"] - one["frame"]
        for step in range(1, span):
            yield one["frame"] - 1 + step, tuple(
                a + (b - a) * step / span for a, b in zip(first, last, strict=True))


def _box(value: dict, aspect: float | None) -> tuple[float, ...]:
    """Returns the box; of a rectangle that is turned about its upper left corner, its centre alone."""
    x, y, width, height = (float(value[name]) for name in ("x", "y", "width", "height"))
    angle = math.radians(value.get("rotation") or 0)
    if not angle:
        return x, y, x + width, y + height
    if aspect is None:
        raise ValueError("a rotated rectangle needs original_width and original_height; got neither")
    centre = (x + (width * math.cos(angle) - height / aspect * math.sin(angle)) / 2,
              y + (width * aspect * math.sin(angle) + height * math.cos(angle)) / 2)
    return (*centre, *centre)
