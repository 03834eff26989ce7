"""Scores of object tracks: point F1, HOTA, and J&F of masks picked by the predicted points.

F frames, G objects of the query, P predicted tracks. A point is right if it falls inside the object's mask.
The clean scores handle absent objects; the `_reference` ones count them in the recall and, where an object is
absent, look other objects up in the wrong mask. Published F1 and HOTA are the latter. Published J&F prompts a
segmenter with the points; this file instead takes the exact mask of the object that a point falls on.

Source: paper, section 4; reference: olmo/eval/object_tracking_utils.py; HOTA: Luiten et al. 2020;
J and F: Perazzi et al. 2016.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import ndimage
from scipy import optimize

from data_pipelines import annotations
from data_pipelines.scoring import hits
from molmo2_jax import types
from molmo2_jax.inputs import points

XY = tuple[float, float]
BOUNDARY_TOLERANCE = 0.008  # of the image diagonal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackTarget:
    """The tracks of a correct answer, and masks. Frames are numbered round(seconds x fps), as in answers.

    objects: ids of the query, in order.
    points: frame -> {id: (x, y)}, visible objects only; every frame that needs an answer is a key.
    masks: frame -> {id: bool[H, W]}, of the query's objects and of other objects in the video.
    """
    objects: tuple[Hashable, ...]
    points: Mapping[int, Mapping[Hashable, XY]]
    masks: Mapping[int, Mapping[Hashable, np.ndarray]]
    width: int
    height: int
    fps: float


def missing(annotation: annotations.Tracks) -> str:
    """Returns a sentence that names a visible point without a mask, so that it cannot be scored; "" if all
    visible points have one."""
    known = {(mask.id, _frame(mask.time, annotation.fps)) for mask in annotation.masks}
    for track in annotation.tracks:
        for point in track.points:
            frame = _frame(point.time, annotation.fps)
            if frame is not None and not point.occluded and (track.id, frame) not in known:
                return (f"scoring tracks needs a mask at every visible point; got none of id {track.id} at "
                        f"{point.time} seconds ({annotation.label})")
    return ""


def target(annotation: annotations.Tracks, media: types.Media) -> TrackTarget:
    """Returns the target of a tracks annotation, at its rate of points per second.

    Annotated times off the grid of that rate are left out, as in the answers the model is trained on.

    Raises:
      ValueError: a visible point has no mask, see `missing`; or a mask's counts do not fit its size.
    """
    if why := missing(annotation):
        raise ValueError(why)
    fps, (width, height) = annotation.fps, media.sizes[0]
    frames: dict[int, dict] = {}
    shapes: dict[int, dict] = {}
    for mask in annotation.masks:
        frame = _frame(mask.time, fps)
        if frame is not None:
            shapes.setdefault(frame, {})[mask.id] = mask.decode()
    for track in annotation.tracks:
        for point in track.points:
            frame = _frame(point.time, fps)
            if frame is None:
                continue
            visible = frames.setdefault(frame, {})
            if point.occluded:
                continue
            x, y = annotations.relative(annotation, point, media)
            visible[track.id] = (x * width, y * height)
    objects = tuple(track.id for track in annotation.tracks)
    return TrackTarget(objects=objects, points=frames, masks=shapes, width=width, height=height, fps=fps)


def _frame(seconds: float, fps: float) -> int | None:
    """Returns the number of the frame at a time; None between frames."""
    frame = round(seconds * fps)
    return frame if abs(frame / fps - seconds) <= annotations.TIME_TOLERANCE else None


def score(targets: Sequence[TrackTarget], answers: Sequence[str]) -> dict[str, float]:
    """Returns means over all examples: precision, recall, f1, HOTA, DetA, AssA, DetPr, DetRe (each also with
    _reference), j, f, jf, jf_merged, and valid, the share of answers with a track.

    Raises:
      ValueError: there are no answers, or not one per target.
    """
    rows = []
    for one, answer in zip(targets, answers, strict=True):
        predicted = read(one, answer)
        rows.append(score_points(one, predicted) | score_masks(one, predicted)
                    | {"valid": float(bool(predicted))})
    return hits.means(rows)


def read(target: TrackTarget, answer: str) -> dict[int, dict[str, XY]]:
    """Returns frame -> {id: (x, y) in pixels} of an answer; of two times in one frame the earlier is used."""
    frames: dict[int, dict[str, XY]] = {}
    for tracked in points.parse_tracks(answer, target.width, target.height, target.fps):
        for name, place in tracked.points.items():
            frames.setdefault(tracked.frame, {}).setdefault(name, place)
    return frames


def score_points(target: TrackTarget, predicted: Mapping[int, Mapping[str, XY]]) -> dict[str, float]:
    """Returns F1 and HOTA scores of one example, by the clean and by the reference's rule."""
    clean = _f1(target, predicted) | _hota(target, predicted, False)
    reference = _f1_reference(target, predicted) | _hota(target, predicted, True)
    return clean | {f"{name}_reference": value for name, value in reference.items()}


