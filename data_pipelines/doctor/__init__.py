"""Examines data sets before training: what is usable, how large records are, what reading them costs.

`examine` goes through one data folder; its result is plain values for JSON, and a few pictures. Media are
decoded in a process of their own, so that a decoder that crashes is a problem of one record.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from data_pipelines import tasks
from data_pipelines.doctor import examination
from data_pipelines.doctor import sample as samples
from data_pipelines.doctor import statistics
from data_pipelines.doctor import thumbnails
from data_pipelines.stream import child as children
from data_pipelines.stream import ledger

MOST_THUMBNAILS = 6  # of a data set


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkup:
    """The result for one data folder.

    records: in the folder. result: see statistics.Statistics.result and docs/data.md.
    problems: messages, in the order of the records.
    sizes: int64[N, 3] tokens, crops and visual tokens of usable records; seconds: CPU time of one.
    """
    name: str
    records: int
    result: dict[str, Any]
    problems: tuple[str, ...]
    sizes: np.ndarray
    seconds: float | None
    pictures: tuple[thumbnails.Thumbnail, ...] = ()


def examine(folder: str, settings: examination.Settings, *, member: tasks.Member | None = None,
            sample: int | None = None, seed: int = 0, has_thumbnails: bool = False, cache: str | None = None,
            watch: Callable[[Sequence[int]], Iterable[int]] = iter) -> Checkup:
    """Returns what training would make of the records of a folder.

    Args:
      member: how the mixture uses the folder; by default without changes.
      sample: how many records to examine, drawn from `seed`; None: all.
      cache: local folder for copies of shards that are in a bucket.
      watch: passes the record numbers on, for a progress bar.
    """
    found = samples.of_folder(folder, cache)
    chosen = samples.choose(len(found), sample, seed)
    collected, problems, broken = statistics.Statistics(), [], set()
    look = functools.partial(_look, found, settings, member or tasks.Member(task=folder))
    with _apart(look, settings) as apart:
        for number in watch(chosen):
            finding, paths = _finding(apart, found, number)
            collected.add(finding, paths)
            problems += [f"{folder}/{one.message}" if finding.key else one.message
                         for one in finding.problems]
            if finding.reason:
                broken.add(number)
    usable = [number for number in chosen if number not in broken]
    pictures = _thumbnails(found, usable, settings, seed) if has_thumbnails and settings.has_media else ()
    result = {"name": folder, "records": len(found), "is_sampled": len(chosen) < len(found),
              **collected.result()}
    return Checkup(name=folder, records=len(found), result=result, problems=tuple(problems),
                   sizes=collected.usable_sizes, seconds=collected.seconds_per_record, pictures=pictures)


def _apart(function: Callable, settings: examination.Settings) -> contextlib.AbstractContextManager[Callable]:
    """Returns the function, called in a process of its own if media are opened."""
    if not settings.has_media:
        return contextlib.nullcontext(function)
    return children.Child(function, settings.inputs.max_read_seconds)


def _look(found: samples.Records, settings: examination.Settings, member: tasks.Member, number: int
          ) -> tuple[examination.Finding, tuple[str, ...]]:
    """Returns what the examination of a record found, and the paths of its media."""
    record = samples.read(found, number)
    return examination.examine(record, settings, member, number), _paths(record)


def _finding(look: Callable, found: samples.Records, number: int
             ) -> tuple[examination.Finding, tuple[str, ...]]:
    """Returns look(number), or that the process ended."""
    try:
        return look(number)
    except children.Crashed as crash:
        key = samples.key(found, number)
        problem = examination.Problem(stage=ledger.WORKER, message=f"{key}: {crash}")
        return examination.Finding(key=key, problems=(problem,)), ()


def _paths(record: samples.Record) -> tuple[str, ...]:
    if isinstance(record, ValueError):
        return ()
    return (*record.images, *([record.video] if record.video is not None else []))


def _thumbnails(found: samples.Records, usable: list[int], settings: examination.Settings, seed: int
                ) -> tuple[thumbnails.Thumbnail, ...]:
    """Returns pictures of usable records, drawn from the seed; one that cannot be drawn is passed over."""
    drawn: list[thumbnails.Thumbnail] = []
    with _apart(functools.partial(_draw, found), settings) as draw:
        for place in np.random.default_rng((seed, 1)).permutation(len(usable))[:4 * MOST_THUMBNAILS]:
            if len(drawn) < MOST_THUMBNAILS:
                with contextlib.suppress(ValueError, OSError, MemoryError, children.Crashed):
                    drawn.append(draw(usable[place]))
    return tuple(drawn)


def _draw(found: samples.Records, number: int) -> thumbnails.Thumbnail:
    record = samples.read(found, number)
    if isinstance(record, ValueError):
        raise record
    return thumbnails.of(record)
