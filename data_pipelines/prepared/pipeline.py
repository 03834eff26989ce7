"""Apache Beam pipelines: published rows -> the parts of annotations.jsonl, and its lines -> shards.

An element is where some rows, or the lines of a shard, are. Rows that become records together meet in Beam's
GroupByKey; no media move between workers. Which worker writes a part or a shard, and when, does not change
its bytes. Imported by launch.prepare when it runs: Beam comes with the extra `prepare`.
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options import pipeline_options

from data_pipelines.prepared import conversion
from data_pipelines.prepared import writing
from data_pipelines.schemas import published
from data_pipelines.sources import lines
from data_pipelines.stream import child as children

# In this process. Beam's own default first tries to download another runner.
_EMBEDDED = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_NAMESPACE = "prepare"    # of counters
_ERRORS = "apache_beam.runners.common"   # the logger of errors that are also raised


class _WriteShard(beam.DoFn):
    """Block -> the number of its shard, once that is written."""

    def __init__(self, plan: writing.Plan):
        self._plan = plan
        self._child: children.Child | None = None

    def setup(self):
        maker = self._plan.maker
        self._child = children.Child(maker, maker.inputs.max_read_seconds, self._plan.command)

    def process(self, block: lines.Block):
        shard = writing.write_shard(self._plan, block, self._child)
        beam.metrics.Metrics.counter(_NAMESPACE, "kept").inc(shard.count)
        for one in shard.left_out:
            beam.metrics.Metrics.counter(_NAMESPACE, f"left_out_{one.stage}").inc()
        yield shard.first

    def teardown(self):
        if self._child is not None:
            self._child.close()


class _Finish(beam.DoFn):
    """(None, all shards) -> the manifest's number of records."""

    def __init__(self, plan: writing.Plan):
        self._plan = plan

    def process(self, written):
        del written
        yield writing.finish(self._plan)["count"]


def write_shards(plan: writing.Plan, blocks: Sequence[lines.Block], arguments: Sequence[str]
                 ) -> dict[str, int]:
    """Writes the shards of all blocks and then the manifest; returns Beam's counters.

    arguments: Beam's, such as --runner and --direct_num_workers; by default it runs in this process.

    Raises:
      ValueError: Beam does not know an argument.
    """
    def build(pipeline: beam.Pipeline) -> None:
        _ = (pipeline
             | "blocks" >> beam.Create(blocks, reshuffle=True)
             | "write shards" >> beam.ParDo(_WriteShard(plan))
             | "pair" >> beam.Map(_alone)
             | "wait for all" >> beam.GroupByKey()
             | "finish" >> beam.ParDo(_Finish(plan)))
    return _run(build, arguments)


def write_parts(plan: conversion.Plan, pieces: Sequence[published.Piece], arguments: Sequence[str]) -> None:
    """Writes the parts of the rows of all pieces; `arguments` as of write_shards.

    Raises:
      ValueError: Beam does not know an argument.
    """
    def build(pipeline: beam.Pipeline) -> None:
        found = pipeline | "pieces" >> beam.Create(pieces, reshuffle=True)
        if plan.has_groups:
            _ = (found
                 | "read rows" >> beam.FlatMap(_by_part, plan)
                 | "group" >> beam.GroupByKey()
                 | "write groups" >> beam.Map(_write_groups, plan))
        else:
            _ = found | "write rows" >> beam.Map(_write_rows, plan)
    _run(build, arguments)


def _by_part(piece: published.Piece, plan: conversion.Plan) -> Iterator[tuple[int, bytes]]:
    yield from conversion.by_part(conversion.read(plan, piece))


def _write_groups(element: tuple[int, Iterable[bytes]], plan: conversion.Plan) -> None:
    part, packed = element
    conversion.write_groups(plan, part, packed)


def _write_rows(piece: published.Piece, plan: conversion.Plan) -> None:
    conversion.write_rows(plan, piece.number, conversion.read(plan, piece))


def _run(build: Callable[[beam.Pipeline], None], arguments: Sequence[str]) -> dict[str, int]:
    pipeline = beam.Pipeline(options=pipeline_options.PipelineOptions(_checked(arguments)))
    build(pipeline)
    logging.getLogger(_ERRORS).setLevel(logging.CRITICAL)
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:
        cause = error.__context__  # what a worker in this process raised; Beam's error repeats its text alone
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        raise
    counters = result.metrics().query(beam.metrics.MetricsFilter().with_namespace(_NAMESPACE))["counters"]
    return {one.key.metric.name: one.committed for one in counters}


def _alone(shard: int) -> tuple[None, int]:
    return None, shard


def _checked(arguments: Sequence[str]) -> list[str]:
    """Returns Beam's arguments with the runner. Raises ValueError for one that Beam would pass over."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for kind in _kinds(pipeline_options.PipelineOptions):
        kind._add_argparse_args(parser)  # type: ignore[attr-defined]  # which each kind overrides
    _, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(f"arguments after -- must be Apache Beam's; got {' '.join(unknown)}")
    defaults = {"--runner": _EMBEDDED, "--default_sdk_harness_log_level": "WARNING"}
    named = {argument.split("=")[0] for argument in arguments}
    return [*arguments, *(f"{name}={value}" for name, value in defaults.items() if name not in named)]


def _kinds(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        yield from (kind, *_kinds(kind))