def _frames(target, predicted) -> list[int]:
    return sorted(set(target.points) | set(predicted))


def _hits(target: TrackTarget, predicted, frame: int, by_position: bool) -> tuple[list, list, np.ndarray]:
    """Returns ids of present objects, ids of predictions, and bool[G, P]: which point is inside which mask.

    by_position: repeat the reference's error: use the mask of the k-th object of the query for the k-th
    object
      present.
    """
    present = [name for name in target.objects if name in target.points.get(frame, {})]
    given = list(predicted.get(frame, {}))
    shapes = target.masks.get(frame, {})
    owners = target.objects[:len(present)] if by_position else present
    table = [[hits.inside(shapes.get(owner), *predicted[frame][name]) for name in given] for owner in owners]
    return present, given, np.array(table, bool).reshape(len(present), len(given))


def _named_f1(rows) -> dict[str, float]:
    if not rows:
        rows = [(1.0, 1.0, 1.0)]  # neither tracks nor predictions
    return dict(zip(("precision", "recall", "f1"), np.mean(rows, axis=0).tolist(), strict=True))


def _f1(target, predicted) -> dict[str, float]:
    rows = []
    for frame in _frames(target, predicted):
        present, given, is_hit = _hits(target, predicted, frame, False)
        found = hits.most_hits(is_hit) if is_hit.size else 0
        rows.append(hits.precision_recall_f1(found, len(given), len(present)))
    return _named_f1(rows)


def _f1_reference(target, predicted) -> dict[str, float]:
    rows = []
    for frame in _frames(target, predicted):
        present, given, is_hit = _hits(target, predicted, frame, True)
        found, total = 0, len(present)
        if is_hit.size:
            truth = np.array([target.points[frame][name] for name in present], np.float64)
            places = np.array([predicted[frame][name] for name in given], np.float64)
            pairs = hits.nearest_pairs(truth, places)
            found, total = sum(bool(is_hit[pair]) for pair in pairs), len(target.objects)
        rows.append(hits.precision_recall_f1(found, len(given), total, hits.EPSILON))
    return _named_f1(rows)


def _hota(target: TrackTarget, predicted, by_position: bool) -> dict[str, float]:
    """Returns HOTA and its parts at threshold 0.5; all thresholds agree, as similarity is 0 or 1."""
    names = sorted({name for frame in predicted.values() for name in frame}, key=str)
    seen = {name for frame in target.points.values() for name in frame}
    parts = ("HOTA", "DetA", "AssA", "DetPr", "DetRe")
    if not names or not seen:
        return dict.fromkeys(parts, float(not names and not seen))
    rows = {name: g for g, name in enumerate(target.objects)}
    columns = {name: p for p, name in enumerate(names)}
    frames = []
    for frame in _frames(target, predicted):
        present, given, is_hit = _hits(target, predicted, frame, by_position)
        frames.append((np.array([rows[name] for name in present], int),
                       np.array([columns[name] for name in given], int), is_hit.astype(float)))
    return dict(zip(parts, _hota_of(frames, len(rows), len(columns)), strict=True))


def _hota_of(frames, G: int, P: int) -> tuple[float, ...]:
    """Returns (HOTA, DetA, AssA, DetPr, DetRe) of frames of (object rows, track columns, similarity)."""
    overlap, true_counts, given_counts = np.zeros((G, P)), np.zeros((G, 1)), np.zeros((1, P))
    for g, p, similarity in frames:
        total = similarity.sum(0)[None] + similarity.sum(1)[:, None] - similarity
        overlap[np.ix_(g, p)] += np.divide(similarity, total, out=np.zeros_like(similarity), where=total > 0)
        true_counts[g, 0] += 1
        given_counts[0, p] += 1
    union = true_counts + given_counts
    alignment = np.divide(overlap, union - overlap, out=np.zeros_like(overlap), where=union > overlap)
    matches, hit, missed, false = np.zeros((G, P)), 0, 0, 0
    for g, p, similarity in frames:
        first, second = optimize.linear_sum_assignment(alignment[np.ix_(g, p)] * similarity, maximize=True)
        is_match = similarity[first, second] >= 0.5
        matches[g[first[is_match]], p[second[is_match]]] += 1
        hit += is_match.sum()
        missed += len(g) - is_match.sum()
        false += len(p) - is_match.sum()
    detection = hit / max(1, hit + missed + false)
    association = (matches * matches / np.maximum(1, union - matches)).sum() / max(1, hit)
    return (math.sqrt(detection * association), float(detection), float(association),
            float(hit / max(1, hit + false)), float(hit / max(1, hit + missed)))


