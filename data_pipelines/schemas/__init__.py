"""The recipe's data sets: rows as published -> records in the format of docs/data_format.md.

One small function per kind of data set takes rows, as dictionaries, and yields records. schemas/media.py
states how media files must be named. `convert` turns the rows of a group into the records that training can
read; prepared/conversion.py writes the annotations.jsonl of a data folder. What the recipe draws at every use
(the mode of a question, the place of an answer) is drawn during training.

Source: paper, appendix on data; reference: olmo/data/{molmo2,pixmo,academic_image}_datasets.py.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple

from data_pipelines import records
from data_pipelines.schemas import academic
from data_pipelines.schemas import academic_video
from data_pipelines.schemas import answering
from data_pipelines.schemas import media
from data_pipelines.schemas import pointing
from data_pipelines.schemas import tracking
from molmo2_jax import files

Row = dict[str, Any]
Record = dict[str, Any]
# What schemas raise for a row that lacks a column, or has a value of another type than they expect.
_BAD_ROW = (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)


class Unfit(ValueError):
    """A row that does not fit its schema."""


class Excluded(ValueError):
    """A record left out because one of its media must not be trained on.

    names: the entries of the exclusion list that match its media.
    """

    def __init__(self, medium: str, names: frozenset[str]):
        super().__init__(f"{medium}: is on the list of media to leave out")
        self.names = names


class Schema(NamedTuple):
    """How rows of a published data set become records.

    records: makes records from rows. of: a row's group; rows of one group become records together, None:
    every row is converted alone. columns: names of the columns where the published table has no header.
    """
    records: Callable[..., Iterator[Record]]
    of: Callable[[Row], str] | None = None
    columns: tuple[str, ...] = ()


SCHEMAS: dict[str, Schema] = {
    "a_okvqa": Schema(answering.a_okvqa),
    "academic_video_point": Schema(pointing.academic_video_point),
    "activity_net": Schema(academic.segments),
    "actor_captions": Schema(academic_video.actor_captions),
    "ai2d": Schema(academic.ai2d),
    "ask_model_anything": Schema(answering.ask_model_anything, media.image),
    "camerabench": Schema(academic_video.camerabench),
    "cap_qa": Schema(answering.cap_qa),
    "charades_sta": Schema(academic_video.charades_sta),
    "chart_qa": Schema(answering.chart_qa),
    "cinepile": Schema(academic.cinepile),
    "clevrer": Schema(academic_video.clevrer),
    "cosyn": Schema(answering.cosyn),
    "cosyn_point": Schema(pointing.cosyn_point),
    "countix": Schema(academic_video.countix),
    "ego4d": Schema(academic_video.ego4d),
    "epic_kitchens": Schema(academic_video.epic_kitchens),
    "first_answer": Schema(academic_video.first_answer, media.video),
    "funqa": Schema(academic_video.funqa, media.video),
    "gui_point": Schema(pointing.gui_point),
    "hardcodes": Schema(answering.hardcodes),
    "how2qa": Schema(academic_video.how2qa, academic_video.clip_of, (
        "video_id", "span", "wrong0", "wrong1", "wrong2", "question", "answer")),
    "human_qa": Schema(answering.human_qa, media.video),
    "joined_qa": Schema(academic_video.joined_qa, academic_video.video_of_question),
    "label": Schema(academic.label),
    "llava_video": Schema(academic.llava_video, media.video),
    "localized_narratives": Schema(academic_video.localized_narratives),
    "mantis": Schema(answering.mantis),
    "molmo2_cap": Schema(answering.molmo2_cap),
    "motion_caption": Schema(academic_video.motion_caption),
    "multi_image_point": Schema(pointing.multi_image_point),
    "multi_image_qa": Schema(answering.multi_image_qa),
    "options_qa": Schema(academic_video.options_qa, media.video),
    "paxion": Schema(academic_video.paxion, academic_video.clip_of),
    "perception_test": Schema(academic.perception_test),
    "pixmo_cap": Schema(answering.pixmo_cap),
    "pixmo_count": Schema(pointing.pixmo_count),
    "pixmo_points": Schema(pointing.pixmo_points, media.image),
    "qv_highlights": Schema(academic.qv_highlights),
    "science_qa": Schema(academic.science_qa),
    "star": Schema(academic_video.star, academic_video.clip_of),
    "tgif": Schema(academic.tgif, lambda row: row["gif_name"]),
    "tracks": Schema(tracking.tracks),
    "tulu": Schema(answering.tulu),
    "tvqa": Schema(academic.tvqa),
    "video_choice": Schema(answering.video_choice, media.video),
    "video_point": Schema(pointing.video_point, media.video),
    "video_qa": Schema(academic.video_qa, media.video),
    "vqa": Schema(answering.vqa),
    "youcook2": Schema(academic_video.youcook2),
}


def group(schema: str, row: Row) -> str:
    """Returns the group of a row, of a schema that has groups.

    Raises:
      Unfit: (a ValueError) the row does not say it.
    """
    of = SCHEMAS[schema].of
    assert of is not None
    try:
        return str(of(row))
    except _BAD_ROW as error:
        raise _misfit(schema, row, error) from error


def convert(schema: str, rows: Sequence[Row], folder: str | os.PathLike, exclude: Set[str] = frozenset(),
            how: Mapping[str, Any] = MappingProxyType({})) -> Iterator[Record | ValueError]:
    """Yields the records of the rows of one group, and the reason in place of each that is left out.

    Media must be in the folder already. Left out are records whose media are missing, rows that do not fit
    the schema (Unfit), and annotations that do not fit the format; other rows and annotations of the same
    media are kept.

    Args:
      exclude: names of media that evaluations use, with or without folder and suffix (for images mostly the
        SHA-256). A record with one of them is left out, with an Excluded as reason.
      how: further arguments of the schema (tasks.Task.how).
    """
    if "media_folder" in how:  # relative to the folder
        how = {**how, "media_folder": files.path(folder) / how["media_folder"]}
    make = functools.partial(SCHEMAS[schema].records, **how)
    unfit: list[Unfit] = []
    found = _records(make, rows, schema, unfit)
    yield from unfit
    for record in found:
        if listed := records.listed(record, exclude):
            yield Excluded(next(iter(listed)), frozenset().union(*listed.values()))
        else:
            yield from _checked(record, folder)


def _records(make: Callable, rows: Sequence[Row], schema: str, unfit: list[Unfit]) -> list[Record]:
    """Returns the records of the rows that fit."""
    try:
        return list(make(rows))
    except _BAD_ROW as error:
        if len(rows) == 1:
            unfit.append(_misfit(schema, rows[0], error))
            return []
    before = len(unfit)
    good, alone = [], []
    for row in rows:
        records = _records(make, [row], schema, unfit)
        if len(unfit) == before:
            good.append(row)
            alone += records
        before = len(unfit)
    try:
        return list(make(good)) if good else []
    except _BAD_ROW:  # each row fits alone, but not with the others
        return alone


def _misfit(schema: str, row: Mapping, error: Exception) -> Unfit:
    if isinstance(error, KeyError):
        return Unfit(f"rows of {schema} must have the column {error}; got {sorted(row)}")
    return Unfit(f"a row of {schema} does not fit it ({type(error).__name__}: {error}); got "
                 f"{str(row)[:200]}")


def _present(record: Record, folder: str | os.PathLike) -> dict[str, str]:
    """Returns the media of a record that are in a bucket, where records.parse_record does not look."""
    if not files.is_remote(folder):
        return {}
    paths = {name: files.path(folder) / name for name in records.media(record)}
    return {name: name for name, path in paths.items() if path.is_file() and path.stat().length}


def _checked(record: Record, folder: str | os.PathLike) -> Iterator[Record | ValueError]:
    """Yields the record with those annotations that training can read, if there are any, and the reasons."""
    held = _present(record, folder)
    try:
        records.parse_record(record, folder, held=held)
        yield record
        return
    except ValueError as error:
        yield error
    good = []
    for annotation in record["annotations"] if len(record["annotations"]) > 1 else ():
        one = record | {"annotations": [annotation]}
        try:
            records.parse_record(one, folder, held=held)
            good.append(annotation)
        except ValueError as error:
            yield error
    if good:
        yield record | {"annotations": good}
