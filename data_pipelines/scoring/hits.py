"""Hits of predicted points on masks, and scores derived from them: shared by pointing and tracking.

G ground-truth points, P predicted points, positions (x, y) in pixels.
"""

import numpy as np
from scipy import optimize

EPSILON = 1e-10  # in the reference's F1


def inside(mask: np.ndarray | None, x: float, y: float) -> bool:
    """Returns whether the mask is set at the rounded pixel; False outside the image or without a mask."""
    if mask is None:
        return False
    column, row = round(float(x)), round(float(y))
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column])


def most_hits(is_hit_GP: np.ndarray) -> int:
    """Returns the largest number of hits in a one-to-one matching."""
    rows, columns = optimize.linear_sum_assignment(is_hit_GP, maximize=True)
    return int(is_hit_GP[rows, columns].sum())


def nearest_pairs(truth_G2: np.ndarray, predicted_P2: np.ndarray) -> list[tuple[int, int]]:
    """Returns the one-to-one pairs (g, p) with the smallest total distance (any number of coordinates)."""
    distance_GP = np.linalg.norm(truth_G2[:, None] - predicted_P2[None], axis=-1)
    return [(int(g), int(p)) for g, p in zip(*optimize.linear_sum_assignment(distance_GP), strict=True)]


def precision_recall_f1(hits: int, num_predicted: int, num_true: int,
                        epsilon: float = 0.0) -> tuple[float, float, float]:
    """Returns (precision, recall, F1); all are 1 if nothing is predicted and nothing is true."""
    if not num_true:
        perfect = float(not num_predicted)
        return perfect, perfect, perfect
    if not hits or not num_predicted:
        return 0.0, 0.0, 0.0
    precision, recall = hits / num_predicted, hits / num_true
    return precision, recall, 2 * precision * recall / (precision + recall + epsilon)


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each score over the rows that have it.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a score needs at least one example; got none")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
