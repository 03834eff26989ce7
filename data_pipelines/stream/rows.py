"""One packed stream: rows made of every V-th number of the global stream, with a resumable position.

    order         number n -> (data set, index, epoch)          a pure function of (seed, n)
    preparation   example -> Sequence: media, branches, tokens  in worker processes
    packers       sequences -> those that share a row           in the main process

Stream v of V reads the numbers v, v + V, v + 2V, ..., independently of the other streams. Its rows depend
neither on the number of worker processes nor on the host that reads it. Its position is a mapping of numbers
and JSON texts:

    next      the next number to read
    backlog   numbers to read before that, left over from a redistribution of streams (positions.py)
    waiting   numbers of the examples in the packer's buffer, oldest first
    packer    its counters (packers.Packer.state)
    killers   (data set, index) of poison examples, whose reading kills the process
    counts, broken   what was consumed, and what was skipped and why (ledger.py)
"""

import collections
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data_pipelines.stream import ledger
from data_pipelines.stream import preparation
from data_pipelines.stream import workers
from molmo2_jax import types
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import rows as rows_lib

_DEATHS = 2             # processes a suspect may kill before it counts as broken
_DEATHS_IN_A_ROW = 10   # processes that may die without a row in between

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The constant settings of a stream.

    num_streams: V. rows: rows per call of next.
    watch: receives the notes of the examples of every row that is packed, in the order of the row.
    """
    preparer: preparation.Preparer
    packer: packers.Rule
    shape: types.RowShape
    num_streams: int
    rows: int
    num_workers: int
    worker_prefetch: int
    new_ledger: Callable[[], ledger.Ledger]
    reporter: ledger.Reporter
    watch: Callable[[tuple[ledger.Note, ...]], None] | None = None


class Stream:
    """Yields the next rows as one Batch. An exception leaves the position unchanged."""

    def __init__(self, setting: Setting, position: Mapping[str, Any]):
        self._setting, self.position = setting, dict(position)
        self._run: _Run | None = None
        self._suspects = range(0)
        self._deaths = collections.Counter()  # by number
        self._deaths_in_a_row = 0

    def __next__(self) -> types.Batch:
        while True:
            if self._run is None:
                self._run = _Run(self._setting, self.position, self._suspects)
            try:
                batch = self._run.batch()
                self.position = self._run.position()
                self._deaths_in_a_row = 0
                return batch
            except Exception as error:
                number = self._run.current
                self.close()
                if not workers.is_death(error):
                    raise
                self._deaths_in_a_row += 1
                if self._deaths_in_a_row > _DEATHS_IN_A_ROW:
                    raise
                self._blame(number)

    def _blame(self, number: int) -> None:
        """Handles the death of the process that was to return the result of `number`.

        A dying process may also lose results of earlier examples. So the first time, the following numbers
        become suspects and are read again one by one; a further death then identifies the culprit.
        """
        setting = self._setting
        if number in self._suspects:
            self._deaths[number] += 1
        else:
            ahead = max(setting.num_workers, 1) * (setting.worker_prefetch + 2)
            self._suspects = range(number, number + ahead * setting.num_streams, setting.num_streams)
        _log.warning("a worker process died at example number %d; starting a new one", number)
        if self._deaths[number] >= _DEATHS:
            poison = [*json.loads(self.position["killers"]), setting.preparer.order(number)[:2]]
            self.position = self.position | {"killers": json.dumps(poison)}

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Continues from a position."""
        self.close()
        self.position = dict(position)

    def close(self) -> None:
        """Stops the worker processes; the next call of next starts new ones."""
        if self._run is not None:
            self._run.close()
            self._run = None


class _Run:
    """Reader, packer and ledger, started at a position. `current` is the number being awaited."""

    def __init__(self, setting: Setting, position: Mapping[str, Any], suspects: range):
        self._setting, self._poison = setting, position["killers"]
        self._waiting = json.loads(position["waiting"])
        self._backlog = collections.deque(json.loads(position["backlog"]))
        self._next = self.current = position["next"]
        self._ledger = setting.new_ledger()
        self._ledger.restore(position)
        shape = setting.shape
        self._packer = packers.Packer(setting.packer, shape.T, shape.M, shape.R)
        self._packed = json.loads(position["packer"])
        self._is_resumed = False
        preparer = dataclasses.replace(setting.preparer, suspects=suspects,
                                       poison=frozenset(map(tuple, json.loads(self._poison))))
        numbers = workers.Numbers((*self._waiting, *self._backlog), self._next, setting.num_streams)
        self._reader = workers.Reader(preparer, numbers, setting.num_workers, setting.worker_prefetch)

    def batch(self) -> types.Batch:
        """Returns the next rows.

        Raises:
          TooManyBroken: more records are broken than max_broken.
          ValueError: an example that waited in the saved buffer has become unusable.
        """
        if not self._is_resumed:
            self._packer.resume([self._read_again(number) for number in self._waiting], self._packed)
            self._is_resumed = True
        rows = []
        while len(rows) < self._setting.rows:
            note, sequence = self._read(self._take_number())
            if sequence is None:
                self._setting.reporter.report(note)
                self._ledger.skip(note)
                continue
            pack = self._packer.push(sequence, note)
            if pack:
                rows.append(self._row(pack))
        return rows_lib.stack(rows)

    def _read_again(self, number: int) -> tuple[types.Sequence, ledger.Note]:
        """Returns an example that waited in the packer when the position was saved.

        Raises:
          ValueError: it has become unusable.
        """
        note, sequence = self._read(number)
        if sequence is None:
            raise ValueError(f"{note.key} of {note.task} must not change after the data position was "
                             f"saved; now {note.message}")
        return sequence, note

    def _take_number(self) -> int:
        if self._backlog:
            return self._backlog.popleft()
        self._next += self._setting.num_streams
        return self._next - self._setting.num_streams

    def _read(self, number: int) -> tuple[ledger.Note, types.Sequence | None]:
        self.current = number
        note, arrays = next(self._reader)
        if arrays is None:
            return note, None
        # Copied to free shared memory at once: containers have little of it.
        return note, types.Sequence(**{name: np.array(value) for name, value in arrays.items()})

    def _row(self, pack: packers.Pack) -> types.Batch:
        members, notes = zip(*pack, strict=True)
        self._ledger.emit(notes, *(sum(len(getattr(one, name)) for one in members)
                                   for name in ("tokens", "patches", "pooled")))
        setting = self._setting
        if setting.watch:
            setting.watch(notes)
        return rows_lib.join_for(setting.preparer.model, members, setting.shape)

    def position(self) -> dict[str, Any]:
        waiting = [note.number for note in self._packer.pending]
        return self._ledger.state() | {
            "next": self._next, "backlog": json.dumps(list(self._backlog)), "waiting": json.dumps(waiting),
            "packer": json.dumps(self._packer.state()), "killers": self._poison}

    def close(self) -> None:
        self._reader.close()
