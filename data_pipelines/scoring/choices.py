"""Accuracy of multiple choice, asked in the evaluation layout.

The clean rule does not guess: an answer that cannot be read is wrong, and `valid` is the share of answers
that can be read. The _reference rule always picks the option that fits best (reference: olmo/eval, "option
match").
"""

from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.scoring import hits
from molmo2_jax.inputs import choices


class Target(NamedTuple):
    """What was asked; `right` is the index of the right option."""
    question: str
    options: Sequence[str]
    right: int
    is_labelled: bool = True


def score(targets: Sequence[Target | tuple], answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, accuracy_reference and valid. Give one Target, or a tuple of its fields, per answer.

    Raises:
      ValueError: there are no answers, or not one per target.
    """
    rows = []
    for target, answer in zip(targets, answers, strict=True):
        question, options, right, is_labelled = Target(*target)
        shown = choices.format_evaluation(question, options, is_labelled=is_labelled)
        chosen = choices.read_choice(answer, shown, options)
        guessed = choices.match_option(choices.answer_part(answer), shown.names)
        rows.append({"accuracy": float(chosen == right), "accuracy_reference": float(guessed == right),
                     "valid": float(chosen is not None)})
    return hits.means(rows)
