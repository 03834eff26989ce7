"""Points against one region: Point-Bench (all points in a mask) and screens (the first point in an element).

Source: paper, section 4; evaluation of PointArena (Point-Bench), ScreenSpot and OSWorld-G.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.scoring import hits
from molmo2_jax.inputs import points


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskTarget:
    """The region that every point must be in: bool[H, W], whose size may differ from the image's.

    category: "affordable", "counting", "reasoning", "spatial" or "steerable" in Point-Bench.
    """
    mask: np.ndarray
    width: int
    height: int
    category: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxTarget:
    """The element to click: (left, top, right, bottom) in pixels of the image, edges included."""
    box: tuple[float, float, float, float]
    width: int
    height: int

    def __post_init__(self):
        left, top, right, bottom = self.box
        if not (left <= right and top <= bottom):
            raise ValueError("a box must be (left, top, right, bottom), left <= right and top <= bottom; "
                             f"got {self.box}")

    def holds(self, x: float, y: float) -> bool:
        """Returns whether a point is in the box."""
        left, top, right, bottom = self.box
        return left <= x <= right and top <= y <= bottom

    @property
    def inside(self) -> tuple[float, float]:
        """Returns the centre of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolygonTarget:
    """An element to click with these corners, (x, y) in pixels of the image; crossing edges cut holes.

    Raises:
      ValueError: there are fewer than three corners.
    """
    corners: tuple[tuple[float, float], ...]
    width: int
    height: int

    def __post_init__(self):
        if len(self.corners) < 3:
            raise ValueError(f"a polygon must have at least three corners; got {self.corners}")

    def holds(self, x: float, y: float) -> bool:
        """Returns whether a point is inside: a line from it to the right crosses an odd number of edges."""
        is_inside = False
        for (x0, y0), (x1, y1) in zip(self.corners, (*self.corners[1:], self.corners[0]), strict=True):
            if (y0 > y) != (y1 > y) and x < (x1 - x0) * (y - y0) / (y1 - y0) + x0:
                is_inside = not is_inside
        return is_inside

    @property
    def inside(self) -> tuple[float, float]:
        """Returns a point inside: the middle of the first stretch inside on a line between two corners."""
        heights = sorted({y for _, y in self.corners})
        y = (heights[0] + heights[1]) / 2
        crossed = sorted((x1 - x0) * (y - y0) / (y1 - y0) + x0 for (x0, y0), (x1, y1) in
                         zip(self.corners, (*self.corners[1:], self.corners[0]), strict=True)
                         if (y0 > y) != (y1 > y))
        return (crossed[0] + crossed[1]) / 2, y


def read(target: MaskTarget | BoxTarget | PolygonTarget, answer: str) -> list[tuple[float, float]]:
    """Returns (x, y) in pixels of the image, in the order of the answer."""
    return [(point.x, point.y) for point in points.parse_points(answer, target.width, target.height)]


def score_masks(targets: Sequence[MaskTarget], answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, the mean over categories of accuracy_CATEGORY, these themselves, and valid.

    An answer is right if it has a point and every point is in the mask. Coordinates are truncated to
    integers; a point outside the mask's array is a miss. valid is the share of answers with a point.

    Raises:
      ValueError: there is no answer.
    """
    rows = []
    for target, answer in zip(targets, answers, strict=True):
        found = read(target, answer)
        is_right = bool(found) and all(hits.inside(target.mask, int(x), int(y)) for x, y in found)
        rows.append({f"accuracy_{target.category}": float(is_right), "valid": float(bool(found))})
    scores = hits.means(rows)
    categories = [value for name, value in scores.items() if name != "valid"]
    return {"accuracy": float(np.mean(categories))} | scores


def score_boxes(targets: Sequence[BoxTarget | PolygonTarget], answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, the share of answers whose first point is in the element, and valid, those with a
    point.

    Raises:
      ValueError: there is no answer.
    """
    rows = []
    for target, answer in zip(targets, answers, strict=True):
        found = read(target, answer)
        is_right = bool(found) and target.holds(*found[0])
        rows.append({"accuracy": float(is_right), "valid": float(bool(found))})
    return hits.means(rows)
