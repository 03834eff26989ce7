"""The recipe's data sets as they are published: rows of each -> records of docs/data_format.md.

One small function per kind of data set: it takes rows, as dictionaries, and yields records. How media must
be named says schemas/media.py. `convert` writes the annotations.jsonl of a data folder, from which training
reads; what the recipe draws anew at every use (the mode of a question, the place of an answer) is drawn then.

Source: paper, appendix on data; reference: olmo/data/{molmo2,pixmo,academic_image}_datasets.py.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines import sources
from data_pipelines.schemas import academic
from data_pipelines.schemas import answering
from data_pipelines.schemas import media
from data_pipelines.schemas import pointing
from data_pipelines.schemas import tracking
from molmo2_jax import files

Row = dict[str, Any]
Record = dict[str, Any]
# What functions here raise for a row without a column, or with something else in it than they read.
_BAD_ROW = (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)


class Excluded(ValueError):
    """A record left out because its media are on the list of those that must not be trained on.

    names: the entries of the list that name its media.
    """

    def __init__(self, path: pathlib.PurePath, names: frozenset[str]):
        super().__init__(f"{path}: is on the list of media to leave out")
        self.names = names


class Schema(NamedTuple):
    """records: makes records of rows. of: what rows that belong into one record have in common; None where
    every row stands alone."""
    records: Callable[..., Iterator[Record]]
    of: Callable[[Row], str] | None = None


SCHEMAS: dict[str, Schema] = {
    "a_okvqa": Schema(answering.a_okvqa),
    "academic_video_point": Schema(pointing.academic_video_point),
    "activity_net": Schema(academic.activity_net),
    "ai2d": Schema(academic.ai2d),
    "ask_model_anything": Schema(answering.ask_model_anything, media.image),
    "cap_qa": Schema(answering.cap_qa),
    "chart_qa": Schema(answering.chart_qa),
    "cinepile": Schema(academic.cinepile),
    "cosyn": Schema(answering.cosyn),
    "cosyn_point": Schema(pointing.cosyn_point),
    "hardcodes": Schema(answering.hardcodes),
    "human_qa": Schema(answering.human_qa, media.video),
    "label": Schema(academic.label),
    "llava_video": Schema(academic.llava_video, media.video),
    "mantis": Schema(answering.mantis),
    "molmo2_cap": Schema(answering.molmo2_cap),
    "multi_image_point": Schema(pointing.multi_image_point),
    "multi_image_qa": Schema(answering.multi_image_qa),
    "perception_test": Schema(academic.perception_test),
    "pixmo_cap": Schema(answering.pixmo_cap),
    "pixmo_count": Schema(pointing.pixmo_count),
    "pixmo_points": Schema(pointing.pixmo_points, media.image),
    "qv_highlights": Schema(academic.qv_highlights),
    "science_qa": Schema(academic.science_qa),
    "tgif": Schema(academic.tgif, lambda row: row["gif_name"]),
    "tracks": Schema(tracking.tracks),
    "tulu": Schema(answering.tulu),
    "tvqa": Schema(academic.tvqa),
    "video_choice": Schema(answering.video_choice, media.video),
    "video_point": Schema(pointing.video_point, media.video),
    "video_qa": Schema(academic.video_qa, media.video),
    "vqa": Schema(answering.vqa),
}


def convert(schema: str, rows: Iterable[Row | ValueError], folder: str | os.PathLike,
            exclude: Collection[str] = (), **how) -> tuple[int, list[ValueError]]:
    """Writes folder/annotations.jsonl, whole or not at all; returns its number of records and why others are
    left out.

    Media must be in the folder already: a record whose media are missing is left out. So is a row that does
    not fit the schema, and an annotation that does not fit the format; others of the same media stay. A row
    that is an error (published.rows) counts as itself. `how` are further arguments of the schema
    (tasks.Task.how).

    exclude: names of media that evaluations need, with or without folder and suffix (of images mostly the
      SHA-256): records with one of them become an Excluded.

    Raises:
      ValueError: there is no such schema, or not one row fits it.
    """
    if schema not in SCHEMAS:
        raise ValueError(f"a schema must be one of {', '.join(SCHEMAS)}; got {schema!r}")
    folder, number, errors, unfit, exclude = pathlib.Path(folder), 0, [], [], frozenset(exclude)
    if "media_folder" in how:  # is meant within the folder
        how = how | {"media_folder": folder / how["media_folder"]}
    make = functools.partial(SCHEMAS[schema].records, **how)
    with files.whole(folder / "annotations.jsonl") as file:
        for group in _groups(schema, rows, errors, unfit):
            for record in _admitted(_records(make, group, schema, unfit), exclude, errors):
                for kept in _checked(record, folder, errors):
                    file.write(json.dumps(kept, ensure_ascii=False) + "\n")
                    number += 1
        if unfit and not number and not errors:
            raise unfit[0]
    return number, unfit + errors


def _groups(schema: str, rows: Iterable[Row | ValueError], errors: list, unfit: list) -> Iterator[list[Row]]:
    """Yields rows that belong together; those of grouped schemas after all rows were read."""
    groups: dict[str, list[Row]] = {}
    of = SCHEMAS[schema].of
    for row in rows:
        if isinstance(row, ValueError):
            errors.append(row)
        elif of is None:
            yield [row]
        else:
            try:
                groups.setdefault(of(row), []).append(row)
            except _BAD_ROW as error:
                unfit.append(_misfit(schema, row, error))
    yield from groups.values()


def _records(make: Callable, group: Sequence[Row], schema: str, unfit: list) -> list[Record]:
    """Returns the records of the rows that fit."""
    try:
        return list(make(group))
    except _BAD_ROW as error:
        if len(group) == 1:
            unfit.append(_misfit(schema, group[0], error))
            return []
    before = len(unfit)
    good, alone = [], []
    for row in group:
        records = _records(make, [row], schema, unfit)
        if len(unfit) == before:
            good.append(row)
            alone += records
        before = len(unfit)
    try:
        return list(make(good)) if good else []
    except _BAD_ROW:  # each fits, but not beside the others
        return alone


def _misfit(schema: str, row: Mapping, error: Exception) -> ValueError:
    if isinstance(error, KeyError):
        return ValueError(f"rows of {schema} must have the column {error}; got {sorted(row)}")
    return ValueError(f"a row of {schema} does not fit it ({type(error).__name__}: {error}); got "
                      f"{str(row)[:200]}")


def _admitted(records: Iterable[Record], exclude: frozenset[str], errors: list) -> Iterator[Record]:
    """Yields the records none of whose media is excluded."""
    for record in records:
        paths = [pathlib.PurePath(name) for name in (record.get("video"), *record.get("images", ())) if name]
        found = {path: exclude & {str(path), path.name, path.stem} for path in paths}
        names = frozenset().union(*found.values())
        if names:
            errors.append(Excluded(next(path for path in paths if found[path]), names))
        else:
            yield record


def _checked(record: Record, folder: pathlib.Path, errors: list) -> Iterator[Record]:
    """Yields the record as far as training can read it, if anything is left."""
    try:
        sources.parse_record(record, folder)
        yield record
        return
    except ValueError as error:
        errors.append(error)
    good = []
    for annotation in record["annotations"] if len(record["annotations"]) > 1 else ():
        one = record | {"annotations": [annotation]}
        try:
            sources.parse_record(one, folder)
            good.append(annotation)
        except ValueError as error:
            errors.append(error)
    if good:
        yield record | {"annotations": good}
