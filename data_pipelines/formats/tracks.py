"""Questions about the motion of objects: tracks, their start and end points, continuation from a point."""

from data_pipelines import annotations
from data_pipelines.formats import templates
from data_pipelines.formats import view as views
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import points

DEFAULT_FPS = 2
_STYLES = {"per_frame": "video_point_track_per_frame", "start_end": "video_point_ground_start_end",
           "single_point": "video_single_point_track_per_frame"}


def ask_tracks(annotation: annotations.Tracks, view: views.View) -> tuple[str, str, str] | None:
    """Returns (style, question, answer); None if no object is visible at the times asked about.

    Raises:
      ValueError: a point lies outside the frame, or the declared size differs from that of the video.
    """
    style = _STYLES[annotation.mode]
    if not annotation.tracks:
        return style, _question(annotation, view), points.NONE
    frames = points.match_frames(_frames(annotation, view), view.media.seconds, annotations.TIME_TOLERANCE)
    start = None
    if annotation.mode == "single_point":
        start = points.start_point(frames, annotation.tracks[0].id, view.rng if view.train else None)
        if start is None:
            return None
    if annotation.mode == "start_end":
        frames = points.start_end(frames)
    else:
        frames = points.on_grid(frames, annotation.fps, annotations.TIME_TOLERANCE)
    if start is not None:
        frames = points.later_than(frames, start[0])
    write = points.format_tracks if view.media.cells is None else grounded.format_tracks
    answer = write(frames, annotation.label, **view.writing)
    if not frames or not answer:
        return None
    return style, _question(annotation, view, start), answer


def _frames(annotation: annotations.Tracks, view: views.View) -> list[points.TrackFrame]:
    """Returns (seconds, {id: (x, y) as fractions, or None if occluded}) in order of time."""
    frames: dict[float, dict] = {}
    is_single = annotation.mode == "single_point"
    for track in annotation.tracks[:1] if is_single else annotation.tracks:
        for point in track.points:
            place = annotations.relative(annotation, point, view.media)
            frames.setdefault(point.time, {})[track.id] = None if point.occluded else place
    return sorted(frames.items())


def _question(annotation: annotations.Tracks, view: views.View, start=None) -> str:
    fps, label = annotation.fps, annotation.label
    if start is not None:
        tag = points.format_points([(start[0], [start[1]])], label, scale=1)
        return view.pick(templates.TRACK_SINGLE, "{start}").format(start=tag, fps=fps)
    family = templates.TRACK_FPS
    if annotation.mode == "start_end":
        family = templates.TRACK_START_END
    elif fps == DEFAULT_FPS and (not view.train or view.rng.uniform() < 0.5):
        family = templates.TRACK
    return view.pick(family, "{label}").format(label=label, fps=fps)
