"""Exports of the tools in which people label -> data folders (docs/data_format.md).

One module per format has a reader: (export, folder of the media) -> marks. `convert` writes the folder.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_pipelines.labelling import coco
from data_pipelines.labelling import cvat
from data_pipelines.labelling import davis
from data_pipelines.labelling import folder
from data_pipelines.labelling import label_studio
from data_pipelines.labelling import labels
from data_pipelines.labelling import tables
from data_pipelines.labelling import tap_vid
from data_pipelines.labelling import yolo


class Format(NamedTuple):
    """read: the reader. is_folder: whether the export is a folder, not a file."""
    read: Callable[[pathlib.Path, pathlib.Path], Iterator[labels.Mark | ValueError]]
    is_folder: bool = False


FORMATS: dict[str, Format] = {
    "coco": Format(coco.read),
    "csv": Format(tables.read_points),
    "cvat": Format(cvat.read),
    "davis": Format(davis.read, is_folder=True),
    "label_studio": Format(label_studio.read),
    "tap_vid": Format(tap_vid.read),
    "vott_csv": Format(tables.read_vott),
    "yolo": Format(yolo.read, is_folder=True),
}


def convert(name: str, export: pathlib.Path, output: pathlib.Path, media: pathlib.Path | None = None,
            options: folder.Options = folder.Options()) -> folder.Report:
    """Writes a data folder from an export in format `name`; returns what was written and left out.

    media: folder that the export's file names are relative to; None: the export, or the folder around it.

    Raises:
      ValueError: there is no such format or export, the export is not of the format, it has no usable
        label, or a split would be empty.
    """
    if name not in FORMATS:
        raise ValueError(f"--from must be one of {', '.join(FORMATS)}; got {name!r}")
    form = FORMATS[name]
    if not (export.is_dir() if form.is_folder else export.is_file()):
        kind = "folder" if form.is_folder else "file"
        raise ValueError(f"--input of --from={name} must be a {kind}; got {export}")
    root = media or (export if form.is_folder else export.parent)
    return folder.write(form.read(export, root), output, options)
