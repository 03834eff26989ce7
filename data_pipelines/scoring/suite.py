"""Answers to the annotations of a data folder -> the scores of each kind, under one set of names."""

import dataclasses
from collections.abc import Callable, Sequence

from data_pipelines import annotations
from data_pipelines.scoring import choices
from data_pipelines.scoring import counting
from data_pipelines.scoring import hits
from data_pipelines.scoring import points
from data_pipelines.scoring import tracks
from molmo2_jax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """An annotation, what the model said, and the media that both are relative to."""
    annotation: annotations.Annotation
    answer: str
    media: types.Media


Score = Callable[[Sequence[Answered]], dict[str, float]]


def score(answered: Sequence[Answered]) -> dict[str, float]:
    """Returns scores named KIND_SCORE and the number of answers behind them, KIND_examples.

    Kinds: video_point, image_point, image_set_point; count (every question for a number, read from the
    sentence); track; choice; qa (equal texts but for case, spaces and a final dot). Captions have no score.
    video_point_f1, count_accuracy, track_jf, choice_accuracy are the headline names.
    """
    grouped: dict[str, list[Answered]] = {}
    scorers: dict[str, Score] = {}
    for one in answered:
        scores_of = SCORES[type(one.annotation)]
        for kind, scorer in scores_of(one).items() if scores_of else ():
            scorers[kind] = scorer
            grouped.setdefault(kind, []).append(one)
    scores = {}
    for kind, items in sorted(grouped.items()):
        scores |= {f"{kind}_{name}": value for name, value in scorers[kind](items).items()}
        scores[f"{kind}_examples"] = float(len(items))
    return scores


def _of_points(one: Answered) -> dict[str, Score]:
    """Returns how points are scored: as points, as a number, or as both."""
    medium = "video" if one.media.is_video else "image" if len(one.media.sizes) == 1 else "image_set"
    mode = one.annotation.mode
    return (({f"{medium}_point": _points} if mode != "count" else {})
            | ({"count": _count} if mode != "bare" else {}))


def _answers(items: Sequence[Answered]) -> list[str]:
    return [one.answer for one in items]


def _points(items):
    return points.score([points.target(one.annotation, one.media) for one in items], _answers(items))


def _count(items):
    targets = [len(one.annotation.points) if isinstance(one.annotation, annotations.Points)
               else one.annotation.count for one in items]
    scores = counting.score(targets, _answers(items))
    return {"accuracy": scores["correct"]} | scores


def _track(items):
    return tracks.score([tracks.target(one.annotation, one.media) for one in items], _answers(items))


def _choice(items):
    asked = [one.annotation for one in items]
    targets = [choices.Target(one.question, one.options, one.answer, one.labelled) for one in asked]
    return choices.score(targets, _answers(items))


def _qa(items):
    return hits.means([{"accuracy": float(_without_dots(one.answer) == _without_dots(one.annotation.answer))}
                       for one in items])


def _without_dots(text: str) -> str:
    """Returns the text in lower case with single spaces, without dots at its end."""
    return " ".join(text.lower().split()).rstrip(".")


# Which scores an answer to this kind of annotation counts for, by their names; None: it has no score.
SCORES: dict[type[annotations.Annotation], Callable[[Answered], dict[str, Score]] | None] = {
    annotations.Points: _of_points,
    annotations.Tracks: lambda one: {"track": _track},
    annotations.Count: lambda one: {"count": _count},
    annotations.QA: lambda one: {"qa": _qa},
    annotations.Choice: lambda one: {"choice": _choice},
    annotations.Chat: None,
    annotations.Caption: None,
}
