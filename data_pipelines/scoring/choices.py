"""Accuracy of multiple choice, asked in the evaluation layout.

The clean rule guesses nothing: an answer that cannot be read is wrong, and `valid` says how many can be. The
_reference rule always picks the option that fits best (reference: olmo/eval, "option match").
"""

from collections.abc import Sequence

from data_pipelines.scoring import hits
from molmo2_jax.inputs import choices


def score(targets: Sequence[tuple[str, Sequence[str], int]], answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, accuracy_reference and valid.

    targets: (question, options, index of the right option), one per answer.
    """
    rows = []
    for (question, options, right), answer in zip(targets, answers, strict=True):
        shown = choices.format_evaluation(question, options)
        chosen = choices.read_choice(answer, shown, options)
        guessed = choices.match_option(choices.answer_part(answer), shown.names)
        rows.append({"accuracy": float(chosen == right), "accuracy_reference": float(guessed == right),
                     "valid": float(chosen is not None)})
    return hits.means(rows)
