"""DAVIS folders: JPEGImages/.../SEQUENCE/00000.jpg and Annotations/.../SEQUENCE/00000.png.

A mask is an indexed PNG: pixel value 1, 2, ... is the number of an object, 0 background, 255 no label. The
frames become one video. Objects are called as davis_semantics.json in the folder says, else "object".

Source: davischallenge.org; the layout is also that of YouTube-VOS and of many tools that export masks.
"""

import collections
import functools
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_pipelines import masks
from data_pipelines.labelling import labels
from molmo2_jax.inputs import pixels

NO_LABEL = 255
UNNAMED = "object"


def read(path: pathlib.Path, media: pathlib.Path) -> Iterator[labels.Mark | ValueError]:
    """Yields the marks of all sequences; the frames are in JPEGImages below `media`.

    Raises:
      ValueError: there are no masks.
    """
    sequences = sorted({file.parent for file in (path / "Annotations").rglob("*.png")})
    if not sequences:
        raise ValueError(f"{path}: DAVIS folders must have masks Annotations/.../SEQUENCE/*.png; got none")
    semantics = path / "davis_semantics.json"
    names = labels.load_json(semantics) if semantics.is_file() else {}
    repeated = collections.Counter(folder.name for folder in sequences)   # in several resolutions
    for folder in sequences:
        place = folder.relative_to(path / "Annotations")
        name = place.name if repeated[place.name] == 1 else "_".join(place.parts)
        pictures = sorted(file for file in (media / "JPEGImages" / place).glob("*")
                          if file.suffix.lower() in labels.STILLS)
        if not pictures:
            yield ValueError(f"Annotations/{place}: must have frames in JPEGImages/{place}; got none")
            continue
        numbers = {file.stem: number for number, file in enumerate(pictures)}
        medium = labels.Medium(pathlib.Path(name), frames=functools.partial(
            map, pixels.load, pictures))
        for file in sorted(folder.glob("*.png")):
            where = f"Annotations/{place}/{file.name}"
            if file.stem not in numbers:
                yield ValueError(f"{where}: must have a frame of the same name; got none")
                continue
            values = np.asarray(Image.open(file))
            if values.ndim != 2:
                yield ValueError(f"{where}: must be an indexed PNG; got {values.ndim} dimensions")
                continue
            for one in sorted(set(np.unique(values).tolist()) - {0, NO_LABEL}):
                yield labels.Mark(medium, names.get(place.name, {}).get(str(one), UNNAMED), (), where,
                                  key=one, frame=numbers[file.stem], mask=masks.encode(values == one))
