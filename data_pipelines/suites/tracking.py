"""Tracking of objects that an expression names: Molmo2-Track, and four sets of referring segmentation.

G objects of a query. Frames are those of the video: frame = round(seconds x fps).

Source: reference, olmo/data/{molmo2_video_track,academic_video_track}_datasets.py.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines import masks as mask_lib
from data_pipelines.formats import templates
from data_pipelines.scoring import tracks as track_scores
from data_pipelines.suites import benchmark
from data_pipelines.suites import metrics
from data_pipelines.suites import rows
from molmo2_jax import types
from molmo2_jax.inputs import points

HUB = benchmark.HUB
Benchmark = benchmark.Benchmark
Item = benchmark.Item
RATE = 1           # points per second that are asked for
GROUPS = {"APTv2": "animal", "dancetrack": "dance", "sportsmot": "sports", "personpath22": "person",
          "sav": "misc"}   # source of a video in Molmo2-Track: group

XY = tuple[float, float]
# Object -> its mask in each frame of the video, in any form that `_decoded` takes; None where it is absent.
FrameMasks = Mapping[str, Sequence[Any]]


def _item(name: str, video: str, expression: str, size: tuple[int, int], fps: float,
          found: Mapping[int, Mapping[str, XY]], objects: Sequence[str], read: Callable[[], FrameMasks],
          group: str = "") -> Item:
    """Returns a query; `found` is frame -> {object: (x, y) in pixels}, of visible objects."""
    frames: list[points.TrackFrame] = []
    for frame, places in sorted(found.items()):
        frames.append((frame / fps, dict(places.items())))
    answer = points.format_tracks(frames, expression, scale=size)
    return Item(id=name, cluster=video, reference=answer,
                example=types.Example(annotations=(), video=video, tracking_fps=RATE, key=name),
                prompt=templates.TRACK_FPS[0].format(label=expression, fps=RATE),
                target=(group, functools.partial(_target, found, tuple(objects), size, fps, read)))


def _target(found, objects, size, fps, read: Callable[[], FrameMasks], every_frame: bool = False,
            ) -> track_scores.TrackTarget:
    """Returns the target; every_frame: of all frames of the video, for masks, without places of points."""
    by_object = read()
    if every_frame:
        count = max(map(len, by_object.values()), default=0)
        found = {frame: {name: (0.0, 0.0) for name in objects if frame < len(by_object.get(name, ()))
                         and by_object[name][frame] is not None} for frame in range(count)}
    shapes: dict[int, dict[Hashable, np.ndarray]] = {}
    for frame, visible in found.items():
        masks = {name: _decoded(by_object.get(name, ()), frame, size) for name in objects}
        shapes[frame] = {name: mask for name, mask in masks.items() if mask is not None}
        for name in visible:   # a visible point without a mask: no point can hit it
            shapes[frame].setdefault(name, np.zeros(size[::-1], bool))
    return track_scores.TrackTarget(objects=objects, points=found, masks=shapes, width=size[0],
                                    height=size[1], fps=fps)


def _decoded(frames: Sequence[Any], frame: int, size: tuple[int, int]) -> np.ndarray | None:
    """Returns bool[H, W] of an object in a frame: from run lengths, or from (file, value of its pixels)."""
    one = frames[frame] if 0 <= frame < len(frames) else None
    if one is None:
        return None
    if isinstance(one, Mapping):
        return mask_lib.decode(one)
    path, value = one
    with Image.open(path) as picture:
        pixels = np.asarray(picture.resize(size, Image.Resampling.NEAREST) if picture.size != size
                            else picture)
    pixels = pixels if pixels.ndim == 2 else pixels[..., 0]
    return pixels >= 255 if value is None else pixels == value


def _near_grid(frame: int, fps: float) -> bool:
    """Returns whether a frame is on the grid of RATE points per second."""
    return frame % max(1, round(fps / RATE)) == 0


def molmo2_track(row: dict, place: rows.Place) -> Iterator[Item]:
    """id, clip, video_dataset, fps, exp, w, h, mask_id, points [{object_id, points: [[x, y] or null per
    frame]}], masks [{object_id, masks: [run lengths or null per frame]}]."""
    fps = float(row["fps"])
    found: dict[int, dict[str, XY]] = {}
    for one in row["points"]:
        for frame, point in enumerate(one["points"]):
            if point and _near_grid(frame, fps):
                found.setdefault(frame, {})[str(one["object_id"])] = (float(point[0]), float(point[1]))
    source = row["video_dataset"]
    yield _item(str(row["id"]), place.media.find(f"videos/{source}/{row['clip']}.mp4",
                                                 f"{pathlib.PurePath(row['clip']).name}.mp4"),
                row["exp"], (int(row["w"]), int(row["h"])), fps, found, list(map(str, row["mask_id"])),
                functools.partial(_of_column, row["masks"]), GROUPS.get(source, source))


def _of_column(read: Callable | list) -> FrameMasks:
    return {str(one["object_id"]): one["masks"] for one in (read() if callable(read) else read)}


def _referring(masks: Callable[[dict, rows.Place], Callable[[], FrameMasks]]):
    """Returns the reader of id, video, qid, expression, fps, sampling_fps, width, height, mask_id,
    frame_trajectories [{frame, time, points [{id, point, occluded}]}]."""
    def make(row: dict, place: rows.Place) -> Iterator[Item]:
        if int(row.get("sampling_fps") or RATE) != RATE:
            return
        fps = float(row["fps"])
        found: dict[int, dict[str, XY]] = {}
        for one in row["frame_trajectories"]:
            visible = {str(point["id"]): (float(point["point"][0]), float(point["point"][1]))
                       for point in one["points"] if not point["occluded"]}
            if _near_grid(round(one["time"] * fps), fps):
                found[round(one["time"] * fps)] = visible
        name = pathlib.PurePath(row["video"]).stem
        yield _item(str(row["id"]), place.media.find(f"videos/{name}.mp4", f"{name}.mp4"), row["expression"],
                    (int(row["width"]), int(row["height"])), fps, found, list(map(str, row["mask_id"])),
                    masks(row, place))
    return make


def _from_dict(row: dict, place: rows.Place) -> Callable[[], FrameMasks]:
    """Returns how to read masks from MeViS' mask_dict.json: annotation -> run lengths per frame."""
    return functools.partial(_in_dict, place.media.find("valid_u/mask_dict.json", "mask_dict.json"),
                             tuple(map(str, row["mask_id"])), tuple(map(str, row["anno_id"])))


