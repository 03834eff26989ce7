"""Precision, recall and F1 of pointing in images and videos: a point is a hit if it falls inside a mask.

The clean rule matches predictions one-to-one with the masks they fall inside, for the most hits. The
`_reference` variants first pair predictions with annotated points by distance, then test each pair; published
numbers use them. The two differ where the nearest pairing is not the best one.

Source: paper, section 4; reference: olmo/eval/evaluators.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines import annotations
from data_pipelines.scoring import hits
from molmo2_jax import types
from molmo2_jax.inputs import points


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointTarget:
    """The points of a correct answer, and their masks.

    points: (index, x, y): index is an image number or seconds, x and y are pixels.
    masks: for each point, bool[H, W] by image number, or by seconds rounded to one decimal as in answers.
    media: the images, or the video.
    """
    points: tuple[tuple[float, float, float], ...]
    masks: tuple[Mapping[float, np.ndarray], ...]
    media: types.Media


def missing(annotation: annotations.Points) -> str:
    """Returns a sentence that names a point without a mask, which prevents a score; "" if all have one."""
    known = {mask.id for mask in annotation.masks}
    point = next((point for point in annotation.points if point.id not in known), None)
    return "" if point is None else (
        f"scoring points needs a mask of every object; got none of id {point.id} ({annotation.label})")


def target(annotation: annotations.Points, media: types.Media) -> PointTarget:
    """Returns the target of a points annotation.

    Raises:
      ValueError: a point has no mask, see `missing`; or a mask's counts do not fit its size.
    """
    if why := missing(annotation):
        raise ValueError(why)
    found, shapes = [], []
    for point in annotation.points:
        x, y = annotations.relative(annotation, point, media)
        width, height = media.sizes[point.place]
        index = point.time if media.is_video else point.image
        found.append((float(index), x * width, y * height))
        shapes.append({_key(mask.time if media.is_video else mask.image): mask.decode()
                       for mask in annotation.masks if mask.id == point.id})
    return PointTarget(points=tuple(found), masks=tuple(shapes), media=media)


def _key(index: float) -> float:
    return round(float(index), 1)


def score(targets: Sequence[PointTarget], answers: Sequence[str]) -> dict[str, float]:
    """Returns means over all examples of precision, recall and f1, their _reference variants (single images
    and videos only), and valid, the share of answers with at least one point.

    Raises:
      ValueError: there are no answers, or not one per target.
    """
    return hits.means([score_points(one, read(one, answer))
                       for one, answer in zip(targets, answers, strict=True)])


def read(target: PointTarget, answer: str) -> list[tuple[float, float, float]]:
    """Returns (index, x, y) of each point in an answer; x and y in pixels."""
    sizes = None if target.media.is_video else target.media.sizes
    width, height = (None, None) if sizes else target.media.sizes[0]
    found = points.parse_points(answer, width, height, sizes=sizes)
    return [(point.index, point.x, point.y) for point in found]


def score_points(target: PointTarget, predicted: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    """Returns the scores of one example, given the points read from its answer."""
    is_hit = np.array([[_is_hit(target, g, p) for p in predicted] for g in range(len(target.points))], bool)
    found = hits.most_hits(is_hit) if is_hit.size else 0
    row = _named(hits.precision_recall_f1(found, len(predicted), len(target.points)), "")
    if target.media.is_video or len(target.media.sizes) == 1:
        row |= _named(reference_scores(target, predicted), "_reference")
    return row | {"valid": float(len(predicted) > 0)}


def _named(scores, suffix: str) -> dict[str, float]:
    return {name + suffix: value for name, value in zip(("precision", "recall", "f1"), scores, strict=True)}


def _is_hit(target: PointTarget, g: int, predicted: tuple[float, float, float]) -> bool:
    index, x, y = predicted
    mask = target.masks[g].get(_key(index))
    if mask is None:
        return False
    # 1000 thousandths is the frame's edge, half a pixel beyond the centre of the last pixel
    return hits.inside(mask, min(x, mask.shape[1] - 1), min(y, mask.shape[0] - 1))


def reference_scores(target: PointTarget, predicted) -> tuple[float, float, float]:
    """Returns precision, recall and F1 by the reference's rule: nearest pairs, exact times, F1 with 1e-10."""
    if not target.points or not predicted:
        return hits.precision_recall_f1(0, len(predicted), len(target.points))
    truth, given = (_spread(target, rows) for rows in (target.points, predicted))
    found = 0
    for g, p in hits.nearest_pairs(truth, given):
        index, x, y = predicted[p]
        found += hits.inside(target.masks[g].get(index), x, y)
    return hits.precision_recall_f1(found, len(predicted), len(target.points), hits.EPSILON)


def _spread(target: PointTarget, rows) -> np.ndarray:
    """Returns the coordinates in which the reference measures distance: percent for videos, else pixels."""
    rows = np.asarray(rows, np.float64)
    if not target.media.is_video:
        return rows[:, 1:]
    scales = (target.media.duration, *target.media.sizes[0])
    percent = [[round(100 * float(value) / scale, 1) for value, scale in zip(row, scales, strict=True)]
               for row in rows]
    return np.array(percent)
