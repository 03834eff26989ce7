"""Answers to the annotations of a data folder -> the scores of each kind, under one set of names."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.scoring import choices
from data_pipelines.scoring import counting
from data_pipelines.scoring import hits
from data_pipelines.scoring import points
from data_pipelines.scoring import tracks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """An annotation (validated, from data_pipelines.sources), what the model said, and the media's size.

    sizes: (width, height) of each image, or of the video. duration: of the clip in seconds; None for images.
    """
    annotation: Mapping[str, Any]
    answer: str
    sizes: tuple[tuple[int, int], ...]
    duration: float | None = None


def score(answered: Sequence[Answered]) -> dict[str, float]:
    """Returns scores named KIND_SCORE and the number of answers behind them, KIND_examples.

    Kinds: video_point, image_point, image_set_point; count (every question for a number, read from the
    sentence); track; choice; qa (equal texts but for case, spaces and a final dot). Captions have no score.
    video_point_f1, count_accuracy, track_jf, choice_accuracy are the headline names.
    """
    grouped: dict[str, list[Answered]] = {}
    for one in answered:
        for kind in _kinds(one):
            grouped.setdefault(kind, []).append(one)
    scores = {}
    for kind, items in sorted(grouped.items()):
        found = _SCORES[kind.rsplit("_", 1)[-1]](items)
        scores |= {f"{kind}_{name}": value for name, value in found.items()}
        scores[f"{kind}_examples"] = float(len(items))
    return scores


def _kinds(one: Answered) -> list[str]:
    kind = one.annotation["type"]
    if kind == "points":
        medium = "video" if one.duration is not None else "image" if len(one.sizes) == 1 else "image_set"
        mode = one.annotation["mode"]
        return ([f"{medium}_point"] if mode != "count" else []) + (["count"] if mode != "bare" else [])
    return [{"tracks": "track"}.get(kind, kind)] if kind in ("count", "tracks", "choice", "qa") else []


def _answers(items: Sequence[Answered]) -> list[str]:
    return [one.answer for one in items]


def _points(items):
    targets = [points.target(one.annotation, sizes=one.sizes, duration=one.duration) for one in items]
    return points.score(targets, _answers(items))


def _count(items):
    targets = [one.annotation["count"] if one.annotation["type"] == "count" else len(one.annotation["points"])
               for one in items]
    scores = counting.score(targets, _answers(items))
    return {"accuracy": scores["correct"]} | scores


def _track(items):
    targets = [tracks.target(one.annotation, size=one.sizes[0]) for one in items]
    return tracks.score(targets, _answers(items))


def _choice(items):
    targets = [choices.Target(one.annotation["question"], one.annotation["options"],
                              one.annotation["answer"], one.annotation.get("labelled", True))
               for one in items]
    return choices.score(targets, _answers(items))


def _qa(items):
    return hits.means([{"accuracy": float(_plain(one.answer) == _plain(one.annotation["answer"]))}
                       for one in items])


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


_SCORES: dict[str, Callable[[Sequence[Answered]], dict[str, float]]] = {
    "point": _points, "count": _count, "track": _track, "choice": _choice, "qa": _qa,
}
