"""Marks of a labelling tool -> a data folder (docs/data_format.md), optionally with a held-out part."""

import dataclasses
import fractions
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines import records
from data_pipelines.labelling import labels
from data_pipelines.labelling import objects
from data_pipelines.world import write as world_write
from molmo2_jax import files
from molmo2_jax.inputs import pixels
from molmo2_jax.inputs import video

_GOP = 12   # frames from keyframe to keyframe of videos made of frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a data folder is made.

    heldout: share of the media (in groups) that goes to OUTPUT/heldout, the rest to OUTPUT/train; 0: all go
    to OUTPUT. frames_fps: rate of the videos that are made of frames.

    Raises:
      ValueError: heldout is not in [0, 1), or frames_fps is not positive.
    """
    heldout: float = 0.0
    frames_fps: float = 24.0

    def __post_init__(self):
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout must be in [0, 1); got {self.heldout}")
        if not (math.isfinite(self.frames_fps) and self.frames_fps > 0):
            raise ValueError(f"frames_fps must be > 0; got {self.frames_fps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What became of an export. records: of each folder written. left_out: one sentence each."""
    records: dict[str, int]
    media: int
    points: int
    tracks: int
    left_out: list[str]


class _Found(NamedTuple):
    medium: labels.Medium
    seen: objects.Seen
    what: objects.Described


def write(marks: Iterable[labels.Mark | ValueError], output: str | os.PathLike,
          options: Options = Options()) -> Report:
    """Writes OUTPUT/annotations.jsonl, or OUTPUT/train and OUTPUT/heldout; returns what was written.

    Media stay where they are, and records name them relative to their folder; videos made of frames are
    written into OUTPUT/media. A mark or medium that cannot be used is left out, with its reason.

    Raises:
      ValueError: nothing is usable, a split would be empty, or OUTPUT holds splits where there would be none,
        or the other way round.
    """
    output = pathlib.Path(output)
    _refuse_other_layout(output, options.heldout)
    left_out: list[str] = []
    by_medium: dict[labels.Medium, list[labels.Mark]] = {}
    for mark in marks:
        if isinstance(mark, ValueError):
            left_out.append(str(mark))
        else:
            by_medium.setdefault(mark.medium, []).append(mark)
    by_medium = _merged(by_medium)
    if by_medium:
        _split(list(by_medium), options.heldout)   # refuses an empty split before media are opened
    found = []
    for medium, of_medium in by_medium.items():
        try:
            seen = _open(medium, output, options.frames_fps)
        except (ValueError, OSError) as error:
            left_out.append(f"{medium.path}: {len(of_medium)} labels: {error}")
            continue
        what = objects.describe(of_medium, seen, left_out)
        if what.annotations:
            found.append(_Found(medium, seen, what))
    if not found:
        raise ValueError("an export must have a usable label; got none, and left out "
                         f"{len(left_out)}: {left_out[0] if left_out else 'the export has no labels'}")
    counts = {}
    for split, chosen in _split([one.medium for one in found], options.heldout).items():
        folder = output / split if split else output
        counts[str(folder)] = _write(folder, [one for one in found if one.medium in chosen], left_out)
    return Report(records=counts, media=len(found), left_out=left_out,
                  points=sum(one.what.points for one in found), tracks=sum(one.what.tracks for one in found))


def _refuse_other_layout(output: pathlib.Path, heldout: float) -> None:
    """Raises ValueError if records of an earlier call would stay beside those of this one."""
    others = ("",) if heldout else ("train", "heldout")
    there = [path for name in others if (path := output / name / "annotations.jsonl").exists()]
    if there:
        raise ValueError("a data folder must not mix records with and without --heldout: remove "
                         f"{there[0]} or name another --output")


def _merged(by_medium: dict[labels.Medium, list[labels.Mark]]) -> dict[labels.Medium, list[labels.Mark]]:
    """Returns the marks with all media of one file as one medium."""
    first: dict[object, labels.Medium] = {}
    merged: dict[labels.Medium, list[labels.Mark]] = {}
    for medium, marks in by_medium.items():
        name = medium if medium.frames else medium.path
        merged.setdefault(first.setdefault(name, medium), []).extend(marks)
    return merged


def _open(medium: labels.Medium, output: pathlib.Path, fps: float) -> objects.Seen:
    """Returns the opened medium.

    Raises:
      ValueError: it cannot be read, or has another size than the export states.
    """
    path = medium.path
    if medium.frames is not None:
        path = output / "media" / f"{medium.path.name}.mp4"
        _encode(path, medium.frames(), fps)
    if not path.is_file():
        raise ValueError("must be a file; found none")
    if medium.is_video:
        index = video.index(path)
        with_size = video.read(path, max_frames=1, clip=None).media.sizes[0]
        seen = objects.Seen(path, with_size, index.elapsed, index.duration)
    else:
        height, width = pixels.load(path).shape[:2]
        seen = objects.Seen(path, (width, height))
    if medium.size is not None and medium.size != seen.size:
        raise ValueError("must have the size that the export states, "
                         f"{medium.size[0]} x {medium.size[1]}; got {seen.size[0]} x {seen.size[1]}")
    return seen


def _encode(path: pathlib.Path, images: Iterable[np.ndarray], fps: float) -> None:
    """Writes a video of frames, whose last row or column goes where a side is odd."""
    even = [image[:image.shape[0] // 2 * 2, :image.shape[1] // 2 * 2] for image in images]
    if not even:
        raise ValueError("a video must have frames; got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    world_write.encode(path, even, np.arange(len(even) + 1) * 2,
                       1 / fractions.Fraction(2 * fps).limit_denominator(100_000), _GOP)


def _split(media: Sequence[labels.Medium], heldout: float) -> dict[str, set[labels.Medium]]:
    """Returns the media of each split; "" if there is one. Which are held out depends on their names alone.

    Raises:
      ValueError: a split would be empty.
    """
    if not heldout:
        return {"": set(media)}
    groups: dict[str, set[labels.Medium]] = {}
    for medium in media:
        groups.setdefault(medium.group or str(medium.path.name), set()).add(medium)
    number = round(heldout * len(groups))
    if not 0 < number < len(groups):
        raise ValueError(f"--heldout must leave a video or image for each split; got {heldout:g} of "
                         f"{len(groups)}, which holds out {number}")
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = set().union(*(groups[name] for name in order[:number]))
    return {"train": set(media) - chosen, "heldout": chosen}


def _write(folder: pathlib.Path, found: Sequence[_Found], left_out: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    with files.whole(folder / "annotations.jsonl") as file:
        for record in _records(folder, found):
            try:
                records.parse_record(record, folder)
            except ValueError as error:
                left_out.append(f"{record.get('video') or record['images'][0]}: {error}")
                continue
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            number += 1
    return number


def _records(folder: pathlib.Path, found: Sequence[_Found]) -> Iterator[dict]:
    for _, seen, what in found:
        name = pathlib.Path(os.path.relpath(seen.path.resolve(), folder.resolve())).as_posix()
        yield ({"images": [name], "size": [list(seen.size)]} if seen.elapsed is None else
               {"video": name, "size": list(seen.size)}) | {"annotations": what.annotations} | (
            {"masks": what.masks} if what.masks else {})
