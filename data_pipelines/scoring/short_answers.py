"""Scores of short answers to questions about images: VQA, ANLS, relaxed correctness, exact match.

All take the accepted answers of one question and the text of an answer, and return 0 to 1. `score` takes the
part of an answer that is judged first (`choices.answer_part`), as the reference does.

Source: reference, olmo/eval/vqa.py; VQA normalisation: GT-Vision-Lab/VQA, vqaEval.py; relaxed correctness and
ANLS: google-research/pix2struct, metrics.py; ANLS: Biten et al. 2019, equation 1.
"""

import re
from collections.abc import Callable, Sequence

from data_pipelines.scoring import hits
from molmo2_jax.inputs import choices

TOLERANCE = 0.05        # of a number, relative (ChartQA)
ANLS_THRESHOLD = 0.5    # of the edit distance over the longer length
VOTES = 3               # equal human answers that make an answer fully right (VQA)

NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't "
    "mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've").split()
# A word that lacks one apostrophe -> the word with all of them.
_WITH_APOSTROPHES = {word[:place] + word[place + 1:]: word for word in CONTRACTIONS
                     for place, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}
_DECIMAL_COMMA = re.compile(r"\d,\d")


def normalise(answer: str) -> str:
    """Returns an answer as VQA compares it: lower case, no articles, little punctuation, numbers as digits.

    A sign is removed where a space is next to it anywhere, or where the text has a comma between digits;
    else a space replaces it. Dots stay only in front of a digit.
    """
    text = answer.replace("\n", " ").replace("\t", " ").lower().strip()
    has_comma, result = bool(_DECIMAL_COMMA.search(text)), text
    for sign in PUNCTUATION:
        is_loose = f"{sign} " in text or f" {sign}" in text or has_comma
        result = result.replace(sign, "" if is_loose else " ")
    words = re.sub(r"\.(?!\d)", "", result).split()
    words = ["0" if word == "none" else NUMBERS.get(word, word) for word in words]
    return " ".join(_WITH_APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa(accepted: Sequence[str], answer: str) -> float:
    """Returns a third of the human answers that equal the answer after `normalise`, at most 1 (VQA v2)."""
    answer = normalise(answer)
    return min(sum(normalise(one) == answer for one in accepted) / VOTES, 1.0)


def a_okvqa(accepted: Sequence[str], answer: str) -> float:
    """Returns the same, normalising only case and outer spaces (A-OKVQA, direct answers)."""
    answer = answer.lower().strip()
    return min(sum(one.lower().strip() == answer for one in accepted) / VOTES, 1.0)


def exact(accepted: Sequence[str], answer: str) -> float:
    """Returns whether the answer is one of those accepted, in any case of letters (GQA, TallyQA)."""
    return float(answer.lower() in [one.lower() for one in accepted])


def normalised_match(accepted: Sequence[str], answer: str) -> float:
    """Returns whether the answer equals an accepted one after `normalise` (RealWorldQA, short answers)."""
    return float(normalise(answer) in [normalise(one) for one in accepted])


def anls(accepted: Sequence[str], answer: str) -> float:
    """Returns the largest normalised Levenshtein similarity, in any case; 0 from a distance of one half on.

    Two empty texts are equal; the reference divides by 0 there.
    """
    return max(_similarity(one.lower(), answer.lower()) for one in accepted)


def _similarity(first: str, second: str) -> float:
    longer = max(len(first), len(second))
    distance = choices.edit_distance(first, second) / longer if longer else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def relaxed(accepted: Sequence[str], answer: str) -> float:
    """Returns whether the answer is within 5 % of a number other than 0, else equal in any case (ChartQA).

    A percent sign divides by 100. "1,000" is no number here, and 0 is compared as text.
    """
    return float(any(_is_close(one, answer) for one in accepted))


def _is_close(true: str, answer: str) -> bool:
    wanted, given = _number(true), _number(answer)
    if given is None or not wanted:
        return true.lower() == answer.lower()
    return abs(given - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_free_text(accepted: Sequence[str], answer: str) -> float:
    """Returns whether a sentence holds the right value (ChartQA, secondary).

    Judged is what follows "answer:", if anything does. A number: the first one in it, number words turned
    into digits, within 5 % of the target as it is or divided by 100. A text: contained; a list "[a, b]": all
    of them. The sign of a whole number is not read, and digits replace number words inside words, as in the
    reference.
    """
    return float(any(_holds(one, answer) for one in accepted))


def _holds(true: str, answer: str) -> bool:
    true, answer = (_after_answer(text.lower().strip()) for text in (true, answer))
    answer = answer.removesuffix(".")
    if not answer:
        return False
    wanted = _number_alone(true)
    if wanted is None:
        is_list = "[" in true and "," in true
        parts = true.replace("[", "").replace("]", "").split(",") if is_list else [true]
        return all(part.strip() in answer for part in parts)
    answer = answer.replace(",", "")
    for word, digits in NUMBERS.items():
        answer = answer.replace(word, digits)
    match = re.search(r"[-+]?[0-9]*\.[0-9]+|[0-9]+", answer)
    if match is None:
        return False
    return any(abs(wanted - given) / (abs(wanted) or 1) <= TOLERANCE
               for given in (float(match[0]), float(match[0]) / 100))


def _after_answer(text: str) -> str:
    return text.split("answer:")[1].strip() if "answer:" in text else text


def _number_alone(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def score(judge: Callable[[Sequence[str], str], float], targets: Sequence[Sequence[str]],
          answers: Sequence[str]) -> dict[str, float]:
    """Returns {"score": mean of `judge` over questions, "valid": share of answers with any text}.

    Args:
      judge: a function of this file.
      targets: the accepted answers of each question; ten human ones for `vqa`.

    Raises:
      ValueError: there is no question, or one without an accepted answer.
    """
    rows = []
    for accepted, answer in zip(targets, answers, strict=True):
        if not accepted or isinstance(accepted, str):
            raise ValueError(f"a question must have a list of accepted answers; got {accepted!r}")
        part = choices.answer_part(answer)
        rows.append({"score": float(judge(accepted, part)), "valid": float(bool(part))})
    return hits.means(rows)
