"""One packed stream: rows made of every V-th number of the global stream, with a position to resume from.

    order         number n -> (data set, index, epoch)          a pure function of (seed, n)
    preparation   example -> Sequence: media, branches, tokens  in worker processes
    packers       sequences -> those that share a row           in the main process

V streams share the numbers by their remainder and know nothing of each other. The rows of a stream depend
neither on the number of worker processes nor on the host that reads it. Its position is a mapping of numbers
and JSON texts:

    next      the next number to read
    backlog   numbers to read before that: left over where streams were divided anew (positions.py)
    waiting   numbers of the examples in the packer's buffer, oldest first
    packer    its counters (packers.Packer.state)
    killers   (data set, index) of examples whose reading ends the process
    counts, broken   what was consumed, and what was skipped and why (ledger.py)
"""

import collections
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data_pipelines import ledger
from data_pipelines import preparation
from data_pipelines import workers
from molmo2_jax import types
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import packing

_DEATHS = 2             # processes a record may end, read with care, before it counts as broken
_DEATHS_IN_A_ROW = 10   # processes that may end with no row in between

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What stays the same in the life of a stream.

    step: V, the number of streams. rows: of one call of next.
    """
    preparer: preparation.Preparer
    packer: packers.Rule
    shape: types.RowShape
    step: int
    rows: int
    num_workers: int
    worker_prefetch: int
    new_ledger: Callable[[], ledger.Ledger]
    reporter: ledger.Reporter


class Stream:
    """Yields the next rows as one Batch. After an exception it stands where it stood before the call."""

    def __init__(self, setting: Setting, position: Mapping[str, Any]):
        self._setting, self.position = setting, dict(position)
        self._run: _Run | None = None
        self._careful = range(0)
        self._deaths = collections.Counter()  # by number
        self._deaths_in_a_row = 0

    def __next__(self) -> types.Batch:
        while True:
            if self._run is None:
                self._run = _Run(self._setting, self.position, self._careful)
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
        """Decides what to do about a number whose result did not come, as its process died.

        A process that dies may take results with it that were ready. So the first time the numbers from
        here on are read again with care; if that fails too, it is known which one is to blame.
        """
        setting = self._setting
        if number in self._careful:
            self._deaths[number] += 1
        else:
            ahead = max(setting.num_workers, 1) * (setting.worker_prefetch + 2)
            self._careful = range(number, number + ahead * setting.step, setting.step)
        _log.warning("a worker process died at example number %d; starting another", number)
        if self._deaths[number] >= _DEATHS:
            killers = [*json.loads(self.position["killers"]), setting.preparer.order(number)[:2]]
            self.position = self.position | {"killers": json.dumps(killers)}

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Continues from a position."""
        self.close()
        self.position = dict(position)

    def close(self) -> None:
        """Ends the worker processes; the next call starts others."""
        if self._run is not None:
            self._run.close()
            self._run = None


class _Run:
    """Reader, packer and ledger, from a position on. `current` is the number whose result is awaited."""

    def __init__(self, setting: Setting, position: Mapping[str, Any], careful: range):
        self._setting, self._killers = setting, position["killers"]
        self._waiting = json.loads(position["waiting"])
        self._backlog = collections.deque(json.loads(position["backlog"]))
        self._next = self.current = position["next"]
        self._ledger = setting.new_ledger()
        self._ledger.restore(position)
        shape = setting.shape
        self._packer = packers.Packer(setting.packer, shape.T, shape.M, shape.R)
        self._packed = json.loads(position["packer"])
        self._is_resumed = False
        preparer = dataclasses.replace(setting.preparer, careful=careful,
                                       killers=frozenset(map(tuple, json.loads(self._killers))))
        numbers = workers.Numbers((*self._waiting, *self._backlog), self._next, setting.step)
        self._reader = workers.Reader(preparer, numbers, setting.num_workers, setting.worker_prefetch)

    def batch(self) -> types.Batch:
        """Returns the next rows.

        Raises:
          TooManyBroken: more records are broken than allowed.
          ValueError: an example that waited at the position can no longer be used.
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
        return packing.stack(rows)

    def _read_again(self, number: int) -> tuple[types.Sequence, ledger.Note]:
        """Returns an example that waited in the packer at the position."""
        note, sequence = self._read(number)
        if sequence is None:
            raise ValueError(f"{note.key} of {note.task} must be as it was when the data position was "
                             f"saved; now {note.message}")
        return sequence, note

    def _take_number(self) -> int:
        if self._backlog:
            return self._backlog.popleft()
        self._next += self._setting.step
        return self._next - self._setting.step

    def _read(self, number: int) -> tuple[ledger.Note, types.Sequence | None]:
        self.current = number
        note, arrays = next(self._reader)
        if arrays is None:
            return note, None
        # Copied, so that the little shared memory that containers have is free again at once.
        return note, types.Sequence(**{name: np.array(value) for name, value in arrays.items()})

    def _row(self, pack: packers.Pack) -> types.Batch:
        members, notes = zip(*pack, strict=True)
        self._ledger.emit(notes, *(sum(len(getattr(one, name)) for one in members)
                                   for name in ("tokens", "patches", "pooled")))
        setting = self._setting
        return packing.join(members, setting.shape, setting.preparer.model.vision.patch_shape)

    def position(self) -> dict[str, Any]:
        waiting = [note.number for note in self._packer.pending]
        return self._ledger.state() | {
            "next": self._next, "backlog": json.dumps(list(self._backlog)), "waiting": json.dumps(waiting),
            "packer": json.dumps(self._packer.state()), "killers": self._killers}

    def close(self) -> None:
        self._reader.close()
