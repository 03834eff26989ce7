import dataclasses
import json

import numpy as np
import pytest

from data_pipelines import annotations
from data_pipelines import masks
from data_pipelines import sources
from data_pipelines.world import asker as asker_lib
from data_pipelines.world import config as world_config
from data_pipelines.world import sample as world_sample
from data_pipelines.world import scene as scene_lib
from data_pipelines.world import write as world_write
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import video

FULL = dataclasses.replace(
    world_config.full_world(),
    frame_side=(64, 96),
    duration=(1.0, 2.5),
    vfr_share=0.3,
    image_share=0.25,
    image_set_share=0.2,
    absent_share=0.5,
    branches=(4, 8),
)
COLOUR_ERROR = 40  # of 255; measured: at most 22, from the tint (12) and chroma at quarter resolution


def write(folder, config=FULL, number=60, split="heldout", **how):
    return world_write.write(folder, config, 7, number, split, progress=False, **how)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("world"))
    return sources.examples(path.parent), [json.loads(line) for line in open(path)]


def objects_and_times(record):
    """Yields (annotation, object id, point) of every point of a record that is not hidden."""
    for annotation in record["annotations"]:
        for point in annotation.get("points", ()):
            yield annotation, point["id"], point
        for track in annotation.get("tracks", ()):
            for point in track["points"]:
                if not point.get("occluded"):
                    yield annotation, track["id"], point


def mask_at(record, identity, point):
    found = [
        mask
        for mask in record["masks"]
        if mask["id"] == identity
        and mask.get("time") == point.get("time")
        and mask.get("image", 1) == point.get("image", 1)
    ]
    assert len(found) == 1
    return masks.decode(found[0])


def test_the_folder_reads_as_user_data_and_holds_videos_stills_and_image_sets(world):
    examples, _ = world
    kinds = {"video" if example.video else min(len(example.images), 2) for example in examples}
    assert kinds == {"video", 1, 2}
    types = {annotation.type for example in examples for annotation in example.annotations}
    assert types == set(asker_lib.ANNOTATION_KINDS)


def test_every_point_is_inside_the_visible_mask_of_its_object(world):
    seen = 0
    for record in world[1]:
        for _, identity, point in objects_and_times(record):
            assert mask_at(record, identity, point)[round(point["y"]), round(point["x"])]
            seen += 1
    assert seen > 100


def test_decoded_pixels_at_points_have_the_colour_of_the_label(world):
    checked = 0
    for example, record in zip(*world, strict=True):
        frames = video.read(example.video, max_frames=128) if example.video else None
        for annotation, _, point in objects_and_times(record):
            colour = scene_lib.COLOURS.get(annotation["label"].split()[0])
            if colour is None:
                continue
            if frames:
                shown = frames.pixels[np.abs(frames.seconds - point["time"]).argmin()]
            else:
                shown = pixels_lib.load(example.images[point.get("image", 1) - 1])
            pixel = shown[round(point["y"]), round(point["x"])].astype(int)
            inner = mask_at(
                record, annotation["tracks"][0]["id"] if "tracks" in annotation else point["id"], point
            )
            row, column = round(point["y"]), round(point["x"])
            near = 3 if frames else 1  # edges are anti-aliased, and video stores colour at half resolution
            if not inner[max(row - near, 0):row + near + 1, max(column - near, 0):column + near + 1].all():
                continue
            assert np.abs(pixel - colour).max() <= COLOUR_ERROR
            checked += 1
    assert checked > 40


def test_annotated_times_are_those_at_which_the_video_is_sampled(world):
    tracked = 0
    for example, record in zip(*world, strict=True):
        if example.video is None:
            continue
        shown = video.sample_seconds(video.index(example.video).duration, 128)
        for mask in record["masks"]:
            assert np.abs(shown - mask["time"]).min() < 1e-4
        for annotation in record["annotations"]:
            for track in annotation.get("tracks", ()):
                times = [point["time"] for point in track["points"]]
                tracked += 1
                if len(times) == len(shown):
                    np.testing.assert_allclose(times, shown, atol=1e-4)
    assert tracked > 5


def test_a_tracked_object_is_hidden_exactly_where_it_has_no_mask(world):
    hidden = 0
    for record in world[1]:
        with_mask = {(mask["id"], mask.get("time")) for mask in record["masks"]}
        for annotation in record["annotations"]:
            for track in annotation.get("tracks", ()):
                for point in track["points"]:
                    assert point.get("occluded", False) == ((track["id"], point["time"]) not in with_mask)
                    hidden += point.get("occluded", False)
    assert hidden > 0


