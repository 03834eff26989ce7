"""The recipe's data sets as they are published: rows of each -> records of docs/data_format.md.

One small function per kind of data set: it takes the rows, as dictionaries, and yields records. Media are
named `media/ID.mp4` and `media/ID.jpg`, ID being what the rows call the video or image. `convert` writes the
annotations.jsonl of a data folder, from which training reads; what the recipe draws anew at every use (the
mode of a question, the place of an answer) is drawn then, not here.

Source: paper, appendix on data; reference: olmo/data/{molmo2,pixmo,academic_image}_datasets.py.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from data_pipelines import sources
from data_pipelines.schemas import answering
from data_pipelines.schemas import pointing
from data_pipelines.schemas import tracking

Row = Mapping[str, Any]
Record = dict[str, Any]

SCHEMAS: dict[str, Callable[..., Iterator[Record]]] = {
    "a_okvqa": answering.a_okvqa,
    "ask_model_anything": answering.ask_model_anything,
    "cap_qa": answering.cap_qa,
    "chart_qa": answering.chart_qa,
    "cosyn": answering.cosyn,
    "cosyn_point": pointing.cosyn_point,
    "hardcodes": answering.hardcodes,
    "human_qa": answering.human_qa,
    "label": answering.label,
    "mantis": answering.mantis,
    "molmo2_cap": answering.molmo2_cap,
    "multi_image_point": pointing.multi_image_point,
    "multi_image_qa": answering.multi_image_qa,
    "pixmo_cap": answering.pixmo_cap,
    "pixmo_count": pointing.pixmo_count,
    "pixmo_points": pointing.pixmo_points,
    "tracks": tracking.tracks,
    "tulu": answering.tulu,
    "video_choice": answering.video_choice,
    "video_point": pointing.video_point,
    "vqa": answering.vqa,
}


def convert(schema: str, rows: Iterable[Row], folder: str | os.PathLike, **how
            ) -> tuple[int, list[ValueError]]:
    """Writes folder/annotations.jsonl; returns the number of records in it and why others were left out.

    Media must be in the folder already: a record whose media are missing is left out. `how` are further
    arguments of the schema (tasks.Task.how).

    Raises:
      ValueError: there is no such schema, or the rows lack a column it reads.
    """
    if schema not in SCHEMAS:
        raise ValueError(f"a schema must be one of {', '.join(SCHEMAS)}; got {schema!r}")
    folder, number, errors = pathlib.Path(folder), 0, []
    with open(folder / "annotations.jsonl", "w", encoding="utf-8") as file:
        try:
            for record in SCHEMAS[schema](rows, **how):
                try:
                    sources.parse_record(record, folder)
                except ValueError as error:
                    errors.append(error)
                    continue
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                number += 1
        except KeyError as error:
            raise ValueError(f"rows of {schema} must have the column {error}; they do not") from error
    return number, errors
