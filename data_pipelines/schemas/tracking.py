"""Tracks of objects: Molmo2-VideoTrack in its training form, and the sets with the same columns."""

from collections.abc import Iterator, Sequence

from data_pipelines.schemas import media

MODES = {"track": "per_frame", "ground": "start_end", "single_point_track": "single_point"}
_DENSEST = 10  # most frames per second at which a tracking video is shown


def tracks(rows: Sequence[dict], config: str = "track") -> Iterator[dict]:
    """id, clip or video, fps, sampling_fps, expression, width, height, mask_id, frame_trajectories.

    frame_trajectories: [{frame, time, points: [{id, point [x, y] in pixels, occluded}]}]. Object ids become
    0 ... n - 1 by their order in mask_id, whose entries are texts, the ids being numbers; points of other
    objects are left out. So are rows whose fps cannot be sampled at sampling_fps. Of rows with video_source
    "youtube" the video is media/video_path.
    """
    for row in rows:
        rate = int(row.get("sampling_fps") or 1)
        fps = round(row["fps"])
        if fps % rate or not any(fps % one == 0 and one % rate == 0 for one in range(1, _DENSEST + 1)):
            continue
        number = {str(name): place for place, name in enumerate(row["mask_id"])}
        found: dict[int, list[dict]] = {place: [] for place in number.values()}
        for frame in sorted(row["frame_trajectories"], key=lambda frame: frame["time"]):
            known = [(number[str(one["id"])], one) for one in frame["points"] if str(one["id"]) in number]
            for name, point in known:
                x, y = point["point"]
                place = {"time": frame["time"], "x": min(max(x, 0), row["width"]),
                         "y": min(max(y, 0), row["height"])}
                found[name].append(place | ({"occluded": True} if point["occluded"] else {}))
        objects = [{"id": place, "points": points} for place, points in found.items() if points]
        mode = MODES[config]
        video = {"video": row["video_path"]} if row.get("video_source") == "youtube" else row
        for some in [[one] for one in objects] if mode == "single_point" else [objects]:
            yield {"video": media.video(video), "size": [row["width"], row["height"]], "tracking_fps": rate,
                   "annotations": [{"type": "tracks", "label": row["expression"], "mode": mode, "fps": rate,
                                    "tracks": some}]}
