import pickle

import numpy as np
import pytest

from data_pipelines import annotations
from data_pipelines import formats
from data_pipelines import sources
from data_pipelines.scoring import suite
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from molmo2_jax import types

VIDEO = annotations.Scope(num_images=0, is_video=True, clip=(2.0, 4.0), sizes=((640, 480),))
STILLS = annotations.Scope(num_images=2, is_video=False, clip=None, sizes=None)


def read(scope=VIDEO, shared=None, **value):
    return annotations.read(value, "one", scope, shared or {})


@pytest.mark.parametrize("table", [annotations._READERS, formats.ASK, suite.SCORES],
                         ids=["_READERS", "formats.ASK", "suite.SCORES"])
def test_every_table_has_a_row_for_every_kind(table):
    kinds = set(annotations.Annotation.__subclasses__())
    assert not {kind.__name__ for kind in kinds - set(table)}, "kinds without a row"
    assert set(table) == kinds == set(annotations.KINDS.values())


def test_kinds_have_names_of_their_own():
    assert len(annotations.KINDS) == len(annotations.Annotation.__subclasses__())
    assert all(kind.type == name for name, kind in annotations.KINDS.items())


def test_reading_fills_in_the_defaults_of_the_record_and_of_the_kind():
    shared = {"weight": 0.5, "scale": 100}
    found = read(type="points", label="cup", points=[{"time": 2.5, "x": 50, "y": 25}], shared=shared)
    assert found == annotations.Points(
        label="cup", points=(annotations.Point(1, 50.0, 25.0, time=0.5),), scale=(100.0, 100.0),
        sizes=((640, 480),), weight=types.LossWeight(scale=0.5))
    assert found.mode == "bare" and found.prompt is found.style is None
    count = read(type="count", label="cup", count=2, shared=shared)
    assert count == annotations.Count(label="cup", count=2, weight=types.LossWeight(scale=0.5))


def test_a_moment_at_the_start_of_the_clip_is_a_time_like_any_other():
    found = read(type="caption", text="t", time=2)
    assert found.time == 0.0 and found.start is found.end is None


def test_points_of_a_track_carry_its_id():
    found = read(type="tracks", label="cup",
                 tracks=[{"id": 7, "points": [{"time": 3, "x": 1, "y": 2, "occluded": True}]}])
    assert found.tracks == (annotations.Track(7, (annotations.Point(7, 1.0, 2.0, time=1.0, occluded=True),)),)


@pytest.mark.parametrize("scale, place", [(None, (0.5, 0.25)), ((100.0, 100.0), (0.2, 0.1))])
def test_relative_places_are_fractions_of_the_scale_or_of_the_image(scale, place):
    point = annotations.Point(1, 20.0, 10.0, image=2)
    asked = annotations.Points(label="cup", points=(point,), scale=scale)
    media = types.Media(sizes=((640, 480), (40, 40)))
    assert annotations.relative(asked, point, media) == pytest.approx(place)


def test_relative_refuses_other_sizes_than_the_declared_ones_and_points_outside():
    point = annotations.Point(1, 20.0, 10.0, time=0.0)
    media = types.Media(sizes=((16, 16),), seconds=np.zeros(1))
    with pytest.raises(ValueError, match=r"inside the frame of 16 x 16; got \(20.0, 10.0\)"):
        annotations.relative(annotations.Points(label="cup", points=(point,)), point, media)
    declared = annotations.Tracks(label="cup", tracks=(), sizes=((640, 480),))
    with pytest.raises(ValueError, match=r"must be that of the media, \(16, 16\); got \(640, 480\)"):
        annotations.relative(declared, point, media)


def test_masks_say_where_they_are_and_decode_to_pixels():
    [mask] = annotations.read_masks([{"id": 3, "image": 2, "size": [2, 3], "counts": [1, 2, 3]}], STILLS)
    assert (mask.id, mask.image, mask.time) == (3, 2, None)
    np.testing.assert_array_equal(mask.decode(), [[0, 1, 0], [1, 0, 0]])


def test_annotations_are_the_same_after_pickling_and_share_the_masks_of_their_record(tmp_path):
    path = world_write.write(tmp_path, world_config.quickstart_world(), 0, 6, "heldout", progress=False)
    examples = sources.examples(path.parent)
    again = pickle.loads(pickle.dumps(examples, pickle.HIGHEST_PROTOCOL))
    assert again == examples
    placed = [[one.masks for one in example.annotations if hasattr(one, "masks")] for example in again]
    assert sum(map(len, placed)) > len(placed)
    assert all(masks is shared[0] for shared in placed for masks in shared)
