"""Multiple-choice questions as text, both directions.

Evaluation always uses one layout; training mostly uses random ones. The probabilities are the reference's
(olmo/preprocessing/multiple_choice_templates.py), the wording is our own. One deliberate difference: a
question to be answered with the bare identifier always says so.
"""

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Rng = np.random.RandomState | np.random.Generator

INSTRUCTION = "Only return the correct answer option."

P_EVALUATION_LAYOUT = 0.1
P_LABEL_ONLY = 0.25
P_LABELLED = 0.8       # of questions that are not label-only
P_INLINE = 0.1
P_INSTRUCTION = 0.5
P_COMMON_MARKER = 0.8
P_BULLET = 0.5

_COMMON_MARKERS = ("{}. ", "{}) ", "{}: ", "({}) ")
_UNUSUAL_MARKERS = ("{} - ", "{}- ", "[{}] ", "<{}> ", "{}> ", "{} | ", "{} = ", "{}/ ", "#{} ", "{}; ",
                    "*{}* ", "{}, ", "{} -> ", "{} ~ ", "'{}' ", "({})", "{} : ", "Option {}: ")
_BULLETS = ("- ", "* ", "• ")
_SEPARATORS = (";", " |||", "")

# {q} question, {o} options, {k} the word for the identifiers
_WITH_INSTRUCTION = (
    "{q}\n{o}\nAnswer with one of the options.", "{q}\nChoose the right option.\n{o}",
    "Pick the option that answers the question.\n{q}\n{o}", "{q}\n{o}\nWhich option is right?",
    "Question: {q}\nOptions:\n{o}\nReply with the full option.", "{q}\n{o}\nSelect one option.",
    "Select the best answer.\n{q}\n{o}", "{q} Answer with one of these options:\n{o}",
    "{q}\n{o}\nReturn only the option that is correct.", "{q}\nAnswer by copying one line:\n{o}",
    "Read the options and choose one.\nOptions:\n{o}\nQuestion: {q}", "{q}\n\n{o}\n\nGive the right option.",
    "Here is a multiple-choice question.\n{q}\n{o}", "{q}\nOne of these is correct, say which:\n{o}",
    "{q}\nPossible answers:\n{o}\nRepeat the correct one.")
_LABEL_ONLY = (
    "{q}\n{o}\nAnswer with the {k} only.", "{q}\n{o}\nReply with just the {k} of the right option.",
    "Give the {k} of the correct option.\n{q}\n{o}", "{q}\nAnswer with the option's {k}.\n{o}",
    "Question: {q}\nOptions:\n{o}\nReturn only the {k}.", "{q}\n{o}\nWhich {k} is correct?",
    "{q}\n{o}\nRespond with a single {k}.", "{q} State only the {k}:\n{o}", "{q}\n\n{o}\n\nCorrect {k}:")
_PLAIN = (
    "{q}\n{o}", "{q}\n\n{o}", "{q} {o}", "Question: {q}\n{o}", "Question: {q}\nOptions:\n{o}",
    "{q}\nOptions:\n{o}", "{q}\nOptions: {o}", "{q}\nChoices:\n{o}", "{q}\nAnswers:\n{o}", "Q: {q}\n{o}",
    "Q: {q}\nA:\n{o}", "{q}\nPossible answers:\n{o}", "{o}\n{q}", "Options:\n{o}\nQuestion: {q}",
    "Options:\n{o}\n\n{q}", "{q}\nSelect from:\n{o}", "{q}\n- - -\n{o}",
    "Question:\n{q}\nOptions:\n{o}", "{q}\n{o}\n")


class Shown(NamedTuple):
    """A question as the model sees it.

    lines: each option exactly as shown, without its bullet; this is the answer unless label_only.
    names: the identifier of each option, or its text if the options have no identifiers.
    """
    prompt: str
    lines: tuple[str, ...]
    names: tuple[str, ...]
    label_only: bool = False

    def answer(self, number: int) -> str:
        """Returns the answer text for option `number`, counted from 0."""
        return self.names[number] if self.label_only else self.lines[number]


