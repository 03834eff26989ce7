"""From data folders to packed batches: an endless, resumable iterator.

    order         number n of the stream -> (data set, index, epoch)            a pure function of (seed, n)
    preparation   example -> Sequence: media, branches, tokens                  in worker processes
    packing       sequences -> rows of T tokens and M crops -> Batch of B rows  in the main process

A checkpoint holds the next number to read and those that wait in the packer's buffer. To resume is to begin
a stream with the ones that waited: then the packer stands where it stood. Nothing depends on the number of
worker processes.

B rows, T tokens, M crops, R visual tokens, W patches per visual token.
"""

import collections
import dataclasses
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from data_pipelines import ledger
from data_pipelines import order
from data_pipelines import preparation
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines import workers
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import packing
from molmo2_jax.inputs import tokenizer as tokenizers

_DEATHS = 2             # processes a record may end, read with care, before it counts as broken
_DEATHS_IN_A_ROW = 10   # processes that may end with no batch in between

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, in which order, and the fixed shape of a batch.

    train: data folders (docs/data_format.md), each alone or as (folder, rate), or a key of tasks.MIXTURES.
      Without rates folders share the stream by the square roots of their sizes. A rate may be a tuple, one
      number per lesson.
    lessons: numbers of examples after which the next lesson of a curriculum begins; () for one mixture.
    max_broken: records of one task that may be broken; one more ends the run with their list.
    """
    train: str | tuple[str | tuple[str, float | tuple[float, ...]], ...]
    seed: int
    row_tokens: int                       # T
    row_crops: int                        # M
    batch_rows: int                       # B, of this host
    row_visual_tokens: int | None = None  # R; None: as many as there are tokens
    window: int | None = None             # W; None: the larger pooling window of the model
    packing_buffer: int = 48              # sequences that wait for a good row
    image_weight: float = 30.0            # value of a crop, in tokens, when a row is chosen
    num_workers: int = 2                  # processes; 0: a thread of the main process
    worker_prefetch: int = 4              # sequences that each process prepares in advance
    prefetch: int = 2                     # batches packed in advance
    num_templates: int | None = None      # wordings of each kind of question; None: all
    max_broken: int = 100
    lessons: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("row_tokens", "batch_rows", "packing_buffer", "worker_prefetch"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1", getattr(self, name))
        for name in ("row_crops", "num_workers", "prefetch", "max_broken"):
            _require(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))
        _require(self.window is None or self.window >= 1, "window must be >= 1 patch", self.window)
        _require(self.num_templates is None or self.num_templates >= 1, "num_templates must be >= 1",
                 self.num_templates)
        _require(self.row_visual_tokens is None or 0 <= self.row_visual_tokens <= self.row_tokens,
                 "row_visual_tokens must lie in [0, row_tokens]", self.row_visual_tokens)
        _require(0 <= self.seed < 2**32, "seed must lie in [0, 2^32)", self.seed)
        if isinstance(self.train, str):
            _require(self.train in tasks.MIXTURES,
                     f"train must be a tuple of folders or one of the mixtures {sorted(tasks.MIXTURES)}",
                     self.train)

    def shape(self, model: config.Molmo2Config) -> dict[str, int]:
        """Returns T, M, R and W of every row, as packing.join takes them."""
        windows = (model.connector.image_window, model.connector.video_window)
        widest = max(math.prod(window) for window in windows)
        _require(self.window is None or self.window >= widest,
                 f"window must hold the model's larger pooling window, {widest} patches", self.window)
        R = self.row_tokens if self.row_visual_tokens is None else self.row_visual_tokens
        return {"T": self.row_tokens, "M": self.row_crops, "R": R, "W": self.window or widest}


def _require(is_right: bool, rule: str, value) -> None:
    if not is_right:
        raise ValueError(f"{rule}; got {value!r}")


def make_iterator(data: DataConfig, model: config.Molmo2Config, inputs: config.InputConfig,
                  tokenizer: tokenizers.Tokenizer, *, shard_index: int = 0, shard_count: int = 1,
                  ) -> "BatchIterator":
    """Returns an endless iterator of Batch (numpy, B rows) over this host's share of the stream.

    Host `shard_index` takes the numbers that leave this remainder by `shard_count`. The same arguments give
    the same batches, whatever num_workers and the prefetches are. Close it after use.

    Raises:
      ValueError: a folder has no annotations.jsonl or no record that can be used, more lines are broken
        than max_broken, or a setting does not fit the model.
    """
    return iter(make_dataset(data, model, inputs, tokenizer, shard_index=shard_index,
                             shard_count=shard_count))


def make_dataset(data: DataConfig, model: config.Molmo2Config, inputs: config.InputConfig,
                 tokenizer: tokenizers.Tokenizer, *, shard_index: int = 0, shard_count: int = 1) -> "Batches":
    """Returns the grain dataset behind make_iterator, whose iterators all start at the first batch."""
    _require(0 <= shard_index < shard_count, "shard_index must lie in [0, shard_count)",
             (shard_index, shard_count))
    if isinstance(data.train, str):
        mixtures, known = (tasks.MIXTURES[data.train],) * (len(data.lessons) + 1), tasks.TASKS
    else:
        mixtures, known = tasks.of_folders(data.train, len(data.lessons) + 1)
    found = {member.task: member for mixture in mixtures for member in tasks.members(mixture)}
    members = tuple(found[task] for task in sorted(found))
    examples, errors = {}, {}
    for member in members:
        examples[member.task], errors[member.task] = _load(member.task, known[member.task].folder)
    sizes = {task: len(found) for task, found in examples.items()}
    rates = [tasks.rates(mixture, sizes) for mixture in mixtures]
    lessons = [(start, [shares.get(task, 0.0) for task in sizes])
               for start, shares in zip((0, *data.lessons), rates, strict=True)]
    shape = data.shape(model)
    preparer = preparation.Preparer(
        order=order.Order(list(sizes.values()), lessons, data.seed),
        examples=tuple(examples.values()), members=members, model=model, inputs=inputs, tokenizer=tokenizer,
        max_tokens=shape["T"], max_crops=shape["M"], max_visual_tokens=shape["R"],
        num_templates=data.num_templates)
    return Batches(data, preparer, errors, shard_index, shard_count)


def _load(task: str, folder: str) -> tuple[list[types.Example], list[ValueError]]:
    """Returns the examples of a folder, and one error per line that breaks the format."""
    path = pathlib.Path(folder) / "annotations.jsonl"
    if not path.is_file():
        raise ValueError(f"a data folder must hold annotations.jsonl; {folder} does not")
    examples, errors = sources.read_jsonl_collecting(path, source=task)
    if not examples:
        raise ValueError(f"a data folder must hold a record that can be used; got none in {path}"
                         + (f", the first because {errors[0]}" if errors else ""))
    return examples, errors


class Batches(grain.IterDataset):
    """What stays the same in the life of the pipeline; iterators over it yield Batch."""

    def __init__(self, data: DataConfig, preparer: preparation.Preparer,
                 errors: Mapping[str, Sequence[ValueError]], shard_index: int, shard_count: int):
        super().__init__()
        self.data, self.preparer, self.shard_count = data, preparer, shard_count
        self.shape = data.shape(preparer.model)
        self.reporter = ledger.Reporter()
        self._errors, self._shard_index = errors, shard_index
        self._sizes = {member.task: len(examples)
                       for member, examples in zip(preparer.members, preparer.examples, strict=True)}
        # What a state belongs to: it means nothing for other data, or for another share of it. The folders
        # may have moved.
        self.origin = {"seed": data.seed, "shard_index": shard_index, "shard_count": shard_count,
                       "sizes": json.dumps(list(self._sizes.values()))}

    def new_ledger(self) -> ledger.Ledger:
        return ledger.Ledger(self._sizes, self.data.max_broken)

    def first_state(self) -> dict[str, Any]:
        """Returns the state before the first batch, in which the broken lines are already counted."""
        book = self.new_ledger()
        for task, errors in self._errors.items():
            for error in errors:
                place, _, message = str(error).partition(": ")
                note = ledger.Note(number=-1, task=task, key=os.path.basename(place), reason=ledger.LINE,
                                   message=message)
                self.reporter.report(note)
                book.skip(note)
        return self.origin | book.state() | {"next": self._shard_index, "waiting": "[]", "killers": "[]"}

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(_PackedIterator(self), self.data)


class BatchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """Yields batches that a thread has packed in advance.

    get_state returns the position behind the last batch that was taken, as a flat mapping of numbers and
    JSON texts that always has the same keys; set_state goes back there. A failure leaves the position as
    it was.
    """

    def __init__(self, packed: "_PackedIterator", data: DataConfig):
        super().__init__(packed, data.prefetch)
        self._budgets = (data.row_tokens, data.row_crops)

    def counters(self) -> dict[str, Any]:
        """Returns what was consumed and skipped up to the last batch that was taken: see ledger.counters."""
        return ledger.counters(self.get_state(), *self._budgets)

    def close(self) -> None:
        """Ends the thread and the worker processes; a second call, also by the interpreter, does nothing."""
        if not self._closed and sys is not None:  # modules are gone when the interpreter ends
            super().close()


class _PackedIterator(grain.DatasetIterator):
    """Yields batches. After an exception it stands where it stood behind the last batch."""

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches = batches
        self._run: _Run | None = None
        self._state = batches.first_state()
        self._careful = range(0)
        self._deaths = collections.Counter()  # by number
        self._deaths_in_a_row = 0

    def __next__(self) -> types.Batch:
        while True:
            if self._closed:
                raise ValueError("an iterator must not be used after close()")
            if self._run is None:
                self._run = _Run(self._batches, self._state, self._careful)
            try:
                batch = self._run.batch()
                self._state = self._run.state()
                self._deaths_in_a_row = 0
                return batch
            except Exception as error:
                number = self._run.current
                self._stop()
                if not workers.is_death(error):
                    raise
                self._deaths_in_a_row += 1
                if self._deaths_in_a_row > _DEATHS_IN_A_ROW:
                    raise
                self._blame(number)

    def _blame(self, number: int) -> None:
        """Decides what to do about a number whose result did not come, as its process died.

        A process that dies may take results with it that were ready. So the first time the numbers from
        here on are read again with care; if that fails too, it is known which one is to blame.
        """
        batches = self._batches
        if number in self._careful:
            self._deaths[number] += 1
        else:
            ahead = max(batches.data.num_workers, 1) * (batches.data.worker_prefetch + 2)
            self._careful = range(number, number + ahead * batches.shard_count, batches.shard_count)
        _log.warning("a worker process died at example number %d; starting another", number)
        if self._deaths[number] >= _DEATHS:
            place = batches.preparer.order(number)[:2]
            killers = [*json.loads(self._state["killers"]), place]
            self._state = self._state | {"killers": json.dumps(killers)}

    def get_state(self) -> dict[str, Any]:
        return dict(self._state)

    def set_state(self, state: Mapping[str, Any]) -> None:
        origin = self._batches.origin
        wrong = [f"{name} = {state.get(name)!r} instead of {origin[name]!r}" for name in origin
                 if state.get(name) != origin[name]]
        _require(not wrong, "a data position can only be restored with the same data, seed and hosts",
                 ", ".join(wrong))
        self._stop()
        self._state = dict(state)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stop()

    def _stop(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None


class _Run:
    """Reader, packer and ledger, from a state on. `current` is the number whose result is awaited."""

    def __init__(self, batches: Batches, state: Mapping[str, Any], careful: range):
        data, model = batches.data, batches.preparer.model
        self._batches, self._killers = batches, state["killers"]
        self._again = tuple(json.loads(state["waiting"]))
        self._next = self.current = state["next"]
        self._ledger = batches.new_ledger()
        self._ledger.restore(state)
        self._packer = packing.Packer(batches.shape["T"], batches.shape["M"], batches.shape["R"],
                                      buffer=data.packing_buffer, image_weight=data.image_weight)
        self._patch_shape = (model.vision.num_patches, model.vision.patch_values)
        preparer = dataclasses.replace(batches.preparer, careful=careful,
                                       killers=frozenset(map(tuple, json.loads(self._killers))))
        numbers = workers.Numbers(self._again, self._next, batches.shard_count)
        self._reader = workers.Reader(preparer, numbers, data.num_workers, data.worker_prefetch)

    def batch(self) -> types.Batch:
        """Returns the next B rows.

        Raises:
          TooManyBroken: more records are broken than allowed.
          ValueError: an example that waited when the state was taken can no longer be used.
        """
        self._read_again()
        rows = []
        while len(rows) < self._batches.data.batch_rows:
            note, sequence = self._read(self._next)
            self._next += self._batches.shard_count
            if sequence is None:
                self._batches.reporter.report(note)
                self._ledger.skip(note)
                continue
            pack = self._packer.push(sequence, note)
            if pack:
                rows.append(self._row(pack))
        return packing.stack(rows)

    def _read_again(self) -> None:
        """Fills the packer with what waited in it when the state was taken."""
        for number in self._again:
            note, sequence = self._read(number)
            if sequence is None:
                raise ValueError(f"{note.key} of {note.task} must be as it was when the data position was "
                                 f"saved; now {note.message}")
            self._packer.push(sequence, note)
        self._again = ()

    def _read(self, number: int) -> tuple[ledger.Note, types.Sequence | None]:
        self.current = number
        note, arrays = next(self._reader)
        if arrays is None:
            return note, None
        # Copied, so that the little shared memory that containers have is free again at once.
        return note, types.Sequence(**{name: np.array(value) for name, value in arrays.items()})

    def _row(self, pack: packing.Pack) -> types.Batch:
        members, notes = zip(*pack, strict=True)
        self._ledger.emit(notes, *(sum(len(getattr(one, name)) for one in members)
                                   for name in ("tokens", "patches", "pooled")))
        return packing.join(members, **self._batches.shape, patch_shape=self._patch_shape)

    def state(self) -> dict[str, Any]:
        waiting = [note.number for note in self._packer.pending]
        return self._batches.origin | self._ledger.state() | {
            "next": self._next, "waiting": json.dumps(waiting), "killers": self._killers}

    def close(self) -> None:
        self._reader.close()
