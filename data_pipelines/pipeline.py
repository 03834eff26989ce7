"""From data folders to packed batches: an endless, resumable iterator.

The examples of a mixture have one order. V packed streams (stream/rows.py) each read every V-th example and
produce B / V rows of every global batch. The streams are split evenly across hosts. The global batches
therefore depend neither on the number of worker processes nor, for the same V, on the number of hosts. A
checkpoint holds the position of every stream. If V changes, the positions are redistributed, and every
example is still read exactly once.

B rows, T tokens, M crops, R visual tokens, W patches per visual token, V streams.
"""

import dataclasses
import json
import logging
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from data_pipelines import formats
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.schemas import origins
from data_pipelines.stream import ledger
from data_pipelines.stream import order
from data_pipelines.stream import positions
from data_pipelines.stream import preparation
from data_pipelines.stream import rows as stream_rows
from molmo2_jax import config
from molmo2_jax import files
from molmo2_jax import types
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import tokenizer as tokenizers

_log = logging.getLogger(__name__)
_TRIED = 1000  # records of a folder in which one must be usable, or the run does not start


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, in which order, and the fixed shape of a batch.

    train: data folders (docs/data_format.md), each a path or (path, rate), or a key of tasks.MIXTURES.
      Without rates, folders are sampled in proportion to the square roots of their sizes. A rate may be a
      tuple with one number per lesson.
    lessons: numbers of examples after which the next lesson of a curriculum begins; () for one mixture.
    packer: packers.OldestFirst, or packers.Knapsack as in the reference.
    streams: V. For the same batches on different numbers of hosts, choose a common multiple of these numbers.
      Each stream has its own packing buffer.
    max_broken: broken records allowed per task and stream; one more ends the run and lists them.
    root: what the folders of a mixture's tasks are in: a folder, or an address such as "gs://bucket".
    cache: folder on a disk of each host for copies of shards that are in a bucket.
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
    num_workers: int = 2                  # processes per host; 0: a thread of the main process
    worker_prefetch: int = 4              # sequences each process prepares ahead
    prefetch: int = 2                     # batches packed ahead
    weights: formats.Weights = formats.Weights()
    num_templates: int | None = None      # templates per kind of question; None: all
    is_pretraining: bool = False          # prompts as in pre-training: "long_caption 61:", "pointing: mug"
    grammar: formats.Grammar | None = None   # of points, see formats.Asking
    max_broken: int = 100
    lessons: tuple[int, ...] = ()
    allow_missing: bool = False           # train without the data sets whose folders are absent
    root: str = ""                        # "": that of the repository
    cache: str | None = None

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
        self.asking()  # validates its settings

    def asking(self) -> formats.Asking:
        """Returns how training turns annotations into questions."""
        return formats.Asking(num_templates=self.num_templates, is_pretraining=self.is_pretraining,
                              weights=self.weights, grammar=self.grammar)

    def mixtures(self) -> tuple[tuple[tasks.Mixture, ...], Mapping[str, tasks.Task]]:
        """Returns the mixture of each lesson, and the tasks that they name.

        Raises:
          ValueError: see tasks.of_folders.
        """
        return tasks.mixtures_of(self.train, len(self.lessons) + 1, self.root)

    def shape(self, model: config.Molmo2Config) -> types.RowShape:
        """Returns the shape of every row.

        Raises:
          ValueError: the window is smaller than the model's larger pooling window.
        """
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

    Host `shard_index` reads V / shard_count consecutive streams, starting at shard_index * V / shard_count;
    its rows are consecutive rows of the global batch. Batches do not depend on num_workers, worker_prefetch
    or prefetch. Close the iterator after use.

    Raises:
      ValueError: a folder has neither annotations.jsonl nor prepared shards, or no usable record, more
        lines are broken than max_broken, or a setting does not fit the model or the hosts.
      files.StorageError: shards in a bucket do not fit on the disk of the cache.
    """
    return iter(make_dataset(data, model, inputs, tokenizer, shard_index=shard_index,
                             shard_count=shard_count))


def make_dataset(data: DataConfig, model: config.Molmo2Config, inputs: config.InputConfig,
                 tokenizer: tokenizers.Tokenizer, *, shard_index: int = 0, shard_count: int = 1) -> "Batches":
    """Returns the grain dataset of make_iterator; each of its iterators starts at the first batch.

    Raises:
      ValueError, files.StorageError: see make_iterator.
    """
    config.require(0 <= shard_index < shard_count, "shard_index must lie in [0, shard_count)",
                   (shard_index, shard_count))
    config.require(data.grammar != "tokens" or model.pointer is not None,
                   "grammar 'tokens' needs a model with config.PointerConfig", data.grammar)
    number = shard_count if data.streams is None else data.streams
    config.require(number % shard_count == 0, f"streams must be a multiple of the {shard_count} hosts",
                   number)
    config.require(data.batch_rows % number == 0, f"batch_rows must be a multiple of the {number} streams",
                   data.batch_rows)
    mixtures, known = _present(data)
    found = {member.task: member for mixture in mixtures for member in tasks.members(mixture)}
    members = tuple(found[task] for task in sorted(found))
    opened = {member.task: sources.open_source(known[member.task].folder, name=member.task, cache=data.cache)
              for member in members}
    for source in opened.values():
        sources.check_usable(source, most=max(_TRIED, data.max_broken + 1))
    sizes = {task: len(source) for task, source in opened.items()}
    rates = [tasks.rates(mixture, sizes) for mixture in mixtures]
    lessons = [(start, [shares.get(task, 0.0) for task in sizes])
               for start, shares in zip((0, *data.lessons), rates, strict=True)]
    shape = data.shape(model)
    preparer = preparation.Preparer(
        order=order.Order(list(sizes.values()), lessons, data.seed),
        sources=tuple(opened.values()), members=members, model=model, inputs=inputs, tokenizer=tokenizer,
        max_tokens=shape.T, max_crops=shape.M, max_visual_tokens=shape.R, asking=data.asking())
    mine = number // shard_count
    return Batches(data, preparer, number, range(shard_index * mine, (shard_index + 1) * mine))


def _present(data: DataConfig) -> tuple[tuple[tasks.Mixture, ...], Mapping[str, tasks.Task]]:
    """Returns the mixture of each lesson and their tasks; those of absent folders only without allow_missing.

    Raises:
      ValueError: folders are absent without allow_missing, or a lesson has no other folders.
    """
    mixtures, known = data.mixtures()
    absent = sorted({task for mixture in mixtures for task in tasks.missing(mixture, known)})
    if not absent:
        return mixtures, known
    folders = [": ".join([str(files.path(known[task].folder)),
                          *([origins.of(task)] if known[task].schema else [])]) for task in absent]
    config.require(data.allow_missing, "data folders must hold annotations.jsonl, or shards and their "
                   "manifest.json, unless pipeline.DataConfig.allow_missing is True (--allow_missing)",
                   folders)
    mixtures = tuple(tasks.without(mixture, absent) for mixture in mixtures)
    config.require(all(mixtures), "a mixture must have at least one folder with annotations.jsonl or shards",
                   folders)
    _log.warning("training without %d absent data sets; the shares of the others are renormalised: %s",
                 len(absent), ", ".join(absent))
    return mixtures, known


class Batches(grain.IterDataset):
    """The pipeline without its position; iterators over it yield Batch.

    number: V. mine: the streams of this host. records: of each data set, by task.
    """

    def __init__(self, data: DataConfig, preparer: preparation.Preparer, number: int, mine: range):
        super().__init__()
        self.data, self.preparer, self.number, self.mine = data, preparer, number, mine
        self.reporter = ledger.Reporter()
        self.records = {member.task: len(source)
                        for member, source in zip(preparer.members, preparer.sources, strict=True)}
        # Identifies the data a position belongs to. Paths are not part of it: folders may move.
        self.origin: dict[str, Any] = {"seed": data.seed, "sizes": json.dumps(list(self.records.values()))}

    def new_ledger(self) -> ledger.Ledger:
        return ledger.Ledger(self.records, self.data.max_broken)

    def setting(self) -> stream_rows.Setting:
        """Returns the settings that all streams of this host share."""
        data, workers = self.data, self.data.num_workers
        return stream_rows.Setting(
            preparer=self.preparer, packer=data.packer, shape=data.shape(self.preparer.model),
            num_streams=self.number, rows=data.batch_rows // self.number,
            num_workers=max(workers // len(self.mine), 1) if workers else 0,
            worker_prefetch=data.worker_prefetch, new_ledger=self.new_ledger, reporter=self.reporter)

    def first_positions(self) -> dict[int, dict[str, Any]]:
        """Returns the first position of each stream of this host."""
        return {number: positions.first(number, self.new_ledger()) for number in self.mine}

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(_HostIterator(self), self.data)


class BatchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """Yields batches that a background thread packs ahead of time.

    get_state returns the position after the last batch taken: a flat mapping of numbers and JSON texts with
    fixed keys. set_state restores it. An exception leaves the position unchanged. records: of each data set,
    by task.
    """

    def __init__(self, host: "_HostIterator", data: DataConfig):
        super().__init__(host, data.prefetch)
        self._host, self._budgets = host, (data.row_tokens, data.row_crops)
        self.records = host.records

    def set_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restores the position of a run from the states of all its hosts; their number may have changed.

        Raises:
          ValueError: the states belong to other data, or a host's state is missing.
        """
        self.set_state(self._host.state_of(states))

    def counters(self) -> dict[str, Any]:
        """Returns what this host has consumed and skipped up to the last batch taken; see ledger.counters."""
        here = list(json.loads(self.get_state()["positions"]).values())
        waits = [json.loads(position["packer"])["longest_wait"] for position in here]
        return ledger.counters(ledger.merge(here), *self._budgets) | {"longest_wait": max(waits)}

    def close(self) -> None:
        """Stops the thread and the worker processes. Further calls do nothing."""
        if not self._closed and sys is not None:  # modules are gone when the interpreter ends
            super().close()


