"""Multiple choice as each benchmark reads it: the published parsers, scored next to the clean rule.

Options are lettered A, B, C ... in the order shown. A parser returns the index of the letter it reads (an
index beyond the last option is wrong), or None. Benchmarks treat None differently: as wrong, as a random
option, or as an example to leave out of the average. In place of the random draw, an answer counts its
expectation, one over the number of options, so scores depend neither on a seed nor on the order of examples.

Deliberate difference: an option without text matches no answer; the reference finds "" in every answer.

Source: reference, olmo/eval/vqa.py and evaluators.py; MMMU's parser: MMMU-Benchmark/MMMU, eval_utils.py.
"""

import re
import string
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from data_pipelines.scoring import choices as clean
from data_pipelines.scoring import hits
from molmo2_jax.inputs import choices

LETTERS = string.ascii_uppercase
LEAD_INS = ("The best answer is", "The correct answer is", "The answer is", "The answer",
            "The best option is", "The correct option is", "Best answer:", "Best option:")
# Two commas are missing in the official list, so four of its lead-ins are never removed.
VIDEO_MME_LEAD_INS = ("The best answer is", "The correct answer is", "The answer is", "The answer",
                      "The best option isThe correct option is", "Best answer:Best option:", "Answer:",
                      "Option:", "The correct answer", "The correct option")
_STRIPPED = (",", ".", "!", "?", ";", ":", "'")  # one after the other, each from both ends
_LONG = 5   # words; only in longer answers are texts of options looked for

Parser = Callable[[str, Sequence[str]], int | None]   # answer, texts of the options


def start_letter(answer: str, options: Sequence[str]) -> int | None:
    """Returns the option whose letter, of either case, the answer starts with: "a ball" is A."""
    first = answer.strip().upper()[:1]
    return LETTERS.index(first) if first and first in LETTERS[:len(options)] else None


def first_word(answer: str, options: Sequence[str]) -> int | None:
    """Returns the first stand-alone capital A to D."""
    return _letter(re.search(r"\b[A-D]\b", answer))


def video_mme(answer: str, options: Sequence[str]) -> int | None:
    """Returns the first capital A to D anywhere, after some lead-ins are removed: "Best answer: C" is B."""
    return _letter(re.search("[ABCD]", _without(VIDEO_MME_LEAD_INS, answer)))


def long_video_bench(answer: str, options: Sequence[str]) -> int | None:
    """Returns the first capital A to E anywhere, after lead-ins are removed, "Answer:" not among them."""
    return _letter(re.search("[ABCDE]", _without(LEAD_INS, answer)))


def next_qa(answer: str, options: Sequence[str]) -> int | None:
    """Returns by the first style that occurs, "(X)", " X " or "X.", the letter that occurs last in it.

    Without any of them, in answers of more than five words, the option whose text occurs last.
    """
    answer, letters = _padded(answer), LETTERS[:len(options)]
    for style in ("({})", " {} ", "{}."):
        found = [letter for letter in letters if style.format(letter) in answer]
        if found:
            return LETTERS.index(max(found, key=lambda letter: answer.rfind(style.format(letter))))
    return _by_text(answer, options, max)


def ego_schema(answer: str, options: Sequence[str]) -> int | None:
    """Returns, of all "(X)", "X " and "X." that occur, the one whose last occurrence is earliest."""
    answer, letters = _padded(answer), LETTERS[:len(options)]
    found = [style.format(letter) for style in ("({})", "{} ", "{}.") for letter in letters
             if style.format(letter) in answer]
    if found:
        return LETTERS.index(min(found, key=answer.rfind).strip("(). "))
    return _by_text(answer, options, min)


def mmmu(answer: str, options: Sequence[str]) -> int | None:
    """Returns, of all "(X)", "X)", "X." and "X:" that occur, the letter last in the first style found.

    Without any of them: the letter alone, or the last " X "; then as next_qa.
    """
    answer, letters = _padded(answer), LETTERS[:len(options)]
    marked = {style: [letter for letter in letters if style.format(letter) in answer]
              for style in ("({})", "{})", "{}.", "{}:")}
    found = [letter for letters_of_style in marked.values() for letter in letters_of_style]
    style = next((style for style, present in marked.items() if present), " {} ")
    if not found:
        if answer.strip() in list(letters):
            return LETTERS.index(answer.strip())
        found = [letter for letter in letters if f" {letter} " in answer]
    if found:
        return LETTERS.index(max(found, key=lambda letter: answer.rfind(style.format(letter))))
    return _by_text(answer, options, max)


def temp_compass(answer: str, options: Sequence[str]) -> int | None:
    """Returns the option that the answer equals, as "A. text", or whose letter it starts with: A, A., A).

    Source: reference, olmo/eval/temp_compass_utils.py, without its judge of answers that cannot be read.
    """
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
    if answer in lines:
        return lines.index(answer)
    match = re.match(r"([A-D])(?:$|[.)])", answer)
    return None if match is None else LETTERS.index(match[1])


