"""Points in images, in several images, and in videos."""

import math
from collections.abc import Iterable, Iterator

from data_pipelines.schemas import grouping

MOST_POINTS = 60        # of an annotation, and of a record of PixMo points
LONGEST_CLIP = 63.0     # seconds; 127 frames at 2 per second
GRID = 0.5              # seconds; videos are annotated at 2 frames per second


def pixmo_points(rows: Iterable[dict]) -> Iterator[dict]:
    """image_sha256, label, points [{x, y} in percent]; used twice, asked with a count and without."""
    for image, group in grouping.by(rows, "image_sha256"):
        wanted = [row for row in group if len(row["points"]) <= MOST_POINTS]
        for part in _parts(wanted):
            for mode in ("point_count", "bare"):
                yield {"images": [f"media/{image}.jpg"], "scale": 100,
                       "annotations": [_points(row["label"], row["points"], mode) for row in part]}


def _parts(rows: list[dict]) -> Iterator[list[dict]]:
    """Yields the rows of an image in parts of at most MOST_POINTS points, in order."""
    part, number = [], 0
    for row in rows:
        if part and number + len(row["points"]) > MOST_POINTS:
            yield part
            part, number = [], 0
        part.append(row)
        number += len(row["points"])
    if part:
        yield part


def _points(label: str, points: Iterable[dict], mode, **more) -> dict:
    return {"type": "points", "label": label, "mode": mode, **more,
            "points": [{"x": _percent(point["x"]), "y": _percent(point["y"])} for point in points]}


def _percent(value: float) -> float:
    return min(max(value, 0.0), 100.0)


def pixmo_count(rows: Iterable[dict]) -> Iterator[dict]:
    """image_sha256, label, points {x: [...], y: [...]} in pixels; used twice as pixmo_points."""
    for row in rows:
        places = [{"x": x, "y": y} for x, y in zip(row["points"]["x"], row["points"]["y"], strict=True)]
        for mode in ("point_count", "bare"):
            yield {"images": [f"media/{row['image_sha256']}.jpg"], "annotations": [
                {"type": "points", "label": row["label"], "mode": mode, "points": places}]}


def cosyn_point(rows: Iterable[dict]) -> Iterator[dict]:
    """id, questions, answer_points [{x, y} in percent, or lists of them], names: question as prompt."""
    for row in rows:
        annotations = []
        for question, points, name in zip(row["questions"], row["answer_points"], row["names"], strict=True):
            if isinstance(points, dict):
                points = [{"x": x, "y": y} for x, y in zip(points["x"], points["y"], strict=True)]
            annotations.append(_points(name, points, "bare", prompt=question))
        yield {"images": [f"media/{row['id']}.jpg"], "scale": 100, "annotations": annotations}


def multi_image_point(rows: Iterable[dict]) -> Iterator[dict]:
    """id, images, labels, normalized_labels, points per image [{x, y} in percent].

    One record per normalised label, where the reference draws one of them at each use.
    """
    for row in rows:
        names = dict(zip(reversed(row["normalized_labels"]), reversed(row["labels"]), strict=True))
        for normal in dict.fromkeys(row["normalized_labels"]):
            points = [{"image": number, "x": _percent(point["x"]), "y": _percent(point["y"])}
                      for number, (label, places) in enumerate(
                          zip(row["normalized_labels"], row["points"], strict=True), start=1)
                      if label == normal for point in places]
            yield {"images": row["images"], "scale": 100, "annotations": [
                {"type": "points", "label": names[normal], "mode": ["bare", "point_count"],
                 "points": points}]}


def video_point(rows: Iterable[dict], *, fewest: int = 0, most: int = MOST_POINTS) -> Iterator[dict]:
    """video_id, video_duration, clip_start, clip_end, label, count, two_fps_timestamps, points per time.

    Videos of up to 63 s with several rows are one tree; others are cut to the row's clip. Rows whose times
    lie outside their clip are left out.
    """
    wanted = [row for row in rows if fewest <= row["count"] <= most]
    for video, group in grouping.by(wanted, "video_id"):
        clips: dict[tuple[float, float] | None, list[dict]] = {}
        for row in group:
            clip = _clip(row)
            if clip is not None:
                clips.setdefault(clip, []).append(_video_points(row))
        for (start, end), annotations in clips.items():
            whole = start == 0 and end == group[0]["video_duration"]
            record = {"video": f"media/{video}_2fps.mp4", "scale": 100} | (
                {} if whole else {"clip": [start, end]})
            if whole:
                yield record | {"annotations": annotations}
            else:
                yield from (record | {"annotations": [one]} for one in annotations)


def _clip(row: dict) -> tuple[float, float] | None:
    """Returns the seconds to show, None where no clip of at most 63 s holds all annotated times."""
    duration, times = row["video_duration"], row["two_fps_timestamps"]
    start, end = (0.0, duration) if duration <= LONGEST_CLIP else (row["clip_start"], row["clip_end"])
    if start is None or end is None:
        return None
    first, last = (min(times), max(times)) if times else (0.0, min(duration, LONGEST_CLIP))
    is_good = 0 <= start < end <= duration and end - start <= LONGEST_CLIP and start <= first and last <= end
    return (start, end) if is_good else None


def _video_points(row: dict) -> dict:
    """Returns the annotation, times on the grid of the video; each use draws whether a count is asked for."""
    points = [{"time": math.floor(time / GRID) * GRID, "x": _percent(point["x"]), "y": _percent(point["y"])}
              for time, places in zip(row["two_fps_timestamps"], row["points"], strict=True)
              for point in sorted(places, key=lambda point: (point["x"], point["y"]))]
    return {"type": "points", "label": row["label"], "mode": ["point_count", "bare"], "points": points}
