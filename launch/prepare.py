"""Makes the annotations of a task from the rows that a data set publishes.

  python -m launch.prepare --task=pixmo_points --published='downloads/pixmo-points/*.parquet'
  python -m launch.prepare --task=chart_qa --published='downloads/chartqa/train-*.parquet' --output=charts

Writes FOLDER/annotations.jsonl; the folder is the task's (data_pipelines/tasks.py) unless --output names one.
Parquet files need pyarrow: pip install -e '.[prepare]' in the folder of the repository.
Media that rows do not hold themselves must lie in FOLDER/media already, named as data_pipelines/schemas says.
Whatever is left out is counted and listed in FOLDER/left_out.txt. --exclude=FILE names media that must not be
trained on because evaluations ask about them, one a line: file names, with or without suffix. Names that
match no medium of the rows are counted at the end: many may mean another data set or other spellings.
"""

import pathlib
from collections.abc import Sequence, Set

from absl import flags

from data_pipelines import published
from data_pipelines import schemas
from data_pipelines import tasks
from launch import cli
from molmo2_jax.inputs import text_file

_TASK = flags.DEFINE_string("task", None, "A key of data_pipelines.tasks.TASKS.")
_PUBLISHED = flags.DEFINE_multi_string("published", [], "Files of rows; may hold wildcards")
_EXCLUDE = flags.DEFINE_multi_string("exclude", [], "Files that name media to leave out, one a line")
for _name in ("output", "traceback"):
    flags.declare_key_flag(_name)
_SHOWN = 3  # reasons that are printed
_BLANK = " \t\ufeff"  # around a name; lists that were joined have byte order marks inside


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    known = sorted(name for name, task in tasks.TASKS.items() if task.schema)
    if _TASK.value not in known:
        raise ValueError(f"--task must be one of {', '.join(known)}; got {_TASK.value!r}")
    if not _PUBLISHED.value:
        raise ValueError("--published must name at least one file of rows")
    task = tasks.TASKS[_TASK.value]
    folder = pathlib.Path(cli.OUTPUT.value or task.folder)
    rows = published.rows(_PUBLISHED.value, folder)
    exclude = _names(_EXCLUDE.value)
    folder.mkdir(parents=True, exist_ok=True)
    number, errors = schemas.convert(task.schema, rows, folder, exclude, **dict(task.how))
    (folder / "left_out.txt").write_text("".join(f"{error}\n" for error in errors), encoding="utf-8")
    print(f"{folder / 'annotations.jsonl'}: {number} records; left out: {len(errors)} rows, records or "
          f"annotations, {sum(isinstance(error, schemas.Excluded) for error in errors)} of them by --exclude")
    for error in errors[:_SHOWN]:
        print(f"  {error}")
    _show_unmatched(exclude, errors)


def _show_unmatched(exclude: Set[str], errors: Sequence[ValueError]) -> None:
    """Prints how many names of --exclude match no medium of any record, and some of them."""
    used = frozenset().union(*(error.names for error in errors if isinstance(error, schemas.Excluded)))
    unmatched = sorted(exclude - used)
    if unmatched:
        rest = ", ..." if len(unmatched) > _SHOWN else ""
        print(f"--exclude: {len(unmatched)} of {len(exclude)} names match no medium of these rows: "
              f"{', '.join(map(repr, unmatched[:_SHOWN]))}{rest}")


def _names(paths: Sequence[str]) -> set[str]:
    """Returns the lines of files.

    Raises:
      ValueError: a file does not exist, names nothing, or is not UTF-8.
    """
    names = set()
    for path in map(pathlib.Path, paths):
        lines = text_file.read(path).split("\n") if path.is_file() else []
        found = {line.strip(_BLANK) for line in lines} - {""}
        if not found:
            raise ValueError(f"--exclude must be a file that names media, one a line; got {path}")
        names |= found
    return names


if __name__ == "__main__":
    cli.start(main)
