"""Pointing and counting by pointing: Molmo2-VC, Molmo2-VP, Point-Bench, PixMo-Points, and screens.

Source: reference, olmo/data/{molmo2,pixmo,academic_image}_datasets.py; ScreenSpot-Pro and OSWorld-G, their
annotation files.
"""

import collections
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from data_pipelines import masks as mask_lib
from data_pipelines.formats import templates
from data_pipelines.schemas import answering
from data_pipelines.schemas import media as media_names
from data_pipelines.scoring import points as point_scores
from data_pipelines.scoring import regions
from data_pipelines.suites import benchmark
from data_pipelines.suites import images
from data_pipelines.suites import metrics
from data_pipelines.suites import rows
from molmo2_jax import types
from molmo2_jax.inputs import points

HUB = benchmark.HUB
Benchmark = benchmark.Benchmark
Item = benchmark.Item
RATE = 2.0         # frames per second at which masks of videos are numbered
CLIP = 63.0        # seconds of a video that questions about counts show at most
BURST_FILES = ("test/all_classes.json", "**/test/all_classes.json")
_WHITE = 127       # grey values above this are inside a mask


def _clip_video(row: dict, place: rows.Place) -> str:
    """Returns the file of a video at 2 frames per second: ID_2fps.mp4, for "PART/ID" in PART-2fps."""
    folder, _, name = row["video_id"].rpartition("/")
    inside = [f"{folder}-2fps/{name}_2fps.mp4"] if folder else []
    return place.media.find(f"media/{row['video_id']}_2fps.mp4", *inside, f"{name}_2fps.mp4")


def video_count(row: dict, place: rows.Place) -> Iterator[Item]:
    """video_id, clip_start, clip_end, question, label, category, count."""
    video, count = _clip_video(row, place), int(row["count"])
    clip = None if row["clip_start"] is None else (float(row["clip_start"]), float(row["clip_end"]))
    yield Item(id=f"{row['video_id']}_{row['label']}_{place.number}", cluster=video, prompt=row["question"],
               example=types.Example(annotations=(), video=video, clip=clip, key=place.name),
               target=(row["category"], count), reference=points.format_count(count))


def burst_count(folder: pathlib.Path) -> Iterator[Item | ValueError]:
    """Yields a question for every category with tracks in a sequence of BURST: how many there are.

    sequences [{dataset, seq_name, fps, all_image_paths, annotated_image_paths, segmentations [{track: mask}],
    track_category_ids {track: category}, not_exhaustive_category_ids}], categories [{id, name}]. Of longer
    sequences the first CLIP seconds are shown, and the tracks in them are counted. Categories that are not
    annotated exhaustively are left out.
    """
    media = rows.Media(folder)
    for path in rows.matching(folder, BURST_FILES):
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {one["id"]: _words(one["name"]) for one in content["categories"]}
        for number, row in enumerate(content["sequences"]):
            try:
                yield from _burst_sequence(row, names, media)
            except rows.BAD_ROW as error:
                yield rows.misfit(path, number, row, error)


def _words(name: str) -> str:
    """Returns the words of a category of LVIS: "bus_(vehicle)" -> "bus"."""
    return re.sub(r"_\(.*?\)", "", name).replace("_", " ")


def _burst_sequence(row: dict, names: Mapping[int, str], media: rows.Media) -> Iterator[Item]:
    name, times = f"{row['dataset']}/{row['seq_name']}", {
        frame: number / row["fps"] for number, frame in enumerate(row["all_image_paths"])}
    shown = {track for frame, found in zip(row["annotated_image_paths"], row["segmentations"], strict=True)
             if times[frame] <= CLIP for track in found}
    counts = collections.Counter(row["track_category_ids"][track] for track in shown)
    clip = (0.0, CLIP) if len(times) / row["fps"] > CLIP else None
    video = media.find(f"videos/{name}.mp4")
    for category, count in sorted(counts.items()):
        if category not in row["not_exhaustive_category_ids"]:
            label = names[category]
            yield Item(id=f"{name}_{label}", cluster=video, target=("object", count),
                       example=types.Example(annotations=(), video=video, clip=clip, key=name),
                       prompt=f"How many {label} are there in the video?",
                       reference=points.format_count(count))


