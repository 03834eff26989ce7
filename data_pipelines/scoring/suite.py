"""Scores of answers to the annotations of a data folder, for every kind of annotation."""

import collections
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
    """An annotation, the model's answer, and the media that the coordinates of both refer to."""
    annotation: annotations.Annotation
    answer: str
    media: types.Media


Score = Callable[[Sequence[Answered]], dict[str, float]]


def score(answered: Sequence[Answered]) -> dict[str, float]:
    """Returns scores named KIND_SCORE, and KIND_examples, the number of answers that each kind scored.

    Kinds: video_point, image_point, image_set_point; count (every question that asks for a number, read from
    the sentence); track; choice; qa (texts are equal up to case, spaces and final dots). Captions and chats
    have no score. The headline scores are video_point_f1, count_accuracy, track_jf and choice_accuracy.
    KIND_left_out, present if not 0, counts answers that the kind cannot score, see `obstacle`.
    """
    grouped: dict[str, list[Answered]] = {}
    scorers: dict[str, Score] = {}
    left_out: collections.Counter[str] = collections.Counter()
    for one in answered:
        for kind, scorer in kinds(one.annotation, one.media).items():
            scorers[kind] = scorer
            if obstacle(one.annotation, scorer):
                left_out[kind] += 1
            else:
                grouped.setdefault(kind, []).append(one)
    scores: dict[str, float] = {f"{kind}_left_out": float(number) for kind, number in left_out.items()}
    for kind, items in sorted(grouped.items()):
        scores |= {f"{kind}_{name}": value for name, value in scorers[kind](items).items()}
        scores[f"{kind}_examples"] = float(len(items))
    return scores


def kinds(annotation: annotations.Annotation, media: types.Media) -> dict[str, Score]:
    """Returns the kinds of score that an answer enters, by name, even if an obstacle exists."""
    scores_of = SCORES[type(annotation)]
    return scores_of(annotation, media) if scores_of else {}


def obstacle(annotation: annotations.Annotation, scorer: Score) -> str:
    """Returns why an annotation cannot be scored this way, such as a missing mask; "" if it can."""
    return _MISSING[scorer](annotation) if scorer in _MISSING else ""


def _of_points(annotation: annotations.Points, media: types.Media) -> dict[str, Score]:
    """Returns how answers to points are scored: as points, as a number, or as both."""
    medium = "video" if media.is_video else "image" if len(media.sizes) == 1 else "image_set"
    mode = annotation.mode
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
    """Returns the text in lower case, with single spaces and without final dots."""
    return " ".join(text.lower().split()).rstrip(".")


# What an annotation lacks for a score; scores that are not named here lack nothing.
_MISSING: dict[Score, Callable[..., str]] = {_points: points.missing, _track: tracks.missing}

# The kinds of score that an answer to each kind of annotation enters, by name; None: it has no score.
SCORES: dict[type[annotations.Annotation],
             Callable[..., dict[str, Score]] | None] = {   # (annotation, media) ->
    annotations.Points: _of_points,
    annotations.Tracks: lambda annotation, media: {"track": _track},
    annotations.Count: lambda annotation, media: {"count": _count},
    annotations.QA: lambda annotation, media: {"qa": _qa},
    annotations.Choice: lambda annotation, media: {"choice": _choice},
    annotations.Chat: None,
    annotations.Caption: None,
}
