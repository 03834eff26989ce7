"""Annotations as questions with known answers: joins the formats and scores of data_pipelines, which
know no model, to molmo2_jax.evaluate, which knows no annotations."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines import formats
from data_pipelines.scoring import suite
from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import types


def ask(example: types.Example, media: types.Media, *, is_pretraining: bool = False
        ) -> list[generate.Question]:
    """Returns what the annotations that have a score ask, in plain wording; `about` is the annotation.

    is_pretraining: in the wording of the first stage.

    Raises:
      ValueError: an annotation does not fit the media.
    """
    found = formats.format_example(example, media=media, rng=np.random.default_rng(0),
                                   asking=dataclasses.replace(formats.PLAIN, is_pretraining=is_pretraining))
    pairs = zip(found.branches, (example.annotations[number] for number in found.annotations),
                strict=True)
    return [generate.Question(turns=branch.turns[:-1], about=annotation)
            for branch, annotation in pairs if suite.SCORES[type(annotation)]]


def score(answered: Sequence[evaluate.Answered]) -> dict[str, float]:
    """Returns the scores of data_pipelines.scoring.suite for answers to questions of `ask`."""
    return suite.score([_for_suite(one) for one in answered])


def _for_suite(one: evaluate.Answered) -> suite.Answered:
    return suite.Answered(annotation=one.question.about, answer=one.answer.text, media=one.media)