def video_point(row: dict, place: rows.Place) -> Iterator[Item]:
    """video_id, video_duration, label, two_fps_timestamps, points [{x, y} in pixels, one per time], masks
    (per point [{frame_id, rle}], at 2 frames per second), width, height."""
    video, label = _clip_video(row, place), row["label"]
    size = (int(row["width"]), int(row["height"]))
    found = tuple((float(time), float(point["x"]), float(point["y"])) for time, point in
                  zip(row["two_fps_timestamps"], answering.pairs(row["points"]), strict=True))
    media = types.Media(sizes=(size,), seconds=np.zeros(0), duration=float(row["video_duration"]))
    groups: dict[float, list[tuple[float, float]]] = {}
    for time, x, y in found:
        groups.setdefault(time, []).append((x, y))
    yield Item(id=f"{row['video_id']}_{label}_{place.number}", cluster=video,
               example=types.Example(annotations=(), video=video, key=place.name),
               prompt=f'How many "{label}" are there in the video?',
               target=functools.partial(_video_target, found, row["masks"], media),
               reference=points.format_point_count(sorted(groups.items()), label, scale=size))


def _video_target(found, read: Callable | list, media: types.Media) -> point_scores.PointTarget:
    masks = tuple({one["frame_id"] / RATE: mask_lib.decode(one["rle"]) for one in answering.pairs(of_point)}
                  for of_point in (read() if callable(read) else read))
    return point_scores.PointTarget(points=found, masks=masks, media=media)


def pixmo_points(row: dict, place: rows.Place) -> Iterator[Item]:
    """image_url or image_sha256, label, points [{x, y} in percent], masks (one array [H, W] per point)."""
    name, label = media_names.image(row), row["label"].lower()
    found = [(float(point["x"]), float(point["y"])) for point in answering.pairs(row["points"])]
    yield images.item(f"{name}_{label}_{place.number}", place.media.find(name, pathlib.PurePath(name).name),
                      templates.POINT[0].format(label=label),
                      functools.partial(_image_target, found, row["masks"]),
                      points.format_points([(1, found)], label, scale=100), cluster=name)


def _image_target(found: Sequence[tuple[float, float]], read: Callable | list) -> point_scores.PointTarget:
    shapes = np.array(read() if callable(read) else read, bool)
    height, width = shapes.shape[1:] if shapes.ndim == 3 else (1, 1)
    return point_scores.PointTarget(
        points=tuple((1.0, x * width / 100, y * height / 100) for x, y in found),
        masks=tuple({1.0: shape} for shape in shapes), media=types.Media(sizes=((width, height),)))


def point_bench(row: dict, place: rows.Place) -> Iterator[Item]:
    """image_filename, mask_filename, category, user_input; entries without a mask are left out."""
    if not row.get("mask_filename"):
        return
    image = place.media.find(f"selected_images/{row['category']}/{row['image_filename']}")
    mask = place.media.find(f"selected_masks/{row['category']}/{row['mask_filename']}")
    yield images.item(f"{row['category']}_{place.number}_{row['image_filename']}", image, row["user_input"],
                      functools.partial(_mask_target, image, mask, row["category"]), "")


def _mask_target(image: str, mask: str, category: str) -> regions.MaskTarget:
    with Image.open(image) as picture:
        width, height = picture.size
    with Image.open(mask) as picture:
        values = np.asarray(picture)
    inside = np.asarray(values > _WHITE)
    mask = np.asarray(inside.any(axis=2)) if inside.ndim == 3 else inside
    return regions.MaskTarget(mask=mask, width=width, height=height, category=category.lower())


def inside_point(target: regions.MaskTarget) -> str:
    """Returns an answer with one point in the middle of a row of a mask: a right answer to Point-Bench."""
    rows_of, columns = np.nonzero(target.mask)
    place = len(columns) // 2
    x, y = columns[place] + 0.5, rows_of[place] + 0.5
    return points.format_points([(1, [(float(x), float(y))])], "it", scale=(target.width, target.height))


def _screen(name: str, image, instruction: str, target, size: tuple[float, float]) -> Item:
    x, y = target.inside
    return images.item(name, image, templates.POINT[0].format(label=instruction.rstrip(".")), target,
                       points.format_points([(1, [(x, y)])], instruction, scale=size), cluster=str(image))