def _check(question: str, options: Sequence[str], answer: int | None = None) -> None:
    if not question.strip() or len(options) < 2:
        raise ValueError("multiple choice must have a question and at least two options; "
                         f"got {question!r} and {list(options)}")
    if answer is not None and not 0 <= answer < len(options):
        raise ValueError(f"the answer must be one of options 0 ... {len(options) - 1}; got {answer}")


def format_evaluation(question: str, options: Sequence[str], *, is_labelled: bool = True) -> Shown:
    """Returns the question with options one per line, as "A. text", or bare with is_labelled=False.

    Raises:
      ValueError: there is no question, fewer than two options, or more than 26 labelled options.
    """
    _check(question, options)
    names = _identifiers("A", len(options)) if is_labelled else tuple(options)
    lines = tuple(f"{name}. {text}" for name, text in zip(names, options, strict=True))
    lines = lines if is_labelled else tuple(options)
    return Shown("\n".join([question, INSTRUCTION, *lines]), lines, names)


def format_training(question: str, options: Sequence[str], answer: int, rng: Rng, *,
                    is_labelled: bool = True) -> Shown:
    """Returns the question in a random layout; its right answer is `.answer(answer)`.

    Every choice is drawn from `rng`, so the layout depends on its state alone. Use is_labelled=False if the
    options must not get identifiers, for example because the image already has its own.

    Raises:
      ValueError: as format_evaluation, or `answer` is not an option.
    """
    _check(question, options, answer)
    if rng.uniform() < P_EVALUATION_LAYOUT:
        return format_evaluation(question, options, is_labelled=is_labelled and len(options) <= 26)
    label_only = is_labelled and rng.uniform() < P_LABEL_ONLY
    p_labelled = 1.0 if label_only or not options[answer].strip() else P_LABELLED
    with_labels = is_labelled and rng.uniform() < p_labelled
    is_inline = rng.uniform() < P_INLINE
    has_instruction = rng.uniform() < P_INSTRUCTION
    marker, names, kind = "", tuple(options), ""
    if with_labels:
        marker = _draw(_COMMON_MARKERS if rng.uniform() < P_COMMON_MARKER else _UNUSUAL_MARKERS, rng)
        first = _draw("Aa1i" if len(options) <= 26 else "1", rng)
        names, kind = _identifiers(first, len(options)), _kind(first, rng)
        lines = tuple(marker.format(name) + text for name, text in zip(names, options, strict=True))
    else:
        lines = tuple(options)
    separators = _usable_separators(marker, options)
    if is_inline and separators:
        listed = f"{_draw(separators, rng)} ".join(lines)
    else:
        bullet = _draw(_BULLETS, rng) if not with_labels and rng.uniform() < P_BULLET else ""
        listed = "\n".join(bullet + line for line in lines)
    layouts = _LABEL_ONLY if label_only else _WITH_INSTRUCTION if has_instruction else _PLAIN
    layout = _draw(layouts, rng)
    # A single pass leaves braces inside the texts unchanged.
    texts = {"q": question, "o": listed, "k": kind}
    prompt = re.sub(r"\{([qok])\}", lambda hole: texts[hole.group(1)], layout)
    return Shown(prompt, lines, names, label_only)


def _draw(items, rng: Rng):
    return items[min(int(rng.uniform() * len(items)), len(items) - 1)]


def _usable_separators(marker: str, options: Sequence[str]) -> list[str]:
    """Returns the separators that occur in no option; "" only if the options are labelled."""
    texts = [marker, *options]
    return [separator for separator in _SEPARATORS
            if (separator and not any(separator.strip() in text for text in texts))
            or (not separator and marker)]


