"""Annotations -> branches: what the model is asked about a visual input and should answer.

One small function per kind of annotation (points.py, tracks.py, questions.py); this file chooses among them,
sets loss weights and the order of branches.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines import annotations
from data_pipelines.formats import points
from data_pipelines.formats import questions
from data_pipelines.formats import tracks
from data_pipelines.formats import view as views
from molmo2_jax import types
from molmo2_jax.inputs import prompt

# The style of an annotation, then its turns; None if nothing is left of it at the times shown.
ASK: dict[type[annotations.Annotation], Callable[..., tuple[str, ...] | None]] = {
    annotations.Points: points.ask_points,
    annotations.Count: points.ask_count,
    annotations.Tracks: tracks.ask_tracks,
    annotations.QA: questions.ask_qa,
    annotations.Chat: questions.ask_chat,
    annotations.Choice: questions.ask_choice,
    annotations.Caption: questions.ask_caption,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Constants of the loss weights of answers that bring none of their own (paper, section 3.2).

    pointing, video_captions: of each answer token of points and tracks, and of captions of videos.
    length_factor: the 2 of 2 / sqrt(n tokens) for all other answers; the paper prints 4, its code has 2.
    by_length, by_branches: whether all other answers have the two factors; in pre-training they have none.
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

    train: random wording and layouts; else the plain ones.
    num_templates: use only the first so many templates of each family; None: all. With 1, multiple choice has
      the layout of evaluation.
    is_pretraining: questions of the first stage: no templates, and prefixes that say how long answers are.
    weights: of answers without a weight of their own.
    """
    train: bool = True
    num_templates: int | None = None
    is_pretraining: bool = False
    weights: Weights = Weights()

    def __post_init__(self):
        if self.num_templates is not None and self.num_templates < 1:
            raise ValueError(f"num_templates must be >= 1; got {self.num_templates}")


PLAIN = Asking(train=False)  # as evaluation asks


@dataclasses.dataclass(frozen=True)
class Formatted:
    """Branches in the order of the annotations; annotations[i] is the index of the one branch i came from,
    of a conversation made of several (Example.dialogue_share) the first.

    dropped: indices of annotations of which nothing was left at the times shown.
    """
    branches: tuple[types.Branch, ...]
    annotations: tuple[int, ...]
    dropped: tuple[int, ...]


def format_example(example: types.Example, *, media: types.Media,
                   rng: np.random.Generator | np.random.RandomState, asking: Asking) -> Formatted:
    """Returns the branches of an example and where they came from. The caller shuffles them for training.

    Args:
      media: of the example, as the model sees them.
      rng: draws templates, layouts and selections of images.

    Raises:
      ValueError: naming example and annotation, if a point lies outside its frame, or the declared size is
        not that of the media.
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
        if isinstance(annotation.prompt, str):
            question = annotation.prompt
        asked.append((number, style, (question, *rest), _weight(annotation, view, asking.weights)))
    if asking.train and example.dialogue_share and rng.uniform() < example.dialogue_share:
        asked = _one_conversation(asked)
    branches = [types.Branch(turns=_prefixed(style, turns, view), weight=weight)
                for _, style, turns, weight in asked]
    return Formatted(branches=tuple(branches), annotations=tuple(one[0] for one in asked),
                     dropped=tuple(dropped))


def _one_conversation(asked: list[tuple]) -> list[tuple]:
    """Returns the questions as turns of one conversation, in order; the first decides style and weight."""
    return [(number, style, tuple(turn for one in asked for turn in one[2]), weight)
            for number, style, _, weight in asked[:1]]


def _prefixed(style: str, turns: Sequence[str], view: views.View) -> tuple[str, ...]:
    return prompt.with_prefix(view.prefix(style, turns[-1]), turns[0]), *turns[1:]


def to_branches(example: types.Example, **how) -> tuple[types.Branch, ...]:
    """Returns the branches alone; arguments of format_example."""
    return format_example(example, **how).branches


def _view(example, media: types.Media, rng, asking: Asking) -> views.View:
    is_video = example.video is not None
    if media.is_video != is_video or not is_video and len(media.sizes) != len(example.images):
        raise ValueError(f"{example.key}: media must be its video, or have one size for each of its "
                         f"{len(example.images)} images; got {'a video' if media.is_video else 'images'} "
                         f"with sizes {media.sizes}")
    return views.View(media=media, rng=rng, train=asking.train, num_templates=asking.num_templates,
                      is_pretraining=asking.is_pretraining)


def _weight(annotation: annotations.Annotation, view: views.View, weights: Weights) -> types.LossWeight:
    """Returns the annotation's own loss weight or that of the recipe."""
    if annotation.weight is not None:
        return annotation.weight
    if isinstance(annotation, (annotations.Points, annotations.Tracks)):
        return types.LossWeight(scale=weights.pointing, by_length=False, by_branches=False)
    if isinstance(annotation, annotations.Caption) and view.medium == "video":
        return types.LossWeight(scale=weights.video_captions, by_length=False, by_branches=False)
    return types.LossWeight(by_length=weights.by_length, by_branches=weights.by_branches)
