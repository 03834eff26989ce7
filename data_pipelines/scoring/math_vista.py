"""MathVista: the final value is extracted from an answer, normalised to the type asked for, and compared.

Published scores use values that gpt-4-0613 extracted. Here `extract` is any function of the answer and the
question, such as recorded extractions or another model; the default takes the answer as the value.

Source: reference, olmo/eval/math_vista_utils.py; lupantech/MathVista, evaluation/calculate_score.py.
"""

import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from typing import Literal

from data_pipelines.scoring import hits
from molmo2_jax.inputs import choices

LETTERS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked: `choices` of a multiple-choice question, else () and the type of the answer.

    answer: the right option's text, or the value as text ("14", "0.6", "[2007, 2008]").
    precision: decimals of a float.
    """
    answer: str
    choices: tuple[str, ...] = ()
    answer_type: Literal["text", "integer", "float", "list"] = "text"
    precision: int = 0


Extract = Callable[[str, Question], str]


def as_it_is(answer: str, question: Question) -> str:
    """Returns the answer itself: what the reference extracts if its judge is off."""
    return answer.strip()


def value(extracted: str, question: Question) -> str | None:
    """Returns the extracted value in the form of the question's answer; None if it has another type.

    Of multiple choice the clean rule: an option's letter (also as "B:" or "(B)") or its text, nothing
    guessed.
    """
    if not question.choices:
        return _typed(extracted, question)
    names = LETTERS[:len(question.choices)]
    lines = tuple(f"{name}. {text}" for name, text in zip(names, question.choices, strict=True))
    shown = choices.Shown("", lines, tuple(names))
    chosen = choices.read_choice(extracted, shown, question.choices)
    return None if chosen is None else question.choices[chosen]


def value_reference(extracted: str, question: Question) -> str | None:
    """Returns the same by the reference, which guesses the option with the smallest edit distance.

    The letter before the first colon counts, in any case.
    """
    if not question.choices:
        return _typed(extracted, question)
    letter = re.search(r"([a-zA-Z]):", extracted)
    extracted = letter[1].upper() if letter else extracted.strip()
    names = list(LETTERS[:len(question.choices)])
    if extracted in names:
        return question.choices[names.index(extracted)]
    return min(question.choices, key=lambda option: choices.edit_distance(extracted, option))


def _typed(extracted: str, question: Question) -> str | None:
    try:
        if question.answer_type == "integer":
            return str(int(float(extracted)))
        if question.answer_type == "float":
            return str(round(float(extracted), question.precision))
    except (ValueError, OverflowError):
        return None
    return extracted


def score(questions: Sequence[Question], answers: Sequence[str],
          extract: Extract = as_it_is) -> dict[str, float]:
    """Returns accuracy and valid (a value of the type was read), and accuracy_reference.

    Raises:
      ValueError: there is no question.
    """
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        extracted = extract(answer, question) if answer.strip() else ""
        read = value(extracted, question) if extracted else None
        by_reference = value_reference(extracted, question)
        rows.append({"accuracy": float(read == question.answer), "valid": float(read is not None),
                     "accuracy_reference": float(by_reference == question.answer)})
    return hits.means(rows)
