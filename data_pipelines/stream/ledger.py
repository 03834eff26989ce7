"""Counts of what a run has consumed and skipped; part of the iterator's state.

Nothing is skipped silently: every broken record is logged once, counted by task and reason, and listed. If
more than max_broken records of a task are broken, the run ends and lists them.
"""

import collections
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

_log = logging.getLogger(__name__)

# Reasons to skip a record.
LINE = "line"              # it breaks the format, or its media are missing
MEDIA = "media"            # its video or images cannot be read
ANNOTATION = "annotation"  # its annotations do not match the media
SIZE = "size"              # it does not fit in a row
WORKER = "worker"          # reading it killed the process twice

_SHOWN = 20  # broken records listed in an error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """The counts of one example; `reason` is empty for a good one."""
    number: int              # in the stream
    task: str
    key: str = ""            # file and line
    annotations: int = 0     # of the record
    branches: int = 0        # made of them that are in the sequence
    is_cut: bool = False     # the length limit cut the end of the last branch
    reason: str = ""
    message: str = ""


class TooManyBroken(ValueError):
    """More records are broken than max_broken allows; the message lists them."""


class Ledger:
    """Counts of a run.

    sizes: number of records of each task. max_broken: broken records allowed per task.
    """

    def __init__(self, sizes: Mapping[str, int], max_broken: int):
        self._sizes, self._max_broken = dict(sizes), max_broken
        self._totals = collections.Counter()
        self._examples = collections.Counter()                   # by task
        self._skipped = collections.defaultdict(collections.Counter)  # by task and reason
        self._broken = collections.defaultdict(dict)              # by task and key: reason and message

    def skip(self, note: Note) -> None:
        """Counts a skipped record.

        Raises:
          TooManyBroken: more than max_broken records of the task are broken, or all of them.
        """
        self._skipped[note.task][note.reason] += 1
        broken = self._broken[note.task]
        if note.key in broken:
            return
        broken[note.key] = f"{note.reason}: {note.message}"
        if len(broken) > self._max_broken:
            raise TooManyBroken(f"at most max_broken = {self._max_broken} records of a task may be broken; "
                                + _listing(note.task, broken))
        if len(broken) >= self._sizes[note.task]:
            raise TooManyBroken("a task must have a usable record; " + _listing(note.task, broken))

    def emit(self, notes: Sequence[Note], tokens: int, crops: int, visual_tokens: int) -> None:
        """Counts a row that packs the examples of `notes`."""
        self._totals.update(
            rows=1, tokens=tokens, crops=crops, visual_tokens=visual_tokens, examples=len(notes),
            branches=sum(note.branches for note in notes), cut=sum(note.is_cut for note in notes),
            dropped_annotations=sum(note.annotations - note.branches for note in notes))
        self._examples.update(note.task for note in notes)

    def state(self) -> dict[str, str]:
        """Returns the ledger as two JSON texts."""
        counts = {"totals": self._totals, "examples": self._examples, "skipped": self._skipped}
        return {"counts": json.dumps(counts, sort_keys=True),
                "broken": json.dumps(self._broken, sort_keys=True)}

    def restore(self, state: Mapping[str, str]) -> None:
        """Restores the counts of `state`."""
        counts = json.loads(state["counts"])
        self._totals = collections.Counter(counts["totals"])
        self._examples = collections.Counter(counts["examples"])
        self._skipped = collections.defaultdict(
            collections.Counter, {task: collections.Counter(by) for task, by in counts["skipped"].items()})
        self._broken = collections.defaultdict(dict, json.loads(state["broken"]))


EMPTY = {"counts": json.dumps({"totals": {}, "examples": {}, "skipped": {}}), "broken": "{}"}


def merge(states: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Returns the state of a ledger with the sums and the union of several."""
    totals, examples = collections.Counter(), collections.Counter()
    skipped = collections.defaultdict(collections.Counter)
    broken: dict[str, dict[str, str]] = {}
    for state in states:
        counts = json.loads(state["counts"])
        totals.update(counts["totals"])
        examples.update(counts["examples"])
        for task, reasons in counts["skipped"].items():
            skipped[task].update(reasons)
        for task, records in json.loads(state["broken"]).items():
            broken.setdefault(task, {}).update(records)
    counts = {"totals": totals, "examples": examples, "skipped": skipped}
    return {"counts": json.dumps(counts, sort_keys=True), "broken": json.dumps(broken, sort_keys=True)}


class Reporter:
    """Logs each broken record once per process, although every epoch meets it again."""

    def __init__(self):
        self._seen = set()

    def report(self, note: Note) -> None:
        if (note.task, note.key) not in self._seen:
            self._seen.add((note.task, note.key))
            _log.warning("skipped %s of %s (%s): %s", note.key, note.task, note.reason, note.message)


def _listing(task: str, broken: Mapping[str, str]) -> str:
    shown = [f"\n  {key}: {text}" for key, text in list(broken.items())[:_SHOWN]]
    more = f"\n  and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    return f"got {len(broken)} broken in {task}:{''.join(shown)}{more}"


def counters(state: Mapping[str, str], row_tokens: int, row_crops: int) -> dict[str, Any]:
    """Returns the counts of a ledger's state, for logs and metrics.

    rows, examples, branches, dropped_annotations, cut (examples), tokens, crops, visual_tokens: totals.
    token_fill, crop_fill: share of the rows' budgets in use; packing_efficiency: the larger of the two.
    examples_by_task: {task: count}. skipped: {task: {reason: count}}, once per epoch. broken:
    {task: {record: reason and message}}.
    """
    counts = json.loads(state["counts"])
    names = ("rows", "examples", "branches", "dropped_annotations", "cut", "tokens", "crops", "visual_tokens")
    totals = {name: counts["totals"].get(name, 0) for name in names}
    rows = max(totals["rows"], 1)
    return totals | {
        "token_fill": totals["tokens"] / (rows * row_tokens),
        "crop_fill": totals["crops"] / (rows * row_crops) if row_crops else 0.0,
        "packing_efficiency": max(totals["tokens"] / row_tokens, totals["crops"] / max(row_crops, 1)) / rows,
        "examples_by_task": counts["examples"], "skipped": counts["skipped"],
        "broken": json.loads(state["broken"])}
