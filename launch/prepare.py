"""Converts published rows or a labelling tool's export into a data folder, and a data folder into shards.

  python -m launch.prepare --task=pixmo_points --published='downloads/pixmo-points/*.parquet'
  python -m launch.prepare --task=chart_qa --published='downloads/chartqa/train-*.parquet' --output=charts
  python -m launch.prepare --from=cvat --input=annotations.xml --output=my_data --heldout=0.1
  python -m launch.prepare --data=my_data --output=my_shards --media=copy
  python -m launch.prepare --data=my_data --output=my_shards -- --direct_num_workers=4 \\
      --direct_running_mode=multi_processing

Writes FOLDER/annotations.jsonl; FOLDER is --output or else the folder from which runs read the task
(data_pipelines/tasks.py; relative to the root of the repository).
Published rows and shards need Apache Beam: pip install -e '.[prepare]' in the repository. Media that are not
part of the rows must already be in FOLDER/media, named as data_pipelines/schemas describes.
Everything left out is counted and listed in FOLDER/left_out.txt. --exclude=FILE lists media that must not be
trained on because evaluations use them: one file name per line, with or without suffix. Names that match no
medium of the rows are counted at the end; many of them suggest another data set or another spelling.
--from=FORMAT reads the export of a labelling tool instead (docs/data_format.md, "Labelling tools").

--data, or --task with --format=shards: every record of annotations.jsonl is validated, its media are decoded,
and the good ones are written as shards to --output (of a task: into its folder), with statistics and, last,
manifest.json. broken.jsonl lists the others: id, source, stage, reason. Training reads shards like any other
folder. An interrupted run continues where it stopped; other settings need another --output or --overwrite.
Arguments after -- are Apache Beam's (--runner and so on); by default the pipeline runs in this process.
docs/data.md describes the shards.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines import tasks
from data_pipelines.prepared import conversion
from data_pipelines.prepared import running
from data_pipelines.schemas import origins
from launch.support import cli
from launch.support import labelled
from launch.support import places
from launch.support import sharded
from molmo2_jax.inputs import text_file

_TASK = flags.DEFINE_string("task", None, "Name of the task: a key of data_pipelines.tasks.TASKS.")
_PUBLISHED = flags.DEFINE_multi_string("published", [], "Files of rows; may contain wildcards")
_EXCLUDE = flags.DEFINE_multi_string("exclude", [], "Files that list media to leave out, one per line")
for _name in ("output", "traceback", *labelled.FLAGS, *sharded.FLAGS):
    flags.declare_key_flag(_name)
_SHOWN = 3  # names printed
_BLANK = " \t\ufeff"  # stripped from names; concatenated lists have byte order marks inside


def main(arguments: list[str]) -> None:
    if cli.DATA.value and not (_TASK.value or labelled.FROM.value):
        sharded.of_data(_names(_EXCLUDE.value), arguments)
        return
    if labelled.FROM.value:
        cli.no_arguments(arguments)
        labelled.prepare()
        return
    known = sorted(name for name, task in tasks.TASKS.items() if task.schema)
    if _TASK.value not in known:
        raise ValueError(f"--task must be one of {', '.join(known)}; got {_TASK.value!r}")
    if not _PUBLISHED.value:
        raise ValueError(f"--published must name at least one file of rows; of {_TASK.value} "
                         f"{origins.of(_TASK.value)}")
    task = tasks.TASKS[_TASK.value]
    folder = cli.OUTPUT.value or places.data(task.folder)
    exclude = _names(_EXCLUDE.value)
    with sharded.beam():
        found = running.convert(task.schema, _PUBLISHED.value, folder, how=dict(task.how), exclude=exclude,
                                arguments=arguments)
    _show(f"{folder.rstrip('/')}/annotations.jsonl", found, len(exclude))
    if sharded.FORMAT.value == "shards":
        sharded.write(folder, folder, _TASK.value, frozenset(), arguments)


def _show(name: str, found: conversion.Summary, number: int) -> None:
    """Prints the summary; `number`: names of --exclude."""
    print(f"{name}: {found.records} records; left out: {found.left_out} rows, records or annotations, "
          f"{found.excluded} of them by --exclude")
    for reason in found.reasons:
        print(f"  {reason}")
    if found.unmatched:
        shown = sorted(found.unmatched)[:_SHOWN]
        rest = ", ..." if len(found.unmatched) > _SHOWN else ""
        print(f"--exclude: {len(found.unmatched)} of {number} names match no medium of these rows: "
              f"{', '.join(map(repr, shown))}{rest}")


def _names(paths: Sequence[str]) -> set[str]:
    """Returns the names in files with one name per line.

    Raises:
      ValueError: a file does not exist, names nothing, or is not UTF-8.
    """
    names = set()
    for path in map(pathlib.Path, paths):
        lines = text_file.read(path).split("\n") if path.is_file() else []
        found = {line.strip(_BLANK) for line in lines} - {""}
        if not found:
            raise ValueError(f"--exclude must be a file that lists media, one per line; got {path}")
        names |= found
    return names


if __name__ == "__main__":
    cli.start(main)
