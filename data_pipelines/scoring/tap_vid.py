"""TAP-Vid: tracks of single points through all frames, judged by distance and by visibility.

N points, F frames; positions (x, y) in pixels of the video.

Source: Doersch et al. 2022, section 4; google-deepmind/tapnet, compute_tapvid_metrics.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from data_pipelines.scoring import hits

RASTER = 256                       # pixels a side at which distances are measured
THRESHOLDS = (1, 2, 4, 8, 16)      # pixels of the raster


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracks:
    """Tracks of N points: `xy_NF2` in pixels, `visible_NF` bool. Positions of hidden points do not count."""
    xy_NF2: np.ndarray
    visible_NF: np.ndarray

    def __post_init__(self):
        if self.xy_NF2.shape != (*self.visible_NF.shape, 2):
            raise ValueError("tracks must be positions [N, F, 2] and visibility [N, F]; "
                             f"got {self.xy_NF2.shape} and {self.visible_NF.shape}")


Mode = Literal["first", "strided"]   # queries at first appearances, or every few frames


def evaluated_frames(query_frames_N: np.ndarray, num_frames: int, mode: Mode) -> np.ndarray:
    """Returns bool[N, F], the frames that count: those after the query ("first"), all others ("strided")."""
    frames_F = np.arange(num_frames)
    query_N1 = np.asarray(query_frames_N)[:, None]
    return frames_F > query_N1 if mode == "first" else frames_F != query_N1


def score_video(true: Tracks, given: Tracks, query_frames_N: np.ndarray, size: tuple[int, int],
                mode: Mode = "first") -> dict[str, float]:
    """Returns the scores of one video of `size` (width, height).

    average_jaccard, and jaccard_X: right points over those visible plus those wrongly given as visible,
    where right is visible in both and nearer than X pixels. delta_average, and delta_X: share of visible
    points nearer than X, whatever visibility was given. occlusion_accuracy. A score without anything to
    divide by is left out: deltas if no point is visible in the frames that count, all if there is no such
    frame.

    Raises:
      ValueError: the shapes of the tracks differ, or `mode` is unknown.
    """
    if true.xy_NF2.shape != given.xy_NF2.shape or mode not in ("first", "strided"):
        raise ValueError("tracks must have the same shape, and mode must be 'first' or 'strided'; "
                         f"got {true.xy_NF2.shape}, {given.xy_NF2.shape} and {mode!r}")
    counts_NF = evaluated_frames(query_frames_N, true.visible_NF.shape[1], mode)
    if not counts_NF.any():
        return {}
    offset_NF2 = (given.xy_NF2 - true.xy_NF2) * (RASTER / np.asarray(size, np.float64))
    squared_NF = np.square(offset_NF2).sum(-1)
    visible_NF, claimed_NF = true.visible_NF & counts_NF, given.visible_NF & counts_NF
    jaccards, deltas = {}, {}
    for threshold in THRESHOLDS:
        near_NF = squared_NF < threshold**2
        right = (near_NF & visible_NF & claimed_NF).sum()
        wrong = (claimed_NF & ~(near_NF & visible_NF)).sum()
        if visible_NF.any() or wrong:
            jaccards[f"jaccard_{threshold}"] = float(right / (visible_NF.sum() + wrong))
        if visible_NF.any():
            deltas[f"delta_{threshold}"] = float((near_NF & visible_NF).sum() / visible_NF.sum())
    scores = jaccards | deltas
    for name, parts in (("average_jaccard", jaccards), ("delta_average", deltas)):
        if len(parts) == len(THRESHOLDS):
            scores[name] = float(np.mean(list(parts.values())))
    is_equal_NF = true.visible_NF == given.visible_NF
    return scores | {"occlusion_accuracy": float(is_equal_NF[counts_NF].mean())}


def score(videos: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of every score over the videos that have it.

    Raises:
      ValueError: there is no video.
    """
    return hits.means(list(videos))
