"""MMMU: numbers and phrases of open questions, compared after normalisation. Choices: choice_rules.mmmu.

Source: MMMU-Benchmark/MMMU, eval/eval_utils.py, which the reference copies.
"""

import re
from collections.abc import Sequence

from data_pipelines.scoring import choice_rules
from data_pipelines.scoring import choices as clean
from data_pipelines.scoring import hits
from molmo2_jax.inputs import choices

# An answer follows one of these in its line; of several rests the shortest counts.
CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
LAST_LINE_CUES = (*CUES, "=")
_GROUPED = r"-?\b\d{1,3}(?:,\d{3})+\b"
# (?<!\d) changes no match and makes the time linear: if the first digit of a run fails, all do.
_SCIENTIFIC = r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"
_SIMPLE = r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"


def normalise(text: str) -> list[str | float]:
    """Returns a number, rounded to two decimals, or the text in lower case.

    A single character becomes two texts, one with a leading and one with a trailing space, so that it does
    not match inside words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def read_open(answer: str) -> set[str | float]:
    """Returns the phrases and numbers that an open answer may mean: rests of lines after cues, else all."""
    answer = answer.strip().strip(".").lower()
    *before, last = answer.split("\n")
    rests = [_rest(line, CUES) for line in before] + [_rest(last, LAST_LINE_CUES)]
    phrases = [rest for rest in rests if rest and rest not in list(":,.!?;'")] or [answer]
    numbers = [number for phrase in phrases for pattern in (_GROUPED, _SCIENTIFIC, _SIMPLE)
               for number in re.findall(pattern, phrase)]
    return {one for text in (*phrases, *numbers) for one in normalise(text)}


def _rest(line: str, cues: Sequence[str]) -> str:
    """Returns the shortest rest of a line after the last occurrence of a cue, "" if it has none."""
    shortest = ""
    for cue in cues:
        if cue in line:
            rest = line.split(cue)[-1].strip()
            if not shortest or len(rest) < len(shortest):
                shortest = rest
    return shortest


def is_right(accepted: Sequence[str], answer: str) -> bool:
    """Returns whether a number equals an accepted one, or a phrase contains an accepted text."""
    wanted = [one for text in accepted for one in normalise(text)]
    texts = [one for one in wanted if isinstance(one, str) and one]
    return any(any(text in one for text in texts) if isinstance(one, str) else one in wanted
               for one in read_open(answer))


def score(targets: Sequence[clean.Target | Sequence[str]], answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy_reference over all questions, and open_accuracy and choice scores of each kind.

    A target is a `choices.Target` or the accepted answers of an open question. Open questions have one rule.

    Raises:
      ValueError: there is no question.
    """
    pairs = list(zip(targets, answers, strict=True))
    asked = [(target, answer) for target, answer in pairs if isinstance(target, clean.Target)]
    opened = [{"open_accuracy": float(is_right(target, choices.answer_part(answer)))}
              for target, answer in pairs if not isinstance(target, clean.Target)]
    scores: dict[str, float] = {}
    total = 0.0
    if asked:
        of_choices = choice_rules.score("mmmu", *zip(*asked, strict=True))
        scores |= {f"choice_{name}": value for name, value in of_choices.items()}
        total += of_choices["accuracy_reference"] * len(asked)
    if opened or not asked:
        scores |= hits.means(opened)
        total += scores["open_accuracy"] * len(opened)
    return scores | {"accuracy_reference": total / len(pairs)}
