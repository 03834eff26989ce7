"""Masks for J&F: those of a file, or those that SAM 2 makes from the points of an answer.

Published J&F is of masks that SAM 2 propagates from the model's points to all frames of the video. SAM 2 is
no dependency: it is used where the user has installed it. What it makes is recorded in the file format that
is read here, so that no video is segmented twice.

A file has one line per answer: {"id": ..., "answer": ..., "masks": {object: {frame: run lengths}}}. `answer`
may be left out; where it is given, the masks belong to that answer alone.

Source: paper, section 4; lmms-eval, tasks/rvos/eval_sam2.py, for how points prompt SAM 2.
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines import masks as mask_lib
from data_pipelines.scoring import tracks as track_scores
from data_pipelines.suites import benchmark as benchmarks
from data_pipelines.suites import predictions
from molmo2_jax.inputs import video

MODEL = "facebook/sam2.1-hiera-large"
_CHUNK = 64        # frames of a video in memory at a time

Masks = Mapping[str, Mapping[int, np.ndarray]]   # object -> frame of the video -> bool[H, W]
# (question, answer, its target) -> masks of all objects in the answer.
Segment = Callable[[benchmarks.Item, str, track_scores.TrackTarget], Masks]


class Record:
    """A file of masks; only the places of its lines are in memory."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._places: dict[tuple[str, str | None], int] = {}
        if self.path.exists():
            place = 0
            with open(self.path, "rb") as lines:
                for line in lines:
                    with contextlib.suppress(ValueError):   # a line torn by a kill
                        value = json.loads(line)
                        self._places[str(value["id"]), value.get("answer")] = place
                    place += len(line)

    def find(self, item: benchmarks.Item, answer: str) -> Masks | None:
        """Returns the masks of an answer; None if the file has none.

        Raises:
          ValueError: the run lengths do not fit their size.
        """
        place = self._places.get((item.id, answer), self._places.get((item.id, None)))
        if place is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(place)
            value = json.loads(file.readline())
        return {name: {int(frame): mask_lib.decode(one) for frame, one in frames.items()}
                for name, frames in value["masks"].items()}

    def add(self, item: benchmarks.Item, answer: str, found: Masks) -> None:
        """Appends the masks of an answer."""
        value: dict[str, Any] = {"id": item.id, "answer": answer, "masks": {
            name: {str(frame): mask_lib.encode(one) for frame, one in frames.items()}
            for name, frames in found.items()}}
        text = json.dumps(value) + "\n"   # ASCII
        predictions.append_lines(self.path, text)
        self._places[item.id, answer] = self.path.stat().st_size - len(text)


def recorded(path: str | os.PathLike) -> Segment:
    """Returns a function that finds masks in a file.

    Raises:
      ValueError: there is no such file, or, later, no masks of an answer.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"masks must be a file of JSON lines; got {path}")
    record = Record(path)

    def segment(item, answer, target) -> Masks:
        found = record.find(item, answer)
        if found is None:
            raise ValueError(f"{path} must hold masks of every answer; got none of {item.id}")
        return found
    return segment


def sam2(model: str, path: str | os.PathLike | None = None) -> Segment:
    """Returns a function that segments with SAM 2, and records in a file what it makes.

    Raises:
      ValueError: SAM 2 is not installed.
    """
    try:
        from sam2 import sam2_video_predictor
    except ImportError:
        raise ValueError("masks by SAM 2 need its package: pip install sam2 "
                         "(https://github.com/facebookresearch/sam2), or give masks with --masks") from None
    predictor = sam2_video_predictor.SAM2VideoPredictor.from_pretrained(model)
    record = Record(path) if path else None

    def segment(item, answer, target) -> Masks:
        found = record.find(item, answer) if record else None
        if found is None:
            found = _propagated(predictor, item.example.video, track_scores.read(target, answer))
            if record:
                record.add(item, answer, found)
        return found
    return segment


def _propagated(predictor, path: str, prompts: Mapping[int, Mapping[str, track_scores.XY]]) -> Masks:
    """Returns masks in all frames: points prompt their frame, each up to the next one with points.

    Frames before the first points are reached backwards.
    """
    names = list(dict.fromkeys(name for places in prompts.values() for name in places))
    found: dict[str, dict[int, np.ndarray]] = {name: {} for name in names}
    if not names:
        return found
    with tempfile.TemporaryDirectory() as folder:
        count = _write_frames(path, pathlib.Path(folder))
        prompts = {min(frame, count - 1): places for frame, places in sorted(prompts.items(), reverse=True)}
        state = predictor.init_state(video_path=folder)
        starts = sorted(prompts)
        for place, start in enumerate(starts):
            for name, (x, y) in prompts[start].items():
                predictor.add_new_points_or_box(
                    inference_state=state, frame_idx=start, obj_id=names.index(name),
                    points=np.array([[x, y]], np.float32), labels=np.array([1], np.int32),
                    clear_old_points=True)
            end = starts[place + 1] if place + 1 < len(starts) else count
            _keep(found, names, predictor.propagate_in_video(
                state, start_frame_idx=start, max_frame_num_to_track=max(end - start - 1, 0)))
        if starts[0]:
            _keep(found, names, predictor.propagate_in_video(
                state, start_frame_idx=starts[0], max_frame_num_to_track=starts[0], reverse=True))
    return found


def _keep(found: dict[str, dict[int, np.ndarray]], names: list[str], made: Iterator) -> None:
    """Adds the masks of (frame, objects, logits [N, 1, H, W]) triples; earlier ones of a frame stay."""
    for frame, objects, logits in made:
        for number, one in zip(objects, logits, strict=True):
            mask = np.asarray(one.cpu() if hasattr(one, "cpu") else one)[0] > 0
            found[names[number]].setdefault(int(frame), mask)


def _write_frames(path: str, folder: pathlib.Path) -> int:
    """Writes all frames of a video as 00000.jpg, 00001.jpg ... and returns their number."""
    seconds = np.asarray(video.index(path).elapsed)
    for begin in range(0, len(seconds), _CHUNK):
        chunk = seconds[begin:begin + _CHUNK]
        for number, pixels in enumerate(video.read(path, max_frames=len(chunk), seconds=chunk).pixels, begin):
            Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=95)
    return len(seconds)
