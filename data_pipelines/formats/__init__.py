"""Converts annotations to branches: questions about a visual input, and their answers.

points.py, tracks.py and questions.py have one function per kind of annotation. This module dispatches to them
and sets prefixes and loss weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from data_pipelines import annotations
from data_pipelines.formats import points
from data_pipelines.formats import questions
from data_pipelines.formats import tracks
from data_pipelines.formats import view as views
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import prompt

# kind: function that returns style and turns; None if nothing of the annotation is visible in the frames.
ASK: dict[type[annotations.Annotation], Callable[..., tuple[str, ...] | None]] = {
    annotations.Points: points.ask_points,
    annotations.Count: points.ask_count,
    annotations.Tracks: tracks.ask_tracks,
    annotations.QA: questions.ask_qa,
    annotations.Chat: questions.ask_chat,
    annotations.Choice: questions.ask_choice,
    annotations.Caption: questions.ask_caption,
}


Grammar = Literal["text", "tokens"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Loss weights of answers whose annotation sets none (paper, section 3.2).

    pointing, video_captions: per answer token of points and tracks, and of captions of videos.
    length_factor: the 2 of 2 / sqrt(n tokens) for all other answers; the paper prints 4, its code has 2.
    by_length, by_branches: whether all other answers have these factors; pre-training has neither.

    Raises:
      ValueError: a weight is negative, or length_factor is not positive.
    """
    pointing: float = 0.2
    video_captions: float = 0.1
    length_factor: float = 2.0
    by_length: bool = True
    by_branches: bool = True

    def __post_init__(self):
        if not (self.pointing >= 0 and self.video_captions >= 0 and self.length_factor > 0):
            raise ValueError(f"weights must be >= 0 and length_factor > 0; got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How annotations become questions.

    train: random templates and layouts; otherwise the plain ones.
    num_templates: templates of each family to use, from the first; None: all. With 1, multiple choice has the
      layout of evaluation.
    is_pretraining: prompts of the first stage: no templates, and prefixes that give the length of the answer.
    weights: loss weights of answers whose annotation sets none.
    grammar: of points in answers: "text" for coordinates, "tokens" for choices among visual tokens; None:
      tokens for models with config.PointerConfig, which alone can write them.

    Raises:
      ValueError: num_templates is less than 1, or the grammar is unknown.
    """
    train: bool = True
    num_templates: int | None = None
    is_pretraining: bool = False
    weights: Weights = Weights()
    grammar: Grammar | None = None

    def __post_init__(self):
        config.require(self.grammar in (None, "text", "tokens"), "grammar must be 'text' or 'tokens'",
                       self.grammar)
        config.require(self.num_templates is None or self.num_templates >= 1, "num_templates must be >= 1",
                       self.num_templates)


PLAIN = Asking(train=False)  # for evaluation


@dataclasses.dataclass(frozen=True)
class Formatted:
    """Branches in the order of the annotations.

    annotations: index of the annotation of each branch; for a conversation merged from several annotations
      (Example.dialogue_share), of the first.
    dropped: indices of annotations of which nothing is visible in the frames shown.
    """
    branches: tuple[types.Branch, ...]
    annotations: tuple[int, ...]
    dropped: tuple[int, ...]


def format_example(example: types.Example, *, media: types.Media,
                   rng: np.random.Generator | np.random.RandomState, asking: Asking) -> Formatted:
    """Returns the branches of an example and their annotations. For training the caller shuffles them.

    Args:
      media: the media of the example, as the model sees them.
      rng: draws templates, layouts and selections of images.

    Raises:
      ValueError: a point lies outside its frame, or the media differ from what the record declares; the
        message names example and annotation.
    """
    view = _view(example, media, rng, asking)
    asked, dropped = [], []
    for number, annotation in enumerate(example.annotations):
        try:
            found = ASK[type(annotation)](annotation, view)
        except ValueError as error:
            raise ValueError(f"{example.key}: annotations[{number}]: {error}") from error
        if found is None:
            dropped.append(number)
            continue
        style, question, *rest = found
        if isinstance(annotation.prompt, str) and not isinstance(annotation, annotations.Points):
            question = annotation.prompt
        asked.append((number, style, (question, *rest), _weight(annotation, view, asking.weights)))
    if asking.train and example.dialogue_share and rng.uniform() < example.dialogue_share:
        asked = _one_conversation(asked)
    branches = [types.Branch(turns=_prefixed(style, turns, view), weight=weight)
                for _, style, turns, weight in asked]
    return Formatted(branches=tuple(branches), annotations=tuple(one[0] for one in asked),
                     dropped=tuple(dropped))


def _one_conversation(asked: list[tuple]) -> list[tuple]:
    """Returns all questions as turns of one conversation, with the style and weight of the first."""
    return [(number, style, tuple(turn for one in asked for turn in one[2]), weight)
            for number, style, _, weight in asked[:1]]


def _prefixed(style: str, turns: Sequence[str], view: views.View) -> tuple[str, ...]:
    return prompt.with_prefix(view.prefix(style, turns[-1]), turns[0]), *turns[1:]


def to_branches(example: types.Example, **how) -> tuple[types.Branch, ...]:
    """Returns only the branches of format_example, which has the arguments.

    Raises:
      ValueError: see format_example.
    """
    return format_example(example, **how).branches


def _view(example, media: types.Media, rng, asking: Asking) -> views.View:
    is_video = example.video is not None
    if media.is_video != is_video or not is_video and len(media.sizes) != len(example.images):
        raise ValueError(f"{example.key}: media must match the record: a video, or one size for each of its "
                         f"{len(example.images)} images; got {'a video' if media.is_video else 'images'} "
                         f"with sizes {media.sizes}")
    if asking.grammar == "tokens" and media.cells is None and media.sizes:
        raise ValueError("grammar 'tokens' needs a model with config.PointerConfig; got one without")
    if asking.grammar == "text":
        media = dataclasses.replace(media, cells=None)
    return views.View(media=media, rng=rng, train=asking.train, num_templates=asking.num_templates,
                      is_pretraining=asking.is_pretraining)


def _weight(annotation: annotations.Annotation, view: views.View, weights: Weights) -> types.LossWeight:
    """Returns the annotation's own loss weight, or the recipe's."""
    if annotation.weight is not None:
        return annotation.weight
    if isinstance(annotation, (annotations.Points, annotations.Tracks)):
        return types.LossWeight(scale=weights.pointing, by_length=False, by_branches=False)
    if isinstance(annotation, annotations.Caption) and view.medium == "video":
        return types.LossWeight(scale=weights.video_captions, by_length=False, by_branches=False)
    return types.LossWeight(by_length=weights.by_length, by_branches=weights.by_branches)
