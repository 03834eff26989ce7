"""Annotations as questions with known answers: connects the formats and scores of data_pipelines, which are
independent of models, with molmo2_jax.evaluate, which is independent of annotations."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines import annotations
from data_pipelines import formats
from data_pipelines.scoring import suite
from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import types


def ask(example: types.Example, media: types.Media, *, is_pretraining: bool = False
        ) -> list[generate.Question]:
    """Returns a plainly worded question for each annotation that can be scored; `about` is the annotation.

    is_pretraining: use the wording of the first stage.

    Raises:
      ValueError: an annotation does not fit the media.
    """
    found = formats.format_example(example, media=media, rng=np.random.default_rng(0),
                                   asking=dataclasses.replace(formats.PLAIN, is_pretraining=is_pretraining))
    pairs = zip(found.branches, (example.annotations[number] for number in found.annotations),
                strict=True)
    return [generate.Question(turns=branch.turns[:-1], about=annotation)
            for branch, annotation in pairs
            if _can_be_scored(annotation, media)]


def _can_be_scored(annotation: annotations.Annotation, media: types.Media) -> bool:
    return any(not suite.obstacle(annotation, scorer) for scorer in suite.kinds(annotation, media).values())


def is_scored(example: types.Example) -> bool:
    """Returns whether any score can judge an answer about the example; reads only the record."""
    return any(_can_be_scored(annotation, _media(example)) for annotation in example.annotations)


def obstacles(example: types.Example) -> list[tuple[str, str]]:
    """Returns (score, sentence with the reason) for each score that cannot judge an annotation.

    Reads only the record, so that a whole folder can be reported before the first answer.
    """
    return [(kind, f"{example.key}: annotations[{number}] has no {kind} score: {reason}")
            for number, annotation in enumerate(example.annotations)
            for kind, scorer in suite.kinds(annotation, _media(example)).items()
            if (reason := suite.obstacle(annotation, scorer))]


def _media(example: types.Example) -> types.Media:
    """Returns the kind and number of media in the record; sizes and times are placeholders."""
    if example.video:
        return types.Media(sizes=((1, 1),), seconds=np.zeros(0))
    return types.Media(sizes=((1, 1),) * len(example.images))


def score(answered: Sequence[evaluate.Answered]) -> dict[str, float]:
    """Returns the scores of data_pipelines.scoring.suite for answers to questions from `ask`."""
    return suite.score([_for_suite(one) for one in answered])


def _for_suite(one: evaluate.Answered) -> suite.Answered:
    return suite.Answered(annotation=one.question.about, answer=one.text, media=one.media)
