"""What a format function knows besides the annotation: the media as the model will see them, and chance."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines import annotations
from molmo2_jax import types
from molmo2_jax.inputs import prompt

GRID = 0.5              # seconds; video points are annotated on this grid
NEAREST = 0.25          # seconds a video point may be moved to the nearest frame shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """media: of the example, as the model sees them; train, num_templates, is_pretraining: as in Asking."""
    media: types.Media
    rng: np.random.Generator | np.random.RandomState
    train: bool
    num_templates: int | None = None
    is_pretraining: bool = False

    @property
    def medium(self) -> str:
        """Returns the word for the visual input in prompts."""
        if self.media.is_video:
            return "video"
        return "image" if len(self.media.sizes) == 1 else "images"

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
        seconds = self.media.seconds
        for candidate, tolerance in ((time, annotations.TIME_TOLERANCE),
                                     (time // GRID * GRID, annotations.TIME_TOLERANCE), (time, NEAREST)):
            nearest = seconds[np.abs(seconds - candidate).argmin()]
            if abs(nearest - candidate) <= tolerance:
                return float(nearest)
        return None
