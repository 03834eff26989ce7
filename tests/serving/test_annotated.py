"""The video that a client gets has the points at their places and times."""

import av
import numpy as np
import pytest

from molmo2_jax.inputs import held_file
from molmo2_jax.render import pictures
from molmo2_jax.serving import annotated


def test_the_points_of_a_video_are_drawn_at_their_times(tmp_path):
    path = tmp_path / "clip.mp4"
    pictures.write_video(path, [np.full((300, 400, 3), 128, np.uint8)] * 40, fps=10)
    points = annotated.points_of([{"id": 2, "label": "dot", "x": 100, "y": 200.0, "frame_time": 1.0}])
    (tmp_path / "points.mp4").write_bytes(annotated.mp4(str(path), points))
    with av.open(str(tmp_path / "points.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 10
    marked = [int(np.abs(frame[200, 100].astype(int) - pictures.colour("2")).max()) < 40 for frame in frames]
    assert marked == [False] * 10 + [True] * 10 + [False] * 20   # a second, from 1.0 s on


@pytest.mark.parametrize("values", [
    [], {}, [{}], [{"id": 1, "x": "a", "y": 1, "frame_time": 1}], [7], [{"id": 1, "x": 1, "y": 1}],
    [{"id": 1, "x": 1, "y": 1, "frame_time": 1}] * 10_001])
def test_what_is_no_list_of_points_is_refused(values):
    with pytest.raises(ValueError, match="points must be a list of 1 .. 10000|a point must have id, x, y"):
        annotated.points_of(values)


def test_a_held_file_is_a_video_too(tmp_path):
    path = tmp_path / "clip.mp4"
    pictures.write_video(path, [np.full((32, 48, 3), 128, np.uint8)] * 4, fps=4)
    held = held_file.HeldFile("clip.mp4", path.read_bytes())
    assert annotated.mp4(held, annotated.points_of([{"id": "1", "x": 1, "y": 1, "frame_time": 0}]))
