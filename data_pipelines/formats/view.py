"""What a format function knows besides the annotation: the media as the model will see them, and chance."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from molmo2_jax.inputs import prompt

TIME_TOLERANCE = 0.01   # seconds between an annotated and a shown time that count as the same
GRID = 0.5              # seconds; video points are annotated on this grid
NEAREST = 0.25          # seconds a video point may be moved to the nearest frame shown

XY = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """sizes: (width, height) in pixels of each image, or of the one video.

    seconds: float64[N] at which a video is shown, from the start of the clip; None for images and text.
    num_templates: use only the first so many templates of a family; None: all.
    is_pretraining: the first stage asks by labels and styles alone, and says how long the answer is.
    """
    sizes: tuple[tuple[int, int], ...]
    seconds: np.ndarray | None
    rng: np.random.Generator | np.random.RandomState
    train: bool
    num_templates: int | None = None
    is_pretraining: bool = False

    @property
    def medium(self) -> str:
        """Returns the word for the visual input in prompts."""
        if self.seconds is not None:
            return "video"
        return "image" if len(self.sizes) == 1 else "images"

    def below(self, number: int) -> int:
        """Returns a random integer 0 ... number - 1."""
        return min(int(self.rng.uniform() * number), number - 1)

    def pick(self, family: Sequence[str], bare: str = "") -> str:
        """Returns a random template in training, else the first; in pre-training `bare`."""
        if self.is_pretraining:
            return bare
        return family[self.below(len(family[:self.num_templates])) if self.train else 0]

    def one_of(self, texts: str | Sequence[str]) -> str:
        """Returns the text, or one of several: a random one in training, else the first."""
        if isinstance(texts, str):
            return texts
        return texts[self.below(len(texts)) if self.train else 0]

    def prefix(self, style: str, answer: str) -> str:
        """Returns what stands before a question of this style."""
        if not self.is_pretraining:
            return prompt.style_prefix(style)
        return prompt.pretrain_prefix(style, answer if self.train else None, self.rng)

    def shown(self, time: float) -> float | None:
        """Returns the time of the frame a video point belongs to: its own, else that of the 0.5 s grid it
        was annotated on, else the nearest shown within 0.25 s; None if there is none."""
        for candidate, tolerance in ((time, TIME_TOLERANCE), (time // GRID * GRID, TIME_TOLERANCE),
                                     (time, NEAREST)):
            nearest = self.seconds[np.abs(self.seconds - candidate).argmin()]
            if abs(nearest - candidate) <= tolerance:
                return float(nearest)
        return None


def relative(annotation: Mapping, point: Mapping, sizes: Sequence[tuple[int, int]]) -> XY:
    """Returns (x, y) of a point as fractions of the width and height of its image or frame.

    Raises:
      ValueError: it lies outside, or the record declares other sizes than the media have.
    """
    place = point.get("image", 1) - 1
    declared = annotation["sizes"]
    if declared is not None and tuple(declared[place]) != tuple(sizes[place]):
        raise ValueError(f"the declared size must be that of the media, {tuple(sizes[place])}; "
                         f"got {tuple(declared[place])}")
    width, height = annotation["scale"] or sizes[place]
    if not (0 <= point["x"] <= width and 0 <= point["y"] <= height):
        raise ValueError(f"a point must lie inside the frame of {width} x {height}; "
                         f"got {(point['x'], point['y'])}")
    return point["x"] / width, point["y"] / height