def test_points_tracks_and_counts_of_the_same_phrase_agree(world):
    compared = 0
    for record in world[1]:
        counts = {}
        for annotation in record["annotations"]:
            number = annotation.get("count", len(annotation.get("points", annotation.get("tracks", ()))))
            if annotation["type"] in ("points", "tracks", "count"):
                compared += annotation["label"] in counts
                assert counts.setdefault(annotation["label"], number) == number
    assert compared > 10


def test_some_questions_ask_for_absent_objects(world):
    assert any(isinstance(one, annotations.Points) and not one.points
               for example in world[0] for one in example.annotations)


def test_the_right_option_of_a_multiple_choice_is_true_of_the_scene(world):
    asked = 0
    for example in world[0]:
        named = {
            a.label
            for a in example.annotations
            if isinstance(a, (annotations.Points, annotations.Tracks))
            and (a.points if isinstance(a, annotations.Points) else a.tracks)
            and a.label.split()[0] in scene_lib.COLOURS
        }
        for annotation in example.annotations:
            is_choice = isinstance(annotation, annotations.Choice)
            if is_choice and annotation.question.startswith("What color is the "):
                kind = annotation.question.removeprefix("What color is the ").rstrip("?")
                matching = {phrase.split()[0] for phrase in named if phrase.endswith(kind)}
                assert matching <= {annotation.options[annotation.answer]}
                asked += len(matching)
    assert asked > 0


def test_an_example_depends_on_seed_split_and_index_alone(tmp_path):
    first = write(tmp_path / "first", number=6)
    second = write(tmp_path / "second", number=9, workers=2)
    assert second.read_text().startswith(first.read_text())
    for media in (first.parent / "media").iterdir():
        assert media.read_bytes() == (second.parent / "media" / media.name).read_bytes()


def test_train_and_held_out_examples_of_one_seed_differ(tmp_path):
    train = write(tmp_path, number=6, split="train", has_masks=True).read_text().splitlines()
    held_out = write(tmp_path, number=6, split="heldout").read_text().splitlines()
    assert not set(train) & set(held_out)
    stills = [
        {path.read_bytes() for path in (tmp_path / split / "media").iterdir()}
        for split in ("train", "heldout")
    ]
    assert not stills[0] & stills[1]


def test_training_files_carry_no_masks(tmp_path):
    assert "masks" not in json.loads(write(tmp_path, number=1, split="train").read_text())


def test_a_complete_folder_is_kept_and_a_foreign_one_is_refused(tmp_path):
    path = write(tmp_path, number=2)
    before = path.stat().st_mtime_ns
    assert write(tmp_path, number=2).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="remove it or name another; .* num_examples is 2, not 3$"):
        write(tmp_path, number=3, replace=False)
    assert len(write(tmp_path, number=3).read_text().splitlines()) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not to be overwritten")
    with pytest.raises(ValueError, match="must be empty or written by this function"):
        write(tmp_path, split="mine")


def test_quickstart_objects_never_touch_and_never_leave():
    config = world_config.quickstart_world()
    rng = np.random.default_rng(0)
    for _ in range(20):
        times = np.arange(24) / 10
        scene = world_sample.sample_scene(rng, config, times, 2.4, (128, 96))
        for frame in range(0, 24, 6):
            _, share = scene_lib.owners(scene, frame)
            assert (share == 1).all()
        radii = [shape.radius / 96 for shape in scene.shapes]
        assert config.radius[0] <= min(radii) and max(radii) <= config.radius[1]
        assert len({shape.colour for shape in scene.shapes}) == len(scene.shapes)


@pytest.mark.parametrize(
    "rates, expected", [((), (0.5, 0.5)), ((3.0, 1.0), (0.75, 0.25)), ((0.0, 1.0), (0, 1))])
def test_numbers_of_objects_are_drawn_at_their_rates(rates, expected):
    config = dataclasses.replace(world_config.quickstart_world(), objects=(1, 2), object_rates=rates)
    rng = np.random.default_rng(1)
    numbers = [len(world_sample.sample_scene(rng, config, np.zeros(1), 0.0, (96, 120)).shapes)
               for _ in range(200)]
    # four standard deviations of a share of 200 draws
    np.testing.assert_allclose(np.bincount(numbers, minlength=3)[1:] / 200, expected, atol=0.14)