# ---- J&F


def score_masks(target: TrackTarget, predicted: Mapping[int, Mapping[str, XY]]) -> dict[str, float]:
    """Returns j, f and jf, means over objects and the target's frames, and jf_merged, of all objects as one.

    Every predicted point picks the mask of the object it falls on, if any. Tracks are matched to objects
    one-to-one for the largest J&F; objects without a track score 0, and so do tracks without an object
    (stricter than usual). jf_merged follows the protocol of sets with one mask per expression.
    """
    names = sorted({name for frame in predicted.values() for name in frame}, key=str)
    if not target.objects or not target.points:
        return dict.fromkeys(("j", "f", "jf", "jf_merged"), float(not names))
    empty = np.zeros((target.height, target.width), bool)
    return score_given(target, {name: {
        frame: _picked_mask(target, frame, predicted.get(frame, {}).get(name), empty)
        for frame in target.points} for name in names})


def score_given(target: TrackTarget, given: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, float]:
    """Returns the scores of score_masks for masks bool[H, W] by track and frame; absent ones are empty.

    Raises:
      ValueError: a mask has another size than the video.
    """
    if not target.objects or not target.points:
        return dict.fromkeys(("j", "f", "jf", "jf_merged"), float(not given))
    empty = np.zeros((target.height, target.width), bool)
    wrong = next((mask.shape for track in given.values() for mask in track.values()
                  if mask.shape != empty.shape), None)
    if wrong:
        raise ValueError(f"masks must have the video's size, {empty.shape}; got {wrong}")
    truth = [{frame: _true_mask(target, frame, name, empty) for frame in target.points}
             for name in target.objects]
    picked = [{frame: track.get(frame, empty) for frame in target.points} for track in given.values()]
    table = np.array([[_track_jf(true, given) for given in picked] for true in truth])
    table = table.reshape(len(truth), len(picked), 2)
    pairs = optimize.linear_sum_assignment(table.mean(axis=2), maximize=True)
    j, f = table[pairs].sum(axis=0) / max(len(truth), len(picked))
    merged = [_merge(tracks, target.points, empty) for tracks in (truth, picked)]
    return {"j": float(j), "f": float(f), "jf": float(j + f) / 2, "jf_merged": sum(_track_jf(*merged)) / 2}


def _true_mask(target, frame, name, empty):
    """Returns the mask of an object that is annotated as visible, else the empty mask."""
    return target.masks[frame][name] if name in target.points[frame] else empty


def _picked_mask(target, frame, place: XY | None, empty):
    if place is None:
        return empty
    x, y = min(place[0], target.width - 1), min(place[1], target.height - 1)
    return next((mask for mask in target.masks.get(frame, {}).values() if hits.inside(mask, x, y)), empty)


def _merge(tracks: Sequence[Mapping[int, np.ndarray]], frames, empty) -> dict[int, np.ndarray]:
    return {frame: np.logical_or.reduce([empty, *(track[frame] for track in tracks)]) for frame in frames}


def _track_jf(true: Mapping[int, np.ndarray], given: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Returns the mean J and the mean F over the frames."""
    pairs = [(true[frame], given[frame]) for frame in true]
    return (float(np.mean([region_similarity(*pair) for pair in pairs])),
            float(np.mean([boundary_similarity(*pair) for pair in pairs])))


def region_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Returns J, intersection over union of bool[H, W] masks; 1 if both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def boundary_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Returns F, the harmonic mean of boundary precision and recall; 1 if both boundaries are empty.

    A boundary pixel matches if the other boundary is within 0.008 of the image diagonal, rounded up.
    """
    edges = [_boundary(mask) for mask in (first, second)]
    if not edges[0].any() or not edges[1].any():
        return float(not edges[0].any() and not edges[1].any())
    if np.array_equal(first, second):
        return 1.0
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*first.shape))
    near = [ndimage.distance_transform_edt(~edge) <= radius for edge in edges]
    shares = [np.count_nonzero(edges[i] & near[1 - i]) / np.count_nonzero(edges[i]) for i in (0, 1)]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels that differ from the pixel to the right, below, or diagonally between them.

    The last row looks right only, the last column down only. Source: davis2017-evaluation, _seg2bmap.
    """
    edge = np.zeros_like(mask)
    edge[:-1, :-1] = ((mask[:-1, :-1] != mask[:-1, 1:]) | (mask[:-1, :-1] != mask[1:, :-1])
                      | (mask[:-1, :-1] != mask[1:, 1:]))
    edge[-1, :-1] = mask[-1, :-1] != mask[-1, 1:]
    edge[:-1, -1] = mask[:-1, -1] != mask[1:, -1]
    return edge
