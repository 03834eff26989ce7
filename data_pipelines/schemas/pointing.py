"""Points in images, in several images, and in videos."""

import math
from collections.abc import Iterable, Iterator, Sequence

from data_pipelines.schemas import answering
from data_pipelines.schemas import media

MOST_POINTS = 60        # most points of an annotation, and of a record of PixMo points
LONGEST_CLIP = 63.0     # seconds; 127 frames at 2 per second
GRID = 0.5              # seconds; videos are annotated at 2 frames per second
ROUNDING = 1e-6         # of a step of the grid
DIALOGUE = 0.2          # share of uses in which the questions about a video form one conversation
COPIES = ((5, 1), (25, 2), (math.inf, 4))   # (most points, uses) of an annotation that is oversampled
INTENTS = 0.8           # share of uses in which an element of a screenshot is asked for by an intent


def pixmo_points(rows: Sequence[dict], method: str = "") -> Iterator[dict]:
    """image_sha256, label, points [{x, y} in percent]: used twice, asked with a count and without.

    method: the collection_method to keep, "pointing" or "counting" (images with many points); "": both.
    """
    rows = [row | {"points": answering.pairs(row["points"])} for row in rows]
    wanted = [row for row in rows if len(row["points"]) <= MOST_POINTS
              and (not method or row.get("collection_method", method) == method)]
    for part in _parts(wanted):
        for mode in ("point_count", "bare"):
            yield {"images": [media.image(part[0])], "scale": 100,
                   "annotations": [_points(row["label"], row["points"], mode) for row in part]}


def _parts(rows: list[dict]) -> Iterator[list[dict]]:
    """Yields the rows of an image, in order, in parts of at most MOST_POINTS points."""
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


def pixmo_count(rows: Sequence[dict]) -> Iterator[dict]:
    """image_sha256, label, points {x: [...], y: [...]} in pixels: used twice, like pixmo_points."""
    for row in rows:
        places = [{"x": x, "y": y} for x, y in zip(row["points"]["x"], row["points"]["y"], strict=True)]
        for mode in ("point_count", "bare"):
            yield {"images": [media.image(row)], "annotations": [
                {"type": "points", "label": row["label"], "mode": mode, "points": places}]}


def cosyn_point(rows: Sequence[dict]) -> Iterator[dict]:
    """id, questions, answer_points [{x, y} in percent, or lists of them], names; questions are prompts."""
    for row in rows:
        annotations = []
        for question, points, name in zip(row["questions"], row["answer_points"], row["names"], strict=True):
            annotations.append(_points(name, answering.pairs(points), "bare", prompt=question,
                                       style="cosyn_point"))
        yield {"images": [media.image(row)], "scale": 100, "annotations": annotations}


def gui_point(rows: Sequence[dict]) -> Iterator[dict]:
    """image, annotation [{x_center, y_center, width, height in pixels, name, intent [texts]}] of screenshots.

    Each element is a question of its own, asked by one of its intents or by its name. The label in the answer
    is the name; the reference writes the intent there if it asked by one.
    """
    for row in rows:
        annotations = []
        for one in row["annotation"]:
            name = (one["name"] or "").strip()
            intents = [text for text in one["intent"] or () if text.strip()]
            if name or intents:
                asked = {"prompt": intents, "prompt_share": INTENTS if name else 1} if intents else {}
                annotations.append({"type": "points", "label": name or intents[0], "mode": "bare", **asked,
                                    "points": [{"x": one["x_center"], "y": one["y_center"]}]})
        if annotations:
            yield {"images": [media.image(row)], "annotations": annotations}


def multi_image_point(rows: Sequence[dict]) -> Iterator[dict]:
    """id, images, labels, normalized_labels, points per image [{x, y} in percent].

    One record per normalised label; the reference instead draws one of them at each use.
    """
    for row in rows:
        names = dict(zip(reversed(row["normalized_labels"]), reversed(row["labels"]), strict=True))
        for normal in dict.fromkeys(row["normalized_labels"]):
            points = [{"image": number, "x": _percent(point["x"]), "y": _percent(point["y"])}
                      for number, (label, places) in enumerate(
                          zip(row["normalized_labels"], row["points"], strict=True), start=1)
                      if label == normal for point in answering.pairs(places)]
            yield {"images": row["images"], "scale": 100, "annotations": [
                {"type": "points", "label": names[normal], "mode": ["bare", "point_count"],
                 "points": points}]}


