"""Captions judged by statements: how many human ones a caption makes, and how many of its own are true.

A judge splits captions into statements and says which of a list a text states. The published judge is
gpt-4.1-2025-04-14 at temperature 0; here it is any `Judge`, such as one that reads recorded judgements. A
judgement that is missing is an error, never a skipped video.

Source: paper, section 4 (Molmo2-CapEval); reference, olmo/eval/vixmo_caption_utils.py.
"""

import dataclasses
import difflib
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data_pipelines.scoring import hits

CATEGORIES = (
    "Object", "Action", "Attribute", "Relation", "Location", "Quantity/Number", "State/Condition", "Event",
    "Motion/Trajectory", "Pose", "Gesture", "Emotion/Affect", "Identity", "OCR", "Camera", "Lighting/Weather",
    "Scene/Context", "Causation/Purpose")


class Statement(NamedTuple):
    """One fact, and its category; None if the judge named none."""
    text: str
    category: str | None


Verdicts = list[bool | None]   # True: stated; None: the judge's line cannot be read


def _not_asked(question: str, caption: str) -> str:
    raise ValueError("this judge answers no questions about captions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """split: caption -> atomic statements. check: (statements, text) -> at most one verdict per statement.
    choose: (multiple-choice question about a video, caption of it) -> an answer, such as "B. text"."""
    split: Callable[[str], list[Statement]]
    check: Callable[[Sequence[str], str], Verdicts]
    choose: Callable[[str, str], str] = _not_asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Human statements about a video, and the text that a model's statements are checked against."""
    statements: tuple[Statement, ...]
    caption: str


def read_statements(text: str) -> list[Statement]:
    """Returns the statements of a judge's list, a line each: "statement | category".

    An unknown category becomes the closest known one. A line without a bar has none; the reference draws one.
    """
    found = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        statement, bar, category = line.rpartition("|")
        if not bar:
            found.append(Statement(line, None))
            continue
        category = category.strip()
        if category not in CATEGORIES:
            category = difflib.get_close_matches(category, CATEGORIES, n=1, cutoff=0)[0]
        found.append(Statement(statement.strip(), category))
    return found


def read_verdicts(text: str, number: int) -> Verdicts:
    """Returns the verdicts of a judge's list, at most `number`: "1. Stated", "2. Not Stated".

    A line that ends in "not st...", as misspelt ones do, is False, another that has " stated" True, the rest
    None.
    """
    verdicts: Verdicts = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        if re.fullmatch(r".*\bnot st[a-z]+", line, re.IGNORECASE):
            verdicts.append(False)
        else:
            verdicts.append(True if " stated" in line.lower() else None)
    return verdicts[:number]


def score(targets: Sequence[Target], captions: Sequence[str], judge: Judge) -> dict[str, float]:
    """Returns recall, precision, their harmonic mean f1, valid, and recall_CATEGORY and precision_CATEGORY.

    Recall and precision are averaged over videos before f1 is taken. Verdicts that cannot be read or are
    missing shrink the denominator; a video without any counts as 0. Categories are averaged over the videos
    that have statements of them. An empty caption is not judged: it states nothing, and has precision 0.
    valid is the share of captions with any text.
    """
    rows = []
    for target, caption in zip(targets, captions, strict=True):
        caption = caption.strip()
        said = judge.split(caption) if caption else []
        recalled = _check(judge, target.statements, caption)
        row = _named("recall", target.statements, recalled)
        row |= _named("precision", said, _check(judge, said, target.caption))
        rows.append(row | {"valid": float(bool(caption))})
    scores = hits.means(rows)
    total = scores["recall"] + scores["precision"]
    return scores | {"f1": 2 * scores["recall"] * scores["precision"] / total if total else 0.0}


def _check(judge: Judge, statements: Sequence[Statement], text: str) -> Verdicts:
    if not statements or not text:
        return [False] * len(statements)
    return list(judge.check([one.text for one in statements], text))[:len(statements)]


def _named(name: str, statements: Sequence[Statement], verdicts: Verdicts) -> dict[str, float]:
    row = {name: _share(verdicts)}
    judged = list(zip(statements, verdicts, strict=False))
    for category in dict.fromkeys(one.category for one, _ in judged if one.category):
        row[f"{name}_{category}"] = _share([verdict for one, verdict in judged if one.category == category])
    return row


def _share(verdicts: Verdicts) -> float:
    readable = [verdict for verdict in verdicts if verdict is not None]
    return sum(readable) / len(readable) if readable else 0.0


# ---- recorded judgements


def recorded(path: str | pathlib.Path) -> Judge:
    """Returns a judge that answers from a file of JSON lines, each of one of three kinds.

      {"caption": text, "split": "statement | category\\n..."}
      {"statements": [text, ...], "caption": text, "check": "1. Stated\\n2. Not Stated\\n..."}
      {"question": text, "caption": text, "choose": "B. text"}

    "split", "check" and "choose" are the judge's raw answers. Asked what the file lacks, the judge raises.

    Raises:
      ValueError: a line is not of these kinds, or, later, a judgement is missing.
    """
    splits, checks, choices = read_record(path)

    def split(caption: str) -> list[Statement]:
        if caption not in splits:
            raise ValueError(f"{path} must hold statements of every caption; got none of {caption[:80]!r}")
        return read_statements(splits[caption])

    def check(statements: Sequence[str], caption: str) -> Verdicts:
        key = tuple(statements), caption
        if key not in checks:
            raise ValueError(f"{path} must hold verdicts on all statements; got none on {len(statements)} "
                             f"of them against {caption[:80]!r}")
        return read_verdicts(checks[key], len(statements))

    def choose(question: str, caption: str) -> str:
        if (question, caption) not in choices:
            raise ValueError(f"{path} must hold answers about every caption; got none to {question[:80]!r} "
                             f"about {caption[:80]!r}")
        return choices[question, caption]

    return Judge(split=split, check=check, choose=choose)


class Record(NamedTuple):
    """A judge's raw answers: caption -> split, (statements, text) -> check, (question, caption) -> choose."""
    splits: dict[str, str]
    checks: dict[tuple[tuple[str, ...], str], str]
    choices: dict[tuple[str, str], str]


def read_record(path: str | pathlib.Path) -> Record:
    """Returns the judge's answers in a file for `recorded`.

    A last line without its end was torn by a kill, and is left out.

    Raises:
      ValueError: a line is not of the three kinds.
    """
    splits, checks, choices = found = Record({}, {}, {})
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "split" in record:
                splits[record["caption"]] = str(record["split"])
            elif "choose" in record:
                choices[record["question"], record["caption"]] = str(record["choose"])
            else:
                checks[tuple(record["statements"]), record["caption"]] = str(record["check"])
        except (ValueError, KeyError, TypeError) as error:
            is_torn = isinstance(error, json.JSONDecodeError) and line.startswith("{")
            if number == len(lines) and is_torn:
                break
            raise ValueError(f"{path}:{number}: a judgement must be an object with caption and split, "
                             "with statements, caption and check, or with question, caption and choose; "
                             f"got {line[:80]!r}") from error
    return found