@functools.lru_cache(maxsize=1)
def _mask_dict(path: str) -> dict[str, list]:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def _in_dict(path: str, objects: Sequence[str], annotations: Sequence[str]) -> FrameMasks:
    return {name: _mask_dict(path)[one] for name, one in zip(objects, annotations, strict=True)}


def _from_folder(folder_of: Callable[[dict], str], value_of: Callable[[dict, int], int | None] | None = None):
    """Returns how to read masks from PNG files, one per frame in a folder.

    value_of: (row, number of the object) -> the value of its pixels; without it those of 255 are inside.
    """
    def masks(row: dict, place: rows.Place) -> Callable[[], FrameMasks]:
        values = {str(name): value_of(row, number) if value_of else None
                  for number, name in enumerate(row["mask_id"])}
        return functools.partial(_in_folder, place.media.folder, folder_of(row), values)
    return masks


def _in_folder(root: pathlib.Path, folder: str, values: Mapping[str, int | None]) -> FrameMasks:
    found = next((sorted(one.glob("*.png")) for one in sorted(root.rglob(folder)) if one.is_dir()), [])
    if not found:
        raise ValueError(f"masks must be PNG files in a folder {folder} below {root}; there are none")
    return {name: [(path, value) for path in found] for name, value in values.items()}


def _published(jf, f1, hota, name: str = "jf_merged_segmented") -> dict:
    """Returns published percentages: of J&F with SAM 2, and of F1 and HOTA where they are known.

    name: of the J&F score: referring sets have one mask for all objects of an expression.
    """
    return {name: jf, "f1_reference": f1, "HOTA_reference": hota}


_REFERRING = "*.parquet | track/*.parquet | data/*.parquet"


def _rows(masks) -> Callable:
    return rows.each(_referring(masks), *map(str.strip, _REFERRING.split("|")))


TRACK = (
    Benchmark(name="molmo2_track", title="Molmo2-Track", folder="molmo2_track",
              origin=f"{HUB}allenai/Molmo2-VideoTrackEval, test; its page says how to get the videos, as "
              "videos/SOURCE/CLIP.mp4",
              files=("data/test-*.parquet",),
              rows=rows.each(molmo2_track, "data/test-*.parquet", later=("masks",)), metric=metrics.TRACKS,
              max_new_tokens=4096,
              published=_published((56.7, 56.2, 53.7), (57.5, 57.1, 54.2), (57.6, 57.5, 54.2),
                                   "jf_segmented")),
    Benchmark(name="mevis_valid_u", title="MeViS valid_u", folder="mevis_valid_u",
              origin=f"{HUB}allenai/molmo2-mevis, track, valid_u, and the videos and mask_dict.json of "
              f"{HUB}FudanCVL/MeViS",
              files=(_REFERRING, "**/mask_dict.json"), rows=_rows(_from_dict), metric=metrics.TRACKS,
              max_new_tokens=4096,
              published=_published((70.0, 70.8, 69.7), (75.5, 75.9, None), (72.4, 72.6, None))),
    Benchmark(name="ref_yt_vos", title="Ref-YT-VOS", folder="ref_yt_vos",
              origin=f"{HUB}allenai/molmo2-ref-yt-vos, track, valid, and the videos and Annotations of "
              "https://competitions.codalab.org/competitions/29139; needs an account",
              files=(_REFERRING, "**/Annotations"),
              rows=_rows(_from_folder(lambda row: f"Annotations/{row['video']}/{row['qid']}")),
              metric=metrics.TRACKS, max_new_tokens=4096,
              published=_published((70.2, 70.2, 67.9), (80.4, 78.7, None), (78.8, 77.3, None))),
    Benchmark(name="ref_davis17", title="Ref-DAVIS17", folder="ref_davis17",
              origin=f"{HUB}allenai/molmo2-ref-davis17, track, valid, and videos and Annotations of "
              "https://davischallenge.org, DAVIS-2017-trainval-480p",
              files=(_REFERRING, "**/Annotations"),
              rows=_rows(_from_folder(
                  lambda row: f"Annotations/480p/{pathlib.PurePath(row['video']).stem}",
                  lambda row, number: int(row["obj_id"][number]))), metric=metrics.TRACKS,
              max_new_tokens=4096,
              published=_published((73.5, 72.7, 70.4), (83.1, 81.3, None), (81.1, 78.7, None))),
    Benchmark(name="reason_vos", title="ReasonVOS", folder="reason_vos",
              origin=f"{HUB}allenai/molmo2-reasonvos, track, test, and the videos and Annotations of "
              "https://github.com/showlab/VideoLISA",
              files=(_REFERRING, "**/Annotations"),
              rows=_rows(_from_folder(lambda row: f"Annotations/{row['anno_id'][0]}")), metric=metrics.TRACKS,
              max_new_tokens=4096,
              published=_published((61.9, 65.8, 62.6), (66.5, 70.8, None), (64.0, 68.6, None))),
)
