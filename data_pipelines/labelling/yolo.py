"""YOLO folders: boxes, polygons and key points, one text file per image, in fractions of the image.

    data.yaml (or classes.txt), images/.../NAME.jpg, labels/.../NAME.txt

A line is `class x y width height` (a box by its centre), `class x1 y1 x2 y2 x3 y3 ...` (a polygon), or a box
and then key points as the `kpt_shape` of data.yaml states.

Source: docs.ultralytics.com/datasets/{detect,segment,pose}.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

from data_pipelines.labelling import labels
from molmo2_jax.inputs import text_file

FRACTIONS = (1.0, 1.0)


def read(path: pathlib.Path, media: pathlib.Path) -> Iterator[labels.Mark | ValueError]:
    """Yields the marks of a folder with labels/ and images/.

    Raises:
      ValueError: the folder has no labels, or names no classes.
    """
    files = sorted((path / "labels").rglob("*.txt"))
    if not files:
        raise ValueError(f"{path}: YOLO folders must have label files in labels/; got none")
    names, keypoints = _settings(path)
    for file in files:
        place = file.relative_to(path / "labels").with_suffix("")
        image = next((found for suffix in labels.STILLS
                      if (found := media / "images" / f"{place}{suffix}").is_file()), None)
        if image is None:
            yield ValueError(f"labels/{place}.txt: must have an image images/{place}.jpg or .png; got none")
            continue
        medium = labels.Medium(image)
        for number, line in enumerate(text_file.read(file).splitlines(), start=1):
            if line.strip():
                where = f"labels/{place}.txt: line {number}"
                try:
                    yield from _marks(line, names, keypoints, medium, where, number)
                except (ValueError, LookupError) as error:
                    yield ValueError(f"{where}: {type(error).__name__}: {error}")


def _marks(line: str, names: dict[int, str], keypoints: tuple[int, int] | None, medium: labels.Medium,
           where: str, number: int) -> Iterator[labels.Mark]:
    kind, *rest = line.split()
    name, values = names[int(kind)], [float(value) for value in rest]
    if keypoints and len(values) == 4 + keypoints[0] * keypoints[1]:
        step = keypoints[1]
        for part in range(keypoints[0]):
            x, y, *seen = values[4 + part * step:4 + (part + 1) * step]
            if seen[0] if seen else (x or y):
                yield labels.Mark(medium, f"{name} {part + 1}", (x, y), where, key=(number, part),
                                  unit=FRACTIONS)
    elif len(values) == 4:
        x, y, width, height = values
        yield labels.Mark(medium, name, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), where,
                          key=number, unit=FRACTIONS)
    elif len(values) >= 6 and len(values) % 2 == 0:
        yield labels.Mark(medium, name, tuple(values), where, key=number, unit=FRACTIONS)
    else:
        raise ValueError("a line must be a box, a polygon or a box with key points; got "
                         f"{len(values)} numbers")


def _settings(path: pathlib.Path) -> tuple[dict[int, str], tuple[int, int] | None]:
    """Returns the names of the classes, and (number of key points, numbers of each), if there are any."""
    for name in ("classes.txt", "obj.names"):
        if (path / name).is_file():
            lines = text_file.read(path / name).split("\n")
            return {number: line.strip() for number, line in enumerate(lines) if line.strip()}, None
    if not (path / "data.yaml").is_file():
        raise ValueError(f"{path}: YOLO folders must name their classes in data.yaml or classes.txt; got "
                         "neither")
    text = text_file.read(path / "data.yaml")
    shape = re.search(r"^kpt_shape:\s*(\[.*\])", text, re.MULTILINE)
    names = _names(text)
    if not names:
        raise ValueError(f"{path / 'data.yaml'}: must have names, a list or one `number: name` per line")
    return names, tuple(ast.literal_eval(shape[1])) if shape else None


def _names(text: str) -> dict[int, str]:
    """Returns `names` of a data.yaml: a list in one line, or a list or numbered lines below the key."""
    found = re.search(r"^names:[ \t]*(?P<inline>[\[{].*)?$(?P<below>(\n[ \t-].*)*)", text, re.MULTILINE)
    if not found:
        return {}
    if found["inline"]:
        parts = found["inline"].strip().strip("[]{}").split(",")
    else:
        parts = [line.strip().removeprefix("- ") for line in found["below"].splitlines() if line.strip()]
    names = {}
    for number, part in enumerate(parts):
        index, colon, name = part.partition(":")
        is_numbered = bool(colon) and index.strip().isdigit()
        names[int(index) if is_numbered else number] = (name if is_numbered else part).strip().strip("'\"")
    return names