class _HostIterator(grain.DatasetIterator):
    """Yields the rows of this host. An exception resets it to the position after the last batch."""
    _closed: bool    # grain's

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches, self._streams = batches, {}
        self.records = batches.records
        setting = batches.setting()
        for number, position in batches.first_positions().items():
            self._streams[number] = stream_rows.Stream(setting, position)

    def __next__(self) -> types.Batch:
        if self._closed:
            raise ValueError("an iterator must not be used after close()")
        before = self._positions()
        try:
            return rows_lib.stack([next(one) for one in self._streams.values()])
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
        """Returns this host's part of the states of all hosts.

        Raises:
          ValueError: the states belong to other data, or are not those of all streams of one run.
        """
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


def _read(states, batches: Batches) -> dict[int, dict[str, Any]]:
    """Returns {stream: position} of the hosts' states.

    Raises:
      ValueError: a state has no positions, or belongs to other data or another seed.
    """
    found = {}
    for state in states:
        config.require("positions" in state, "a data position must hold the positions of streams",
                       sorted(state))
        wrong = [f"{name} = {state.get(name)!r} instead of {value!r}"
                 for name, value in batches.origin.items() if state.get(name) != value]
        config.require(not wrong, "a data position can only be restored with the same data and seed",
                       ", ".join(wrong) + _hint(state, batches))
        found |= {int(number): position for number, position in json.loads(state["positions"]).items()}
    return found


def _hint(state: Mapping[str, Any], batches: Batches) -> str:
    """Returns the remedy for a position of version 0.1, which gave no numbers to broken lines; else ""."""
    try:
        old, new = json.loads(state["sizes"]), json.loads(batches.origin["sizes"])
    except (KeyError, TypeError, ValueError):
        return ""
    is_shorter = len(old) == len(new) and old != new and all(map(operator.le, old, new))
    return (". If version 0.1 saved it: that left broken lines out; remove those that launch.check lists"
            if is_shorter else "")