def test_full_worlds_hide_objects_and_let_them_enter_and_leave():
    config, rng = world_config.full_world(), np.random.default_rng(2)
    partly, gone = 0, 0
    for _ in range(30):
        scene = world_sample.sample_scene(rng, config, np.arange(40) / 10, 4.0, (128, 128))
        observation = asker_lib.observe(scene, asker_lib.grid(4.0))
        assert (observation.share[:-1].max(axis=0) >= asker_lib.WELL_SHARE).all()
        partly += ((observation.share > 0) & (observation.share < 0.9)).any()
        gone += (~observation.visible).any()
    assert partly >= 10 and gone >= 3


@pytest.mark.parametrize(
    "duration, expected", [(2.0, [0, 0.5, 1.0, 1.5, 2.0]), (1.2, [0, 0.5, 1.0, 1.2]), (0.4, [0, 0.4])]
)
def test_the_grid_is_every_half_second_and_the_end(duration, expected):
    np.testing.assert_allclose(asker_lib.grid(duration), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"objects": (3, 1)}, "objects must be a range"),
        ({"objects": (0, 1)}, "objects must be >= 1"),
        ({"object_rates": (1.0, 2.0)}, "object_rates must give a rate"),
        ({"objects": (1, 2), "object_rates": (0.0, 0.0)}, "object_rates must give a rate"),
        ({"radius": (0.1, 0.5)}, "radius must be"),
        ({"kinds": ("blob",)}, "kinds must be some of"),
        ({"annotations": (("points", 0.0),)}, "annotations must give rates"),
        ({"unique": "colour", "colours": ("red",)}, "objects must not exceed the different colours"),
        ({"duration": (0.1, 2.0)}, "duration must be >= 0.5"),
        ({"lattice": 0.3}, "lattice must be in"),
        ({"point_time": "last"}, "point_time must be"),
    ],
)
def test_an_impossible_world_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(world_config.full_world(), **change)


def test_an_overcrowded_world_is_refused_instead_of_searched_forever():
    config = dataclasses.replace(world_config.quickstart_world(), objects=(6, 6), object_rates=(),
                                 unique="none", radius=(0.3, 0.35))
    with pytest.raises(ValueError, match="must leave room"):
        world_sample.sample_scene(np.random.default_rng(0), config, np.zeros(1), 0.0, (64, 64))


def test_masks_encoded_as_run_lengths_decode_to_themselves():
    rng = np.random.default_rng(0)
    for mask in (rng.random((5, 7)) < 0.5, np.ones((3, 2), bool), np.zeros((3, 2), bool)):
        np.testing.assert_array_equal(masks.decode(masks.encode(mask)), mask)
    assert masks.encode(np.array([[0, 1], [1, 1]], bool)) == {"size": [2, 2], "counts": [1, 3]}
    with pytest.raises(ValueError, match="sum to height x width = 4"):
        masks.decode({"size": [2, 2], "counts": [1, 2]})


def test_objects_on_a_lattice_rest_on_it_at_every_sampled_time(tmp_path):
    world = dataclasses.replace(
        world_config.quickstart_world(), image_share=0.0, image_set_share=0.0, annotations=(("tracks", 1.0),)
    )
    path = world_write.write(tmp_path, world, seed=3, num_examples=6, split="train", progress=False)
    seen = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        for annotation in record["annotations"]:
            for track in annotation["tracks"]:
                for point in track["points"]:
                    width, height = record["size"]
                    seen.append((point["x"] / width * 10, point["y"] / height * 10))
    assert len(seen) > 20 and len(set(map(tuple, np.round(seen)))) > 5
    np.testing.assert_allclose(seen, np.round(seen), atol=0.01)


def test_on_a_lattice_some_objects_cross_the_border_and_the_others_turn_round():
    config = dataclasses.replace(world_config.full_world(), objects=(1, 1), speed=(0.1, 0.2))
    times, rng = np.arange(40) / 10, np.random.default_rng(0)
    for leave_share, is_gone in ((1.0, True), (0.0, False)):
        world, gone = dataclasses.replace(config, leave_share=leave_share), 0
        for _ in range(12):
            centres = world_sample.sample_scene(rng, world, times, 4.0, (100, 100)).shapes[0].centres
            at_rest = centres[::5] / 10
            np.testing.assert_allclose(at_rest, np.round(at_rest), atol=1e-9)
            gone += (centres < 0).any() or (centres > 99).any()
        assert (gone > 3) == is_gone and (is_gone or gone == 0)
