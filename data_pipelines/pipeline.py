"""From data folders to packed batches: an endless, resumable iterator.

The examples of a mixture have one order; V packed streams (stream.py) read every V-th of them, and each
gives B / V rows of every global batch. Hosts divide the streams among them. So the global batches depend
neither on the number of worker processes nor, for the same V, on the number of hosts. A checkpoint holds the
position of every stream; for another V the positions are divided anew, and still every example comes once.

B rows, T tokens, M crops, R visual tokens, W patches per visual token, V streams.
"""

import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from data_pipelines import formats
from data_pipelines import ledger
from data_pipelines import order
from data_pipelines import positions
from data_pipelines import preparation
from data_pipelines import sources
from data_pipelines import stream
from data_pipelines import tasks
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import packing
from molmo2_jax.inputs import tokenizer as tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, in which order, and the fixed shape of a batch.

    train: data folders (docs/data_format.md), each alone or as (folder, rate), or a key of tasks.MIXTURES.
      Without rates folders share the stream by the square roots of their sizes. A rate may be a tuple, one
      number per lesson.
    lessons: numbers of examples after which the next lesson of a curriculum begins; () for one mixture.
    packer: packers.OldestFirst, or packers.Knapsack, the reference's.
    streams: V. A run that may later use another number of hosts with the same batches sets a multiple of all
      of them. Each has a packer's buffer of its own.
    max_broken: records of one task that may be broken in one stream; one more ends the run with their list.
    """
    train: str | tuple[str | tuple[str, float | tuple[float, ...]], ...]
    seed: int
    row_tokens: int                       # T
    row_crops: int                        # M
    batch_rows: int                       # B, of all hosts together
    row_visual_tokens: int | None = None  # R; None: as many as there are tokens
    window: int | None = None             # W; None: the larger pooling window of the model
    packer: packers.Rule = packers.OldestFirst()
    streams: int | None = None            # V; None: one for each host
    num_workers: int = 2                  # processes of each host; 0: a thread of the main process
    worker_prefetch: int = 4              # sequences that each process prepares in advance
    prefetch: int = 2                     # batches packed in advance
    weights: formats.Weights = formats.Weights()
    num_templates: int | None = None      # wordings of each kind of question; None: all
    is_pretraining: bool = False          # questions of the first stage: "long_caption 61:", "pointing: mug"
    max_broken: int = 100
    lessons: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("row_tokens", "batch_rows", "worker_prefetch"):
            config.require(getattr(self, name) >= 1, f"{name} must be >= 1", getattr(self, name))
        for name in ("row_crops", "num_workers", "prefetch", "max_broken"):
            config.require(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))
        config.require(self.window is None or self.window >= 1, "window must be >= 1 patch", self.window)
        config.require(self.streams is None or self.streams >= 1 and self.batch_rows % self.streams == 0,
                       f"streams must be >= 1 and divide the {self.batch_rows} rows of a batch", self.streams)
        config.require(self.row_visual_tokens is None or 0 <= self.row_visual_tokens <= self.row_tokens,
                       "row_visual_tokens must lie in [0, row_tokens]", self.row_visual_tokens)
        config.require(0 <= self.seed < 2**32, "seed must lie in [0, 2^32)", self.seed)
        if isinstance(self.train, str):
            config.require(self.train in tasks.MIXTURES,
                           "train must be a tuple of folders, such as ('my_data',), or one of the mixtures "
                           f"{sorted(tasks.MIXTURES)}",
                           self.train)
        self.asking()  # refuses what it cannot ask by

    def asking(self) -> formats.Asking:
        """Returns how training asks."""
        return formats.Asking(num_templates=self.num_templates, is_pretraining=self.is_pretraining,
                              weights=self.weights)

    def shape(self, model: config.Molmo2Config) -> types.RowShape:
        """Returns the shape of every row."""
        windows = (model.connector.image_window, model.connector.video_window)
        widest = max(math.prod(window) for window in windows)
        config.require(self.window is None or self.window >= widest,
                       f"window must hold the model's larger pooling window, {widest} patches", self.window)
        R = self.row_tokens if self.row_visual_tokens is None else self.row_visual_tokens
        return types.RowShape(T=self.row_tokens, M=self.row_crops, R=R, W=self.window or widest)


def make_iterator(data: DataConfig, model: config.Molmo2Config, inputs: config.InputConfig,
                  tokenizer: tokenizers.Tokenizer, *, shard_index: int = 0, shard_count: int = 1,
                  ) -> "BatchIterator":
    """Returns an endless iterator of Batch (numpy, B / shard_count rows) over the streams of this host.

    Host `shard_index` has the streams from shard_index * V / shard_count on; its rows are consecutive rows
    of the global batch. The same arguments give the same batches, whatever num_workers and the prefetches
    are. Close it after use.

    Raises:
      ValueError: a folder has no annotations.jsonl or no record that can be used, more lines are broken
        than max_broken, or a setting does not fit the model or the hosts.
    """
    return iter(make_dataset(data, model, inputs, tokenizer, shard_index=shard_index,
                             shard_count=shard_count))


def make_dataset(data: DataConfig, model: config.Molmo2Config, inputs: config.InputConfig,
                 tokenizer: tokenizers.Tokenizer, *, shard_index: int = 0, shard_count: int = 1) -> "Batches":
    """Returns the grain dataset behind make_iterator, whose iterators all start at the first batch."""
    config.require(0 <= shard_index < shard_count, "shard_index must lie in [0, shard_count)",
                   (shard_index, shard_count))
    number = shard_count if data.streams is None else data.streams
    config.require(number % shard_count == 0, f"streams must be a multiple of the {shard_count} hosts",
                   number)
    config.require(data.batch_rows % number == 0, f"batch_rows must be a multiple of the {number} streams",
                   data.batch_rows)
    if isinstance(data.train, str):
        mixtures, known = (tasks.MIXTURES[data.train],) * (len(data.lessons) + 1), tasks.TASKS
    else:
        mixtures, known = tasks.of_folders(data.train, len(data.lessons) + 1)
    found = {member.task: member for mixture in mixtures for member in tasks.members(mixture)}
    members = tuple(found[task] for task in sorted(found))
    missing = [os.path.abspath(known[member.task].folder) for member in members
               if not (pathlib.Path(known[member.task].folder) / "annotations.jsonl").is_file()]
    config.require(not missing, "data folders must hold annotations.jsonl", missing)
    examples, errors = {}, {}
    for member in members:
        examples[member.task], errors[member.task] = sources.read_folder(known[member.task].folder,
                                                                         source=member.task)
    sizes = {task: len(found) for task, found in examples.items()}
    rates = [tasks.rates(mixture, sizes) for mixture in mixtures]
    lessons = [(start, [shares.get(task, 0.0) for task in sizes])
               for start, shares in zip((0, *data.lessons), rates, strict=True)]
    shape = data.shape(model)
    preparer = preparation.Preparer(
        order=order.Order(list(sizes.values()), lessons, data.seed),
        examples=tuple(examples.values()), members=members, model=model, inputs=inputs, tokenizer=tokenizer,
        max_tokens=shape.T, max_crops=shape.M, max_visual_tokens=shape.R, asking=data.asking())
    mine = number // shard_count
    return Batches(data, preparer, errors, number, range(shard_index * mine, (shard_index + 1) * mine))


class Batches(grain.IterDataset):
    """What stays the same in the life of the pipeline; iterators over it yield Batch.

    number: V. mine: the streams of this host.
    """

    def __init__(self, data: DataConfig, preparer: preparation.Preparer,
                 errors: Mapping[str, Sequence[ValueError]], number: int, mine: range):
        super().__init__()
        self.data, self.preparer, self.number, self.mine = data, preparer, number, mine
        self.reporter = ledger.Reporter()
        self._errors = errors
        self._sizes = {member.task: len(examples)
                       for member, examples in zip(preparer.members, preparer.examples, strict=True)}
        # What a position belongs to: it means nothing for other data. The folders may have moved.
        self.origin = {"seed": data.seed, "sizes": json.dumps(list(self._sizes.values()))}

    def new_ledger(self) -> ledger.Ledger:
        return ledger.Ledger(self._sizes, self.data.max_broken)

    def setting(self) -> stream.Setting:
        """Returns what all streams of this host have in common."""
        data, workers = self.data, self.data.num_workers
        return stream.Setting(
            preparer=self.preparer, packer=data.packer, shape=data.shape(self.preparer.model),
            step=self.number, rows=data.batch_rows // self.number,
            num_workers=max(workers // len(self.mine), 1) if workers else 0,
            worker_prefetch=data.worker_prefetch, new_ledger=self.new_ledger, reporter=self.reporter)

    def first_positions(self) -> dict[int, dict[str, Any]]:
        """Returns the first position of each stream here. The broken lines are counted in stream 0."""
        lines = self.new_ledger()  # every host stops if there are too many
        for task, errors in self._errors.items():
            for error in errors:
                place, _, message = str(error).partition(": ")
                note = ledger.Note(number=-1, task=task, key=os.path.basename(place), reason=ledger.LINE,
                                   message=message)
                self.reporter.report(note)
                lines.skip(note)
        return {number: positions.first(number, self.new_ledger() if number else lines)
                for number in self.mine}

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(_HostIterator(self), self.data)


class BatchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """Yields batches that a thread has packed in advance.

    get_state returns the position behind the last batch that was taken, as a flat mapping of numbers and
    JSON texts that always has the same keys; set_state goes back there. A failure leaves the position as
    it was.
    """

    def __init__(self, host: "_HostIterator", data: DataConfig):
        super().__init__(host, data.prefetch)
        self._host, self._budgets = host, (data.row_tokens, data.row_crops)

    def set_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes to where all hosts of a run stood together, whatever their number was.

        Raises:
          ValueError: the states belong to other data, or are not those of all hosts.
        """
        self.set_state(self._host.state_of(states))

    def counters(self) -> dict[str, Any]:
        """Returns what was consumed and skipped here up to the last batch taken: see ledger.counters."""
        here = list(json.loads(self.get_state()["positions"]).values())
        waits = [json.loads(position["packer"])["longest_wait"] for position in here]
        return ledger.counters(ledger.merge(here), *self._budgets) | {"longest_wait": max(waits)}

    def close(self) -> None:
        """Ends the thread and the worker processes; a second call, also by the interpreter, does nothing."""
        if not self._closed and sys is not None:  # modules are gone when the interpreter ends
            super().close()


