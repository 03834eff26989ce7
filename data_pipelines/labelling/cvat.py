"""CVAT XML 1.1, for video (tracks) and for images: boxes, points, polygons, masks, skeletons.

A shape outside the view ends its track until it is inside again. Several points of one shape are separate
objects; points of a skeleton are labelled "LABEL POINT".

Source: docs.cvat.ai, formats "CVAT for video" and "CVAT for images".
"""

import pathlib
import xml.etree.ElementTree as etree
from collections.abc import Iterator

import numpy as np

from data_pipelines import masks
from data_pipelines.labelling import labels

_SHAPES = ("box", "points", "polygon", "mask", "skeleton")


def read(path: pathlib.Path, media: pathlib.Path) -> Iterator[labels.Mark | ValueError]:
    """Yields the marks of annotations.xml; the video or the images are below `media`.

    Raises:
      ValueError: the file is not XML of CVAT, or has tracks but names no video.
    """
    try:
        root = etree.parse(path).getroot()
    except etree.ParseError as error:
        raise ValueError(f"{path}: must be the XML of CVAT; {error}") from None
    if root.tag != "annotations":
        raise ValueError(f"{path}: must be the XML of CVAT, with <annotations>; got <{root.tag}>")
    tracks = root.findall("track")
    if tracks:
        yield from _tracks(path, tracks, _video(path, root, media))
    for image in root.findall("image"):
        medium = labels.Medium(labels.find(image.attrib["name"], media),
                               size=(int(image.attrib["width"]), int(image.attrib["height"])))
        for number, shape in enumerate(image):
            if shape.tag != "tag":
                yield from _marks(shape, shape.attrib.get("label", ""), medium, number,
                                  f"{path.name}: image {image.attrib['id']}, shape {number}", None)


def _video(path: pathlib.Path, root: etree.Element, media: pathlib.Path) -> labels.Medium:
    source, size = root.find("./meta//source"), root.find("./meta//original_size")
    if source is None or not source.text:
        raise ValueError(f"{path}: tracks need <source>, the name of the video, in <meta>; got none")
    stated = None if size is None else (int(size.findtext("width", "0")), int(size.findtext("height", "0")))
    return labels.Medium(labels.find(source.text, media), size=stated)


def _tracks(path, tracks: list[etree.Element], medium: labels.Medium) -> Iterator[labels.Mark | ValueError]:
    for track in tracks:
        key = int(track.attrib["id"])
        for shape in track:
            where = f"{path.name}: track {key}, frame {shape.attrib.get('frame')}"
            if shape.attrib.get("outside") != "1":
                yield from _marks(shape, track.attrib["label"], medium, key, where,
                                  int(shape.attrib["frame"]))


def _marks(shape: etree.Element, label: str, medium: labels.Medium, key: int, where: str,
           frame: int | None) -> Iterator[labels.Mark | ValueError]:
    if shape.tag not in _SHAPES:
        yield ValueError(f"{where}: a shape must be one of {', '.join(_SHAPES)}; got {shape.tag}")
        return
    is_occluded = shape.attrib.get("occluded") == "1"
    try:
        if shape.tag == "skeleton":
            for part in shape.findall("points"):
                if part.attrib.get("outside") != "1":
                    [place] = _corners(part)
                    yield labels.Mark(medium, f"{label} {part.attrib['label']}", place, where,
                                      key=(key, part.attrib["label"]), frame=frame,
                                      is_occluded=part.attrib.get("occluded") == "1")
        elif shape.tag == "points":
            places = _corners(shape)
            for number, place in enumerate(places):
                yield labels.Mark(medium, label, place, where, key=(key, number) if number else key,
                                  frame=frame, is_occluded=is_occluded)
        else:
            place, mask = _area(shape, medium)
            yield labels.Mark(medium, label, place, where, key=key, frame=frame, mask=mask,
                              is_occluded=is_occluded)
    except (ValueError, LookupError) as error:
        yield ValueError(f"{where}: {type(error).__name__}: {error}")


def _corners(shape: etree.Element) -> list[tuple[float, ...]]:
    return [tuple(float(value) for value in pair.split(",")) for pair in shape.attrib["points"].split(";")]


def _area(shape: etree.Element, medium: labels.Medium) -> tuple[tuple[float, ...], dict | None]:
    """Returns the place and the mask of a box, a polygon or a mask."""
    if shape.tag == "box":
        return tuple(float(shape.attrib[name]) for name in ("xtl", "ytl", "xbr", "ybr")), None
    if medium.size is None:
        raise ValueError("polygons and masks need <original_size> in <meta>")
    width, height = medium.size
    if shape.tag == "polygon":
        return (), labels.polygon([[value for corner in _corners(shape) for value in corner]], width, height)
    left, top, columns, rows = (int(shape.attrib[name]) for name in ("left", "top", "width", "height"))
    runs = [int(run) for run in shape.attrib["rle"].split(",")]
    if sum(runs) != rows * columns or not (0 <= left <= width - columns and 0 <= top <= height - rows):
        raise ValueError("the runs of a mask must fill its rectangle inside the frame")
    full = np.zeros((height, width), bool)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # row by row, from outside
    full[top:top + rows, left:left + columns] = inside.reshape(rows, columns)
    return (), masks.encode(full)
