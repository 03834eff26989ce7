"""COCO JSON: boxes, keypoints, polygons, and masks as run lengths, compressed or not.

An object with keypoints becomes one point per visible keypoint, labelled "CATEGORY KEYPOINT"; one with a
segmentation a point inside its mask; any other the centre of its box. Images that share a `video_id` are
never divided between splits.

Source: cocodataset.org/#format-data.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from data_pipelines import masks
from data_pipelines.labelling import labels


def read(path: pathlib.Path, media: pathlib.Path) -> Iterator[labels.Mark | ValueError]:
    """Yields the marks of an instances or keypoints file; file names of images are below `media`.

    Raises:
      ValueError: the file is not JSON in UTF-8, or has no images, annotations or categories.
    """
    content = labels.load_json(path)
    lacking = [name for name in ("images", "annotations", "categories")
               if not isinstance(content, dict) or name not in content]
    if lacking:
        raise ValueError(f"{path}: COCO files must have images, annotations and categories; "
                         f"got none of {', '.join(lacking)}")
    categories = {one["id"]: one for one in content["categories"]}
    images = {one["id"]: labels.Medium(
        labels.find(one["file_name"], media), size=(one["width"], one["height"]),
        group=None if one.get("video_id") is None else f"video {one['video_id']}")
        for one in content["images"]}
    for number, one in enumerate(content["annotations"]):
        where = f"{path.name}: annotations[{number}]"
        try:
            yield from _marks(one, _named(categories, one, "category_id"), _named(images, one, "image_id"),
                              where)
        except (ValueError, TypeError) as error:
            yield ValueError(f"{where}: {error}")


def _named(table: dict, one: dict, field: str) -> Any:
    if one.get(field) not in table:
        raise ValueError(f"{field} must be one that the file lists; got {one.get(field)}")
    return table[one[field]]


def _marks(one: dict, category: dict, image: labels.Medium, where: str,
           ) -> Iterator[labels.Mark | ValueError]:
    if one.get("iscrowd"):
        raise ValueError("a crowd has no single point")
    name, key = category["name"], one.get("track_id", one.get("id"))
    found = one.get("keypoints") or []
    triples = list(zip(found[::3], found[1::3], found[2::3], strict=True))
    if any(seen for _, _, seen in triples):
        names = category.get("keypoints") or [str(place) for place in range(1, len(triples) + 1)]
        for part, (x, y, seen) in zip(names, triples, strict=True):
            if seen == 2:
                yield labels.Mark(image, f"{name} {part}", (x, y), where, key=(key, part))
            elif seen:
                yield ValueError(f"{where}: {name} {part}: is labelled as hidden")
        return
    if one.get("segmentation") and image.size:
        yield labels.Mark(image, name, (), where, key=key, mask=_mask(one["segmentation"], *image.size))
        return
    if len(one.get("bbox") or ()) != 4:
        raise ValueError(f"bbox must be [x, y, width, height]; got {one.get('bbox')}")
    x, y, width, height = one["bbox"]
    yield labels.Mark(image, name, (x, y, x + width, y + height), where, key=key)


def _mask(segmentation: list | dict, width: int, height: int) -> dict:
    if isinstance(segmentation, list):
        return labels.polygon(segmentation, width, height)
    counts = segmentation["counts"]
    counts = counts if isinstance(counts, list) else masks.uncompressed(counts)
    return {"size": list(segmentation["size"]), "counts": counts}
