"""TempCompass: yes/no questions, caption matching and captions. Multiple choice is in choice_rules.

Published scores ask gpt-3.5-turbo-1106 about answers that no rule reads, and about all captions. Here the
former are wrong, as in the reference with its judge off; captions need a judge (statements.Judge), who
answers a multiple-choice question from the caption alone.

Source: reference, olmo/eval/temp_compass_utils.py; llyx97/TempCompass, eval_{caption_matching,captioning}.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from data_pipelines.scoring import choice_rules
from data_pipelines.scoring import hits


class Match(NamedTuple):
    """The lines to choose from, "Caption A: text" or "Option 1: text", and the index of the right one."""
    lines: Sequence[str]
    right: int


def read_match(answer: str, lines: Sequence[str]) -> int | None:
    """Returns the line that the answer is, or whose text, label or last word of the label it is."""
    label_of = {number: line.partition(": ")[0] for number, line in enumerate(lines)}
    named = answer.strip().rstrip(".")
    found = [number for number, line in enumerate(lines)
             if answer.strip() == line or named in (line.rstrip("."), line.partition(": ")[2].rstrip("."),
                                                    label_of[number], label_of[number].split(" ")[-1])]
    return found[0] if len(found) == 1 and named else None


def match_reference(answer: str, right: str) -> bool:
    """Returns whether the right line is given, or a letter A to D that equals its first character.

    The reference applies its rule of multiple choice, so "A" never fits "Caption A: text", but "C" does.
    """
    if answer == right:
        return True
    chosen = choice_rules.temp_compass(answer, ())
    return chosen is not None and choice_rules.LETTERS[chosen] == right[:1]


def score_matching(targets: Sequence[Match], answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy and valid by `read_match`, accuracy_reference by `match_reference`.

    Raises:
      ValueError: there is no answer.
    """
    rows = []
    for (lines, right), answer in zip(targets, answers, strict=True):
        chosen = read_match(answer, lines)
        rows.append({"accuracy": float(chosen == right), "valid": float(chosen is not None),
                     "accuracy_reference": float(match_reference(answer.strip(), lines[right]))})
    return hits.means(rows)


def score_yes_no(targets: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy and valid of answers that start with yes or no; targets are "yes" or "no".

    Raises:
      ValueError: there is no answer, or a target is another word.
    """
    if unknown := sorted(set(targets) - {"yes", "no"}):
        raise ValueError(f"targets must be 'yes' or 'no'; got {unknown}")
    read = [yes_or_no(answer) for answer in answers]
    return hits.means([{"accuracy": float(word == target), "valid": float(word is not None)}
                       for target, word in zip(targets, read, strict=True)])


def yes_or_no(answer: str) -> str | None:
    """Returns "yes" or "no" if the answer starts with it, in any case, else None: "nothing" is no."""
    return next((word for word in ("yes", "no") if answer.strip().lower().startswith(word)), None)


class Captioned(NamedTuple):
    """A multiple-choice question with its options, and its right answer "B. text", about a caption."""
    question: str
    answer: str


def is_chosen(said: str, right: str) -> bool:
    """Returns whether a judge's answer, or its last line with "Answer", names the right option alone."""
    lines = [line.replace("Answer:", "").strip() for line in said.split("\n") if "Answer" in line]
    said = lines[-1] if lines else said
    marks = sum(said.count(f"{letter}.") for letter in choice_rules.LETTERS[:4])
    return said.split(". ")[0] == right.split(". ")[0] and marks == 1


def score_captions(targets: Sequence[Captioned], captions: Sequence[str],
                   choose: Callable[[str, str], str]) -> dict[str, float]:
    """Returns accuracy, the share of captions from which `choose` (statements.Judge) answers rightly, and
    valid, the share with any text. An empty caption is wrong, and not judged.

    Raises:
      ValueError: there is no caption, or the judge does not answer.
    """
    rows = []
    for target, caption in zip(targets, map(str.strip, captions), strict=True):
        right = bool(caption) and is_chosen(choose(target.question, caption).strip(), target.answer)
        rows.append({"accuracy": float(right), "valid": float(bool(caption))})
    return hits.means(rows)
