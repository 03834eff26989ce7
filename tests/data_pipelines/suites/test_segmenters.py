"""J&F of masks from a file, and of SAM 2, whose package is replaced by one that knows the answer."""

import json
import sys
import types as types_lib

import numpy as np
import pytest

from data_pipelines import masks
from data_pipelines.suites import metrics
from data_pipelines.suites import segmenters
from tests.data_pipelines.suites import files
from tests.data_pipelines.suites import test_benchmarks

film, read = test_benchmarks.film, test_benchmarks.read
NAME = "molmo2_track"


def true_masks(names=("1", "2")):
    """Returns the masks of the film's two objects; the second appears after 5 seconds."""
    return {names[0]: dict.fromkeys(range(60), files.square(8, 8)),
            names[1]: dict.fromkeys(range(30, 60), files.square(32, 16))}


def line(item, found, **more):
    return json.dumps({"id": item.id, **more, "masks": {
        name: {frame: masks.encode(mask) for frame, mask in frames.items()}
        for name, frames in found.items()}}) + "\n"


def test_masks_of_a_file_are_scored_over_all_frames(read, tmp_path):
    benchmark, items, _ = read(NAME)
    path = tmp_path / "masks.jsonl"
    half = {name: {frame: mask for frame, mask in frames.items() if frame < 30}
            for name, frames in true_masks().items()}
    path.write_text(line(items[0], true_masks()) + line(items[1], half, answer="said"))
    metric = metrics.tracks_with(segmenters.recorded(path))
    whole = metric.each(items[0], items[0].reference)
    assert whole["jf_segmented"] == whole["jf_merged_segmented"] == whole["HOTA"] == 1
    # half the frames of the first object, and of the second those in which it is rightly absent
    assert metric.each(items[1], "said")["j_segmented"] == pytest.approx((30 / 60 + 30 / 60) / 2)
    with pytest.raises(ValueError, match="must hold masks of every answer; got none of a_2"):
        metric.each(items[1], "something else")
    with pytest.raises(ValueError, match="masks must be a file of JSON lines"):
        segmenters.recorded(tmp_path / "none")
    path.write_text(line(items[0], {"1": {0: np.ones((4, 4), bool)}}))
    with pytest.raises(ValueError, match=r"masks must have the video's size, \(32, 48\); got \(4, 4\)"):
        metrics.tracks_with(segmenters.recorded(path)).each(items[0], "x")


class Predictor:
    """In place of SAM 2: gives the true mask of the object that a point is on, from there on."""

    def __init__(self):
        self.calls, self.points = [], {}

    @classmethod
    def from_pretrained(cls, model):
        cls.made = cls()
        cls.made.model = model
        return cls.made

    def init_state(self, video_path):
        import pathlib

        from PIL import Image
        names = sorted(pathlib.Path(video_path).iterdir())
        assert [one.name for one in names[:2]] == ["00000.jpg", "00001.jpg"]
        assert Image.open(names[0]).size == (files.WIDTH, files.HEIGHT)
        self.points = {}
        return {"frames": len(names)}

    def add_new_points_or_box(self, *, inference_state, frame_idx, obj_id, points, labels, clear_old_points):
        assert points.shape == (1, 2) and labels.tolist() == [1] and clear_old_points
        self.points[obj_id] = points[0]

    def propagate_in_video(self, state, start_frame_idx, max_frame_num_to_track, reverse=False):
        self.calls.append((start_frame_idx, max_frame_num_to_track, reverse))
        frames = range(start_frame_idx, start_frame_idx + max_frame_num_to_track + 1)
        if reverse:
            frames = range(start_frame_idx, start_frame_idx - max_frame_num_to_track - 1, -1)
        for frame in frames:
            assert 0 <= frame < state["frames"]
            logits = [np.where(self.mask(point, frame), 5.0, -5.0)[None] for point in self.points.values()]
            yield frame, list(self.points), logits

    def mask(self, point, frame):
        x, y = map(round, map(float, point))
        return next((mask[frame] for mask in true_masks().values() if frame in mask and mask[frame][y, x]),
                    np.zeros((files.HEIGHT, files.WIDTH), bool))


@pytest.fixture
def installed(monkeypatch):
    module = types_lib.ModuleType("sam2")
    module.sam2_video_predictor = types_lib.SimpleNamespace(SAM2VideoPredictor=Predictor)
    monkeypatch.setitem(sys.modules, "sam2", module)
    monkeypatch.setitem(sys.modules, "sam2.sam2_video_predictor", module.sam2_video_predictor)


def test_points_prompt_sam_2_up_to_the_next_and_its_masks_are_recorded(read, tmp_path, installed):
    benchmark, items, _ = read(NAME)
    path, item = tmp_path / "out/masks.jsonl", items[0]
    metric = metrics.tracks_with(segmenters.sam2("some/model", path))
    answer = item.reference.replace('coords="0.0', 'coords="').replace('coords=" 1 250 375;', 'coords="')
    assert '"1.0 1 250 375;' in answer   # the first point is at one second
    found = metric.each(item, answer)
    assert found["jf_segmented"] == pytest.approx(1)
    sam2 = Predictor.made
    assert sam2.model == "some/model" and sam2.calls[0] == (6, 5, False) and sam2.calls[-1] == (6, 6, True)
    assert len(sam2.calls) == 10   # nine points, and back from the first
    again = metrics.tracks_with(segmenters.sam2("some/model", path)).each(item, answer)
    assert again == found and not Predictor.made.calls
    assert metrics.tracks_with(segmenters.recorded(path)).each(item, answer) == found


def test_an_answer_without_points_has_no_masks(read, installed):
    benchmark, items, _ = read(NAME)
    found = metrics.tracks_with(segmenters.sam2("some/model")).each(items[0], "There are none.")
    assert found["jf_segmented"] == 0 and not Predictor.made.calls


def test_without_sam_2_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sam2", None)
    with pytest.raises(ValueError, match="pip install sam2"):
        segmenters.sam2(segmenters.MODEL)
