"""Converts published rows into a data folder, and a data folder into shards: plans the work, runs the
pipeline, and shows how far it is."""

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from types import ModuleType
from typing import Any

from etils import epath

from data_pipelines import schemas
from data_pipelines.prepared import conversion
from data_pipelines.prepared import making
from data_pipelines.prepared import writing
from data_pipelines.schemas import published
from data_pipelines.sources import lines
from data_pipelines.sources import shard_format
from data_pipelines.sources import shards
from molmo2_jax import config
from molmo2_jax import files
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.monitor import bars
from molmo2_jax.monitor import periodic

_SECONDS = 0.5   # between two looks at how many shards are written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checker:
    """By which model, inputs and tokenizer records are checked and counted; `digest` identifies them."""
    model: config.Molmo2Config
    inputs: config.InputConfig
    tokenizer: tokenizers.Tokenizer
    digest: str


def convert(schema: str, paths: Sequence[str], folder: str, *, how: Mapping[str, Any] = MappingProxyType({}),
            exclude: Set[str] = frozenset(), arguments: Sequence[str] = ()) -> conversion.Summary:
    """Writes the annotations.jsonl of published rows into a folder, and what was left out; returns a summary.

    Args:
      schema: a key of schemas.SCHEMAS. how: its further arguments.
      paths: names of files of rows, perhaps with wildcards.
      exclude: names of media; records with one of them are left out.
      arguments: Beam's.

    Raises:
      ValueError: as published.pieces; there is no such schema; no row fits it; another run writes to the
        folder; or Beam does not know an argument.
      ImportError: Apache Beam is not installed.
    """
    if schema not in schemas.SCHEMAS:
        raise ValueError(f"a schema must be one of {', '.join(schemas.SCHEMAS)}; got {schema!r}")
    pieces = list(published.pieces(paths, schemas.SCHEMAS[schema].columns))
    plan = conversion.Plan(schema=schema, folder=folder, exclude=frozenset(exclude), how=dict(how))
    pipeline = _pipeline()
    with writing.locked(files.path(folder)):
        try:
            with _progress(lambda: _count(plan.parts, "*"), None if plan.has_groups else len(pieces),
                           files.path(folder).name, "part"):
                pipeline.write_parts(plan, pieces, arguments)
            return conversion.finish(plan)
        finally:
            conversion.clear(plan)


def prepare(folder: str, output: str, checker: Checker, *, arguments: Sequence[str] = (),
            exclude: Set[str] = frozenset(), overwrite: bool = False, command: tuple[str, ...] = (),
            **settings) -> dict[str, Any]:
    """Writes the shards of a data folder that are not there yet, then the manifest; returns that.

    Args:
      arguments: Beam's.
      exclude: names of media; records with one of them are left out.
      overwrite: removes what an earlier run wrote.
      command: of child.Child.
      settings: fields of format.Settings.

    Raises:
      ValueError: there is no annotations.jsonl, a setting is refused, the output was begun with other
        settings, another run writes to it, Beam does not know an argument, or no record can be used.
      ImportError: Apache Beam is not installed.
    """
    pipeline = _pipeline()
    target = files.path(output)
    with writing.locked(target), _index(folder) as index:
        known = shard_format.Settings(
            input=writing.sha256(files.path(folder) / lines.FILE), model=checker.digest,
            exclude=hashlib.sha256("\n".join(sorted(exclude)).encode()).hexdigest() if exclude else "",
            **settings)
        if overwrite:
            writing.clear(target)
        writing.begin(target, known)
        blocks = list(index.blocks(known.records_per_shard))
        maker = making.Maker(folder=str(files.path(folder)), settings=known, model=checker.model,
                             inputs=checker.inputs, tokenizer=checker.tokenizer, exclude=frozenset(exclude))
        plan = writing.Plan(maker=maker, output=str(target), number=len(blocks), command=command)
        with _progress(lambda: _count(target, "*-of-*.json"), len(blocks), known.name, "shard"):
            pipeline.write_shards(plan, blocks, arguments)
        return _manifest(target)


def _pipeline() -> ModuleType:
    """Returns the module that imports Beam, which takes seconds, and which may not be there."""
    logging.disable(logging.WARNING)  # Beam warns of clients of BigQuery that are not there
    try:
        from data_pipelines.prepared import pipeline
    finally:
        logging.disable(logging.NOTSET)
    return pipeline


def _count(folder: epath.Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


def _manifest(target: epath.Path) -> dict[str, Any]:
    manifest = shards.read_manifest(target)
    if not manifest["count"]:
        first = (target / shard_format.BROKEN).read_text().splitlines()[0]
        raise ValueError(f"a data folder must have a usable record; all {manifest['left_out']} are left out, "
                         f"the first: {first}")
    return manifest


@contextlib.contextmanager
def _index(folder: str) -> Iterator[lines.Lines]:
    """Returns where the records of a folder are; of one in a bucket by a copy of its text."""
    if not files.is_remote(folder):
        yield lines.Lines(folder)
        return
    with tempfile.TemporaryDirectory() as local:
        copied = pathlib.Path(local) / lines.FILE
        (files.path(folder) / lines.FILE).copy(copied)
        yield lines.Lines(local)


@contextlib.contextmanager
def _progress(count: Callable[[], int], total: int | None, name: str, unit: str) -> Iterator[None]:
    """Shows how many files are written, by any process or machine, while the block lasts."""
    bar = bars.bar(total=total, desc=name, unit=unit)

    def look():
        bar.update(count() - bar.n)

    try:
        with periodic.calls(look, _SECONDS):
            yield
    finally:
        look()
        bar.close()
