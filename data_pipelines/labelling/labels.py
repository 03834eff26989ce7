"""What every labelling tool exports, in one form: media, and marks on them.

Readers (coco.py, cvat.py, ...) yield Marks, and a ValueError in place of each label that they cannot use;
folder.py makes records of them. Tools count pixels from the corner of the first, records from its centre:
this half pixel is ignored for points and boxes.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import masks
from molmo2_jax.inputs import text_file

STILLS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, eq=False)
class Medium:
    """One image or video. Marks of one medium share the object.

    path: the file; for frames, the name of the video that is made of them. size: (width, height) that the
    export states, if any. frames: returns uint8[H, W, 3] images in order, of a video that is not a file yet.
    group: media of one group never fall into different splits; None: the medium alone.
    """
    path: pathlib.Path
    size: tuple[int, int] | None = None
    frames: Callable[[], Iterable[np.ndarray]] | None = None
    group: str | None = None

    @property
    def is_video(self) -> bool:
        return self.frames is not None or self.path.suffix.lower() not in STILLS


class Mark(NamedTuple):
    """One object at one moment.

    place: (x, y) of a point, (x0, y0, x1, y1) of a box, or the corners of a polygon; in pixels, or in units
    of `unit`: (1, 1) for fractions, (100, 100) for percent.
    key: the object, equal at all its moments in one medium; None: it has this moment only. frame, time: the
    moment in a video, as number of the frame (from 0) or in seconds. mask: run lengths (masks.py), which
    replace the place. where: place in the export, for messages.
    """
    medium: Medium
    label: str
    place: tuple[float, ...]
    where: str
    key: Hashable | None = None
    frame: int | None = None
    time: float | None = None
    is_occluded: bool = False
    mask: dict | None = None
    unit: tuple[float, float] | None = None


def load_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      ValueError: it is not JSON in UTF-8.
    """
    try:
        return json.loads(text_file.read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON in UTF-8: {error}") from error


def find(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Returns the file that an export calls `name`: that path, below the folder, or its last part there.

    A path that exists nowhere is returned as it would be below the folder.
    """
    candidates = (pathlib.Path(name), folder / name.lstrip("/"), folder / pathlib.PurePosixPath(name).name)
    return next((path for path in candidates if path.is_file()), candidates[1])


def polygon(rings: Sequence[Sequence[float]], width: int, height: int) -> dict:
    """Returns the mask of the pixels whose centres are inside one of the polygons [x0, y0, x1, y1, ...].

    Raises:
      ValueError: a polygon has fewer than three corners.
    """
    union = np.zeros((height, width), bool)
    for ring in rings:
        if len(ring) < 6 or len(ring) % 2:
            raise ValueError(f"a polygon must have at least three corners; got {len(ring) / 2:g}")
        inside = np.zeros_like(union)
        x0, y0 = np.asarray(ring[::2], float), np.asarray(ring[1::2], float)
        x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
        for row in range(max(math.floor(y0.min()), 0), min(math.ceil(y0.max()), height)):
            y = row + 0.5
            is_crossed = (y0 <= y) != (y1 <= y)
            crossings = x0[is_crossed] + ((y - y0) / np.where(is_crossed, y1 - y0, 1) * (x1 - x0))[is_crossed]
            columns = np.clip(np.ceil(np.sort(crossings) - 0.5).astype(int), 0, width)
            for start, end in zip(columns[::2], columns[1::2], strict=True):
                inside[row, start:end] = True
        union |= inside
    return masks.encode(union)