def screenspot_v2(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, bbox [left, top, right, bottom] as fractions, instruction, data_type, data_source."""
    left, top, right, bottom = map(float, row["bbox"])
    yield _screen(place.name, place.media.image(row["image"]), row["instruction"],
                  regions.BoxTarget(box=(left, top, right, bottom), width=1, height=1), (1, 1))


def screenspot_pro(row: dict, place: rows.Place) -> Iterator[Item]:
    """id, img_filename, bbox [left, top, right, bottom] in pixels, instruction, img_size."""
    left, top, right, bottom = map(float, row["bbox"])
    width, height = map(int, row["img_size"])
    yield _screen(str(row.get("id") or place.name), place.media.image(f"images/{row['img_filename']}"),
                  row["instruction"], regions.BoxTarget(box=(left, top, right, bottom), width=width,
                                                        height=height), (width, height))


def osworld_g(row: dict, place: rows.Place) -> Iterator[Item]:
    """id, image_path, image_size, instruction, box_type, box_coordinates: [x, y, width, height] of a bbox, or
    x, y, x, y ... of a polygon, in pixels. Refusals, whose element is absent, are left out."""
    width, height = map(int, row["image_size"])
    numbers = list(map(float, row["box_coordinates"]))
    if row["box_type"] == "refusal":
        return
    target: regions.BoxTarget | regions.PolygonTarget
    if row["box_type"] == "polygon":
        target = regions.PolygonTarget(corners=tuple(zip(numbers[::2], numbers[1::2], strict=True)),
                                       width=width, height=height)
    else:
        left, top, across, down = numbers
        target = regions.BoxTarget(box=(left, top, left + across, top + down), width=width, height=height)
    yield _screen(str(row["id"]), place.media.image(f"images/{row['image_path']}"), row["instruction"],
                  target, (width, height))


VIDEO_COUNT = (
    Benchmark(name="video_count", title="Molmo2-VC", folder="video_count", max_new_tokens=2048,
              origin=f"{HUB}allenai/Molmo2-VideoCountEval, val; its page says how to get the videos, at 2 "
              "frames/s as ID_2fps.mp4",
              files=("data/val-*.parquet",),
              rows=rows.each(video_count, "data/val-*.parquet"), metric=metrics.COUNT,
              published={"correct_reference": (34.3, 35.5, 33.2), "close_reference": (56.1, 53.3, 50.5)}),
)
BURST = (
    Benchmark(name="burst_count", title="BURST, counts", folder="burst", max_new_tokens=2048,
              origin="https://github.com/Ali2500/BURST-benchmark, the annotations of the test set, and its "
              "frames joined to videos/DATASET/SEQUENCE.mp4; the questions of BURST-VC (published: 61.5, "
              "60.8 and 61.6) are not public, these are made of the tracks",
              files=(" | ".join(BURST_FILES),), rows=burst_count, metric=metrics.COUNT),
)
VIDEO_POINT = (
    Benchmark(name="video_point", title="Molmo2-VP", folder="video_point", max_new_tokens=2048,
              origin=f"{HUB}allenai/Molmo2-VideoPointEval, val; its page says how to get the videos, at 2 "
              "frames/s as ID_2fps.mp4",
              files=("data/val-*.parquet",),
              rows=rows.each(video_point, "data/val-*.parquet", later=("masks",)), metric=metrics.POINTS,
              published={"f1_reference": (39.9, 38.4, 35.8), "recall_reference": (42.7, 39.3, 35.8),
                         "precision_reference": (39.4, 38.7, 37.9)}),
)
POINT = (
    Benchmark(name="point_bench", title="Point-Bench", folder="point_bench", max_new_tokens=256,
              is_high_res=True,
              origin=f"{HUB}PointArena/pointarena-data, data.json, selected_images and selected_masks",
              files=("data.json", "selected_masks"), rows=rows.each(point_bench, "data.json"),
              metric=metrics.POINT_BENCH, published={"accuracy": (67.7, 68.7, 66.5)}),
    Benchmark(name="pixmo_points", title="PixMo-Points", folder="pixmo_points", max_new_tokens=192,
              is_high_res=True,
              origin=f"{HUB}allenai/pixmo-points-eval, test, and its images as media/SHA256.jpg, the SHA-256 "
              "of the file or of the address",
              files=("data/test-*.parquet",),
              rows=rows.each(pixmo_points, "data/test-*.parquet", later=("masks",)), metric=metrics.POINTS,
              published={"f1_reference": (None, 85.2, None)}),
)
SCREEN = (
    Benchmark(name="screenspot_v2", title="ScreenSpot v2", folder="screenspot_v2", max_new_tokens=64,
              is_high_res=True, origin=f"{HUB}HongxinLi/ScreenSpot_v2", files=("data/*.parquet",),
              rows=rows.each(screenspot_v2, "data/*.parquet"), metric=metrics.BOXES),
    Benchmark(name="screenspot_pro", title="ScreenSpot-Pro", folder="screenspot_pro", max_new_tokens=64,
              is_high_res=True, origin=f"{HUB}likaixin/ScreenSpot-Pro, annotations and images",
              files=("annotations/*.json",), rows=rows.each(screenspot_pro, "annotations/*.json"),
              metric=metrics.BOXES),
    Benchmark(name="osworld_g", title="OSWorld-G", folder="osworld_g", max_new_tokens=64, is_high_res=True,
              origin="https://github.com/xlang-ai/OSWorld-G, benchmark, the refined instructions",
              files=("OSWorld-G_refined.json",), rows=rows.each(osworld_g, "OSWorld-G_refined.json"),
              metric=metrics.BOXES),
)