class _HostIterator(grain.DatasetIterator):
    """Yields the rows of this host. After an exception it stands where it stood behind the last batch."""

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches, self._streams = batches, {}
        setting = batches.setting()
        for number, position in batches.first_positions().items():
            self._streams[number] = stream.Stream(setting, position)

    def __next__(self) -> types.Batch:
        if self._closed:
            raise ValueError("an iterator must not be used after close()")
        before = self._positions()
        try:
            return packing.stack([next(one) for one in self._streams.values()])
        except Exception:
            for number, position in before.items():
                if self._streams[number].position != position:
                    self._streams[number].go_to(position)
            raise

    def _positions(self) -> dict[int, dict[str, Any]]:
        return {number: one.position for number, one in self._streams.items()}

    def get_state(self) -> dict[str, Any]:
        return self._batches.origin | {"streams": self._batches.number,
                                       "positions": json.dumps(self._positions())}

    def set_state(self, state: Mapping[str, Any]) -> None:
        here = _read([state], self._batches)
        missing = [number for number in self._batches.mine if number not in here]
        mine, number = list(self._batches.mine), self._batches.number
        config.require(state["streams"] == number and not missing,
                       f"a data position must hold streams {mine} of {number}",
                       (sorted(here), state["streams"]))
        for number, one in self._streams.items():
            one.go_to(here[number])

    def state_of(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns this host's part of the states of all hosts."""
        batches = self._batches
        everything = _read(states, batches)
        saved = {state["streams"] for state in states}
        config.require(len(saved) == 1 and sorted(everything) == list(range(*saved)),
                       "data positions must be those of all streams of one run",
                       (sorted(everything), sorted(saved)))
        if len(everything) != batches.number:
            divided = positions.redivide([everything[number] for number in sorted(everything)],
                                         batches.number)
            everything = dict(enumerate(divided))
        here = {number: everything[number] for number in batches.mine}
        return batches.origin | {"streams": batches.number, "positions": json.dumps(here)}

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for one in self._streams.values():
                one.close()


def _read(states: Sequence[Mapping[str, Any]], batches: Batches) -> dict[int, dict[str, Any]]:
    """Returns the positions that states of hosts hold, by stream; ValueError for those of other data."""
    found = {}
    for state in states:
        config.require("positions" in state, "a data position must hold the positions of streams",
                       sorted(state))
        wrong = [f"{name} = {state.get(name)!r} instead of {value!r}"
                 for name, value in batches.origin.items() if state.get(name) != value]
        config.require(not wrong, "a data position can only be restored with the same data and seed",
                       ", ".join(wrong))
        found |= {int(number): position for number, position in json.loads(state["positions"]).items()}
    return found