def video_point(rows: Sequence[dict], *, fewest: int = 0, most: int = MOST_POINTS, oversampled: bool = False,
                longest: float = LONGEST_CLIP) -> Iterator[dict]:
    """video_id, video_duration, clip_start, clip_end, label, count, question, two_fps_timestamps, points per
    time.

    Videos of up to `longest` seconds with several rows form one tree, in some uses one conversation; longer
    videos are cut to the row's clip. Rows with times outside their clip are left out, and rows with fewer
    than `fewest` or more than `most` points. oversampled: rows with many points are used more often (COPIES),
    each time with those rows of the video that are used as often.
    """
    for copy in range(COPIES[-1][1] if oversampled else 1):
        used = [row for row in rows if fewest <= row["count"] <= most
                and copy < next(number for limit, number in COPIES if row["count"] <= limit)]
        yield from _of_clips(used, longest)


def _of_clips(rows: Sequence[dict], longest: float) -> Iterator[dict]:
    """Yields the records of some rows of a video."""
    clips: dict[tuple[float, float], list[dict]] = {}
    for row in rows:
        clip = _clip(row, longest)
        if clip is not None:
            clips.setdefault(clip, []).append(_video_points(row, row["two_fps_timestamps"], clip[0]))
    for (start, end), annotations in clips.items():
        record = {"video": f"media/{rows[0]['video_id']}_2fps.mp4", "scale": 100}
        if start > 0 or end < rows[0]["video_duration"]:
            yield from (record | {"clip": [start, end], "annotations": [one]} for one in annotations)
        elif len(annotations) > 1:
            yield record | {"dialogue": DIALOGUE, "annotations": annotations}
        else:
            yield record | {"annotations": annotations}


def _clip(row: dict, longest: float) -> tuple[float, float] | None:
    """Returns (start, end) of the clip to show in seconds.

    None if the row has no clip of at most `longest` seconds that holds all annotated times.
    """
    duration, times = row["video_duration"], row["two_fps_timestamps"]
    start, end = (0.0, duration) if duration <= longest else (row["clip_start"], row["clip_end"])
    if start is None or end is None:
        return None
    first, last = (min(times), max(times)) if times else (0.0, min(duration, longest))
    is_good = 0 <= start < end <= duration and end - start <= longest and start <= first and last <= end
    return (start, end) if is_good else None


def _video_points(row: dict, times: Sequence[float], start: float) -> dict:
    """Returns the annotation, times on the clip's grid; each use draws whether to ask for a count."""
    points = [{"time": _on_grid(time, start), "x": _percent(point["x"]), "y": _percent(point["y"])}
              for time, places in zip(times, row["points"], strict=True)
              for point in sorted(answering.pairs(places), key=lambda point: (point["x"], point["y"]))]
    asked = {"prompt": {"point_count": row["question"]}} if row.get("question") else {}
    modes = ["point_count", "bare"]
    return {"type": "points", "label": row["label"], "mode": modes, "points": points} | asked


def _on_grid(time: float, start: float) -> float:
    return start + math.floor((time - start) / GRID + ROUNDING) * GRID


def academic_video_point(rows: Sequence[dict]) -> Iterator[dict]:
    """subset, video_name, category, count, timestamps, points per time, video_duration, clip_start_time,
    clip_end_time; the video is media/SUBSET/NAME.mp4."""
    for row in rows:
        start, end = row["clip_start_time"], row["clip_end_time"]
        is_whole = start is None or end is None or start <= 0 and end >= row["video_duration"]
        if row["count"] <= MOST_POINTS:
            points = _video_points(row | {"label": row["category"].lower()}, row["timestamps"],
                                   0.0 if is_whole else start)
            yield {"video": f"media/{row['subset']}/{row['video_name']}.mp4", "scale": 100} | (
                {} if is_whole else {"clip": [start, end]}) | {"annotations": [points]}
