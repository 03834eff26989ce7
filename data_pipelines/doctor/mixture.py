"""What a mixture amounts to: the share of each data set in the stream, its size, and its epochs in a run."""

import dataclasses
from collections.abc import Mapping, Sequence

from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.schemas import origins


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One data set of a mixture.

    examples: records in its folder; of an absent one the published number; None where neither is known.
    shares: of the stream, one per lesson; None where a size that decides it is not known, 0 if it is left
      out.
    uses, epochs: examples that the run takes from it, and how often that is all of them; None if not known.
    origin: for an absent folder, how to get its records.
    problem: why a folder that is there cannot be opened, which ends a run at its start.
    """
    task: str
    folder: str
    examples: int | None
    shares: tuple[float | None, ...]
    is_missing: bool = False
    uses: float | None = None
    epochs: float | None = None
    origin: str = ""
    problem: str = ""


def shares(mixture: tasks.Mixture, examples: Mapping[str, int | None]) -> dict[str, float | None]:
    """Returns the share of each task, as tasks.rates; None throughout a group that has a size not known.

    A size that the mixture does not look at (tasks.Member.root_size_factor) need not be known.
    """
    known = {member.task: _size(member, examples) for group in mixture for member in group.members}
    found = tasks.rates(mixture, {task: 1 if size is None else size for task, size in known.items()})
    for group in mixture:
        if any(known[member.task] is None for member in group.members):
            found |= dict.fromkeys(member.task for member in group.members)
    return found


def _size(member: tasks.Member, examples: Mapping[str, int | None]) -> int | None:
    """Returns a number of examples from which the member's size follows; None if it is not known."""
    factor = member.root_size_factor
    is_needed = factor is None or 0 < factor < 1
    return examples.get(member.task) if is_needed else 1


def describe(mixtures: Sequence[tasks.Mixture], known: Mapping[str, tasks.Task], *,
             lessons: Sequence[int] = (), total: float | None = None, allow_missing: bool = False
             ) -> list[Row]:
    """Returns the data sets of a run, sorted by task.

    Args:
      mixtures: one per lesson. lessons: the examples after which the second and later ones begin.
      total: examples that the run takes; None: not known.
      allow_missing: whether the run leaves out absent folders; the shares of the others then grow.
    """
    names = sorted({member.task for mixture in mixtures for member in tasks.members(mixture)})
    absent = {task for mixture in mixtures for task in tasks.missing(mixture, known)}
    examples, problems = {}, {}
    for task in names:
        examples[task], problems[task] = (
            (known[task].examples, "") if task in absent else _number(known[task].folder))
    if allow_missing:
        mixtures = [tasks.without(mixture, absent) for mixture in mixtures]
    by_lesson = [shares(mixture, examples) for mixture in mixtures]
    return [_row(task, known[task], examples[task], tuple(one.get(task, 0.0) for one in by_lesson),
                 _lengths(lessons, total), task in absent, problems[task]) for task in names]


def _row(task: str, entry: tasks.Task, examples: int | None, found: tuple[float | None, ...],
         lengths: Sequence[float] | None, is_missing: bool, problem: str) -> Row:
    uses = None
    if lengths is not None and None not in found:
        uses = sum(share * length for share, length in zip(found, lengths, strict=True) if share)
    return Row(task=task, folder=entry.folder, examples=examples, shares=found, is_missing=is_missing,
               uses=uses, epochs=uses / examples if uses is not None and examples else None,
               origin=origin(task, entry) if is_missing else "", problem=problem)


def _lengths(lessons: Sequence[int], total: float | None) -> list[float] | None:
    """Returns how many examples each lesson has; None if the total is not known."""
    if total is None:
        return None
    edges = [min(edge, total) for edge in (0, *lessons, total)]
    return [end - start for start, end in zip(edges, edges[1:], strict=False)]


def _number(folder: str) -> tuple[int | None, str]:
    """Returns the number of records in a folder; None, and why, if it cannot be opened."""
    try:
        return sources.count(folder), ""
    except ValueError as error:
        return None, str(error)


def origin(task: str, entry: tasks.Task) -> str:
    """Returns how to get the records of a task."""
    if entry.schema is None:
        return "a data folder of your own (docs/data_format.md)"
    output = "" if entry == tasks.TASKS.get(task) else f" --output={entry.folder}"
    return f"{origins.of(task)}; python -m launch.prepare --task={task}{output} converts them"
