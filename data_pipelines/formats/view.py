"""What a format function gets besides the annotation: the media as the model sees them, and randomness."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines import annotations
from molmo2_jax import types
from molmo2_jax.inputs import points
from molmo2_jax.inputs import prompt

GRID = 0.5              # seconds; video points are annotated on this grid
NEAREST = 0.25          # seconds by which a video point may be moved to the nearest frame shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """media: of the example, as the model sees them. train, num_templates, is_pretraining: see Asking."""
    media: types.Media
    rng: np.random.Generator | np.random.RandomState
    train: bool
    num_templates: int | None = None
    is_pretraining: bool = False

    @property
    def writing(self) -> dict[str, Any]:
        """Returns the arguments with which points are written: as text, or as choices if media have cells."""
        if self.media.cells is None:
            return {"scale": 1}
        return {"cells": self.media.cells, "image_of": self._image_of}

    def _image_of(self, index: float | int | str) -> int:
        if not self.media.is_video:
            return int(index) - 1
        return int(np.argmin(np.abs(self.media.seconds - float(points.time_text(index)))))

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
        """Returns `bare` in pre-training, otherwise a template: random in training, else the first."""
        if self.is_pretraining:
            return bare
        return family[self.below(len(family[:self.num_templates])) if self.train else 0]

    def one_of(self, texts: str | Sequence[str]) -> str:
        """Returns the text, or one of several: random in training, else the first."""
        if isinstance(texts, str):
            return texts
        return texts[self.below(len(texts)) if self.train else 0]

    def prefix(self, style: str, answer: str) -> str:
        """Returns the prefix of a question of this style."""
        if not self.is_pretraining:
            return prompt.style_prefix(style)
        return prompt.pretrain_prefix(style, answer if self.train else None, self.rng)

    def shown(self, time: float) -> float | None:
        """Returns the time of the frame a video point belongs to; None if no frame is near enough.

        This is the frame at its time, else at its time rounded down to the 0.5 s annotation grid, else the
        nearest frame within 0.25 s.
        """
        seconds = self.media.seconds
        for candidate, tolerance in ((time, annotations.TIME_TOLERANCE),
                                     (time // GRID * GRID, annotations.TIME_TOLERANCE), (time, NEAREST)):
            nearest = seconds[np.abs(seconds - candidate).argmin()]
            if abs(nearest - candidate) <= tolerance:
                return float(nearest)
        return None
