"""The texts of questions, in the forms of the published evaluation.

Source: reference, olmo/data/academic_video_datasets.py; forms L, D, V, F and T of the paper's table.
"""

import re
import string
from collections.abc import Sequence

from molmo2_jax.inputs import choices
from molmo2_jax.inputs import prompt

LETTERS = string.ascii_uppercase
ONLY_LETTER = "Please respond with only the letter of the correct answer."
DIRECTLY = "Answer with the option's letter from the given choices directly."
VIDEO_MME = ("Select the best answer to the following multiple-choice question based on the video. "
             "Respond with only the letter (A, B, C, or D) of the correct option.")
VIDEO_MME_END = "The best answer is:"
_MARKED = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(.*)", re.DOTALL)


def lettered(options: Sequence[str]) -> list[str]:
    """Returns "A. text" lines."""
    return [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]


def choice(question: str, options: Sequence[str], instruction: str) -> str:
    """Returns question, lettered options and instruction, a line each (forms L and D)."""
    return "\n".join([question, *lettered(options), instruction])


def formatted(question: str, options: Sequence[str], *, is_labelled: bool = True) -> str:
    """Returns the question as the formatter of training shows it in evaluation (form F)."""
    return choices.format_evaluation(question, options, is_labelled=is_labelled).prompt


def short(style: str, question: str) -> str:
    """Returns the question with the prefix of its style (form T)."""
    return prompt.with_prefix(prompt.style_prefix(style), question)


def unmarked(option: str) -> str:
    """Returns an option without its own letter: "(B) dog", "B. dog", "B) dog" and "B: dog" are "dog"."""
    match = _MARKED.fullmatch(option)
    return match[3].strip() if match else option.strip()


def split(text: str) -> tuple[str, list[str]]:
    """Returns (question, options without letters) of a text whose last lines are marked A, B, C ...

    Lines before the first option belong to the question, lines after the last one are left out.
    """
    question: list[str] = []
    options: list[str] = []
    for line in filter(None, map(str.strip, text.replace("\r\n", "\n").split("\n"))):
        match = _MARKED.fullmatch(line)
        if match and (match[1] or match[2]) == LETTERS[len(options):len(options) + 1]:
            options.append(match[3].strip())
        elif not options:
            question.append(line)
    return "\n".join(question), options


def number_images(texts: Sequence[str], most: int | None = None) -> list[str]:
    """Returns the texts with "Image 1", "Image 2" ... in place of each "<image>", up to number `most`."""
    count = 0

    def numbered(match: re.Match) -> str:
        nonlocal count
        if most is not None and count >= most:
            return match[0]
        count += 1
        return f"Image {count}"

    return [re.sub("<image>", numbered, text) for text in texts]