def option_match(answer: str, options: Sequence[str]) -> int | None:
    """Returns the option that fits best, always one: see `choices.match_option`, over the letters."""
    return choices.match_option(answer, LETTERS[:len(options)])


def _letter(match: re.Match | None) -> int | None:
    return None if match is None else LETTERS.index(match[0])


def _without(lead_ins: Sequence[str], answer: str) -> str:
    for lead_in in lead_ins:
        answer = answer.replace(lead_in, "")
    return answer


def _padded(answer: str) -> str:
    """Returns the answer without punctuation at its ends, between two spaces."""
    for sign in _STRIPPED:
        answer = answer.strip(sign)
    return f" {answer} "


def _by_text(answer: str, options: Sequence[str], pick: Callable) -> int | None:
    """Returns, in a long answer, the option whose final occurrence is the last (max) or the first (min)."""
    answer = answer.lower()
    texts = [option.strip().lower() for option in options]
    found = [number for number, text in enumerate(texts) if text and text in answer]
    if not found or len(answer.split()) <= _LONG:
        return None
    return pick(found, key=lambda number: answer.rfind(texts[number]))


class Rule(NamedTuple):
    """How a benchmark judges: its parser, and what an answer counts as from which it reads no choice.

    has_pre_step: `choices.answer_part` is applied first, as in the reference's general evaluator.
    """
    read: Parser
    unread: Literal["wrong", "random", "left_out"]
    has_pre_step: bool


RULES = {
    "next_qa": Rule(next_qa, "random", True),
    "perception_test": Rule(first_word, "wrong", True),
    "mvbench": Rule(start_letter, "wrong", True),
    "tomato": Rule(option_match, "wrong", False),
    "motion_bench": Rule(start_letter, "wrong", True),
    "temp_compass": Rule(temp_compass, "wrong", False),
    "video_mme": Rule(video_mme, "left_out", False),
    "long_video_bench": Rule(long_video_bench, "random", False),
    "mlvu": Rule(start_letter, "wrong", True),
    "lvbench": Rule(start_letter, "wrong", False),
    "video_eval_pro": Rule(start_letter, "wrong", True),
    "ego_schema": Rule(ego_schema, "random", True),
    "ai2d": Rule(option_match, "wrong", True),
    "a_okvqa": Rule(option_match, "wrong", True),
    "science_qa": Rule(option_match, "wrong", True),
    "real_world_qa": Rule(option_match, "wrong", True),
    "mmmu": Rule(mmmu, "random", True),
    "muir_bench": Rule(mmmu, "random", True),
    "mmiu": Rule(mmmu, "random", True),
    "blink": Rule(mmmu, "random", True),
}


def score(benchmark: str, targets: Sequence[clean.Target | tuple],
          answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, valid by the clean rule; accuracy_reference, valid_reference by the benchmark's.

    The clean rule counts an answer as wrong if no choice can be read from it. accuracy_reference is missing
    where the benchmark leaves out every answer.

    Raises:
      ValueError: `benchmark` is not in RULES, or there is no answer.
    """
    if benchmark not in RULES:
        raise ValueError(f"benchmark must be one of {sorted(RULES)}; got {benchmark!r}")
    rule = RULES[benchmark]
    scores = clean.score(targets, answers)
    del scores["accuracy_reference"]
    rows = [_reference(rule, clean.Target(*target), answer)
            for target, answer in zip(targets, answers, strict=True)]
    return scores | hits.means(rows)


def score_ai2d(targets: Sequence[clean.Target | tuple], answers: Sequence[str],
               boxes: Sequence[Literal["opaque", "transparent"] | None]) -> dict[str, float]:
    """Returns the scores of AI2D twice, as transparent_NAME (the published headline) and opaque_NAME.

    Args:
      boxes: the boxes over the labels of a question's diagram; None if the labels are not single letters.
        Questions with None count in both variants.

    Raises:
      ValueError: a variant has no question.
    """
    scores = {}
    for variant in ("transparent", "opaque"):
        chosen = [number for number, box in enumerate(boxes) if box in (variant, None)]
        of_variant = score("ai2d", [targets[number] for number in chosen],
                           [answers[number] for number in chosen])
        scores |= {f"{variant}_{name}": value for name, value in of_variant.items()}
    return scores


def _reference(rule: Rule, target: clean.Target, answer: str) -> dict[str, float]:
    answer = choices.answer_part(answer) if rule.has_pre_step else answer.strip()
    chosen = rule.read(answer, target.options)
    if chosen is not None:
        return {"accuracy_reference": float(chosen == target.right), "valid_reference": 1.0}
    if rule.unread == "left_out":
        return {"valid_reference": 0.0}
    guessed = 1 / len(target.options) if rule.unread == "random" else 0.0
    return {"accuracy_reference": guessed, "valid_reference": 0.0}