def _identifiers(first: str, count: int) -> tuple[str, ...]:
    """Returns A B C ..., a b c ..., 1 2 3 ... or i ii iii ..., selected by the first of them."""
    if first == "1":
        return tuple(str(number + 1) for number in range(count))
    if first == "i":
        return tuple(_roman(number + 1) for number in range(count))
    letters = string.ascii_uppercase if first == "A" else string.ascii_lowercase
    if count > len(letters):
        raise ValueError(f"at most {len(letters)} options can have letters; got {count}")
    return tuple(letters[:count])


def _roman(number: int) -> str:
    text = ""
    for value, numeral in ((50, "l"), (40, "xl"), (10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i")):
        text += numeral * (number // value)
        number %= value
    return text


def _kind(first: str, rng: Rng) -> str:
    own = {"1": "number", "i": "numeral"}.get(first, "letter")
    draw = rng.uniform()
    return own if draw < 0.6 else "identifier" if draw < 0.8 else "label"


def answer_part(text: str) -> str:
    """Returns the part of a longer answer to score: after the first "Answer:", else its most frequent line.

    Source: paper's evaluation of image questions; reference: olmo/eval.
    """
    text = text.strip()
    if "Answer:" in text:
        return text.split("Answer:", 1)[1].strip()
    lines = text.split("\n")
    if len(lines) > 1:
        return max(lines, key=lines.count)  # ties: the first
    return " ".join(text.split())


def read_choice(text: str, shown: Shown, options: Sequence[str] | None = None) -> int | None:
    """Returns the index of the option that an answer names, or None if it names none or several.

    An answer may be the line as shown, its identifier, (with `options`) its text, or a sentence that mentions
    exactly one identifier. Unlike `match_option` it never guesses: an unreadable answer counts as wrong.
    """
    text = answer_part(text)
    for texts in (shown.lines, shown.names, options or ()):
        equal = [number for number, one in enumerate(texts)
                 if text and _without_dots_and_spaces(text) == _without_dots_and_spaces(one)]
        if len(equal) == 1:
            return equal[0]
    mentioned = [number for number, name in enumerate(shown.names) if _mentions(text, name)]
    if len(mentioned) != 1:
        return None
    name = shown.names[mentioned[0]]
    is_word = len(name) == 1 and (name in "AI" or not name.isupper())  # "A cube", "I see", "2 cubes"
    return None if is_word and not _mentions(text, name, r"\s*(?:[^\w\s]|$)") else mentioned[0]


def _mentions(text: str, name: str, after: str = r"(?!\w)") -> bool:
    return bool(name.strip()) and bool(re.search(rf"(?<!\w){re.escape(name)}{after}", text))


def _without_dots_and_spaces(text: str) -> str:
    """Returns the text in lower case with single spaces and no trailing full stops or spaces."""
    return " ".join(text.lower().split()).rstrip(". ")


def match_option(text: str, names: Sequence[str]) -> int:
    """Returns the option whose name best matches an answer; always guesses (the reference's rule).

    In order of preference: an equal name; the only name that the text starts with; the only name that starts
    with the text; the only name that contains it; the first name with the smallest edit distance.
    """
    text, names = text.lower(), [name.lower() for name in names]
    if text in names:
        return names.index(text)
    for fits in (text.startswith, lambda name: name.startswith(text), lambda name: text in name):
        fitting = [number for number, name in enumerate(names) if fits(name)]
        if len(fitting) == 1:
            return fitting[0]
    distances = [edit_distance(text, name) for name in names]
    return distances.index(min(distances))


def edit_distance(first: str, second: str) -> int:
    """Returns the number of insertions, deletions and replacements that turn one text into the other."""
    previous = list(range(len(second) + 1))
    for row, one in enumerate(first, 1):
        current = [row]
        for column, other in enumerate(second, 1):
            current.append(min(previous[column] + 1, current[-1] + 1,
                               previous[column - 1] + (one != other)))
        previous = current
    return previous[-1]
