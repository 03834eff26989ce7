"""CSV tables: boxes as VoTT exports them, and points as any program can write them.

    video,time,x,y,label[,track]       points: seconds, pixels; rows of one track are one object
    image,xmin,ymin,xmax,ymax,label    VoTT: pixels; a frame of a video is named VIDEO#t=SECONDS
"""

import csv
import pathlib
import re
from collections.abc import Iterator

from data_pipelines.labelling import labels
from molmo2_jax.inputs import text_file

POINTS = ("video", "time", "x", "y", "label")
BOXES = ("image", "xmin", "ymin", "xmax", "ymax", "label")
_FRAME = re.compile(r"^(?P<video>.+)#t=(?P<time>[0-9.]+?)(\.(jpg|jpeg|png))?$", re.IGNORECASE)


def read_points(path: pathlib.Path, media: pathlib.Path) -> Iterator[labels.Mark | ValueError]:
    """Yields the marks of a table of points; `video` may also name an image, its `time` is then empty.

    Raises:
      ValueError: the table lacks a column, or is not UTF-8.
    """
    known: dict[str, labels.Medium] = {}
    for where, row in _rows(path, POINTS):
        medium = known.setdefault(row["video"], labels.Medium(labels.find(row["video"], media)))
        try:
            yield labels.Mark(medium, row["label"].strip(), (float(row["x"]), float(row["y"])), where,
                              key=(row.get("track") or "").strip() or None,
                              time=float(row["time"]) if medium.is_video else None)
        except ValueError as error:
            yield ValueError(f"{where}: {error}")


def read_vott(path: pathlib.Path, media: pathlib.Path) -> Iterator[labels.Mark | ValueError]:
    """Yields the marks of a VoTT table of boxes.

    Raises:
      ValueError: the table lacks a column, or is not UTF-8.
    """
    known: dict[str, labels.Medium] = {}
    for where, row in _rows(path, BOXES):
        frame = _FRAME.match(row["image"])
        name = frame["video"] if frame else row["image"]
        medium = known.setdefault(name, labels.Medium(labels.find(name, media)))
        try:
            box = tuple(float(row[column]) for column in BOXES[1:5])
            yield labels.Mark(medium, row["label"].strip(), box, where,
                              time=float(frame["time"]) if frame else None)
        except ValueError as error:
            yield ValueError(f"{where}: {error}")


def _rows(path: pathlib.Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    lines = text_file.read(path).splitlines()
    reader = csv.DictReader(lines)
    lacking = [column for column in columns if column not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"{path}: the table must have the columns {', '.join(columns)}; got none of "
                         f"{', '.join(lacking)}")
    for row in reader:
        yield f"{path.name}: row {reader.line_num}", {
            name: value or "" for name, value in row.items() if name is not None}
