import string

import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import sources
from data_pipelines.formats import templates
from molmo2_jax import types
from molmo2_jax.inputs import points

HALF_SECONDS = np.append(np.arange(6) / 2, 2.9)


def frames(seconds=HALF_SECONDS, width=640, height=480):
    return types.Frames(
        pixels=np.zeros((len(seconds), 1, 1, 3), np.uint8),
        seconds=np.asarray(seconds, float),
        width=width,
        height=height,
        duration=float(seconds[-1]),
        fps=30.0,
    )


@pytest.fixture
def parse(tmp_path):
    for name in ("v.mp4", "a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"x")

    def parsed(*annotations, images=None, **fields):
        media = {"images": images} if images else {"video": "v.mp4"}
        return sources.parse_record(
            {**media, "annotations": list(annotations), **fields}, tmp_path, key="f:1"
        )

    return parsed


def turns(example, media=None, seed=0, train=False, **how):
    branches = formats.to_branches(
        example,
        frames_or_sizes=frames() if media is None else media,
        rng=np.random.default_rng(seed),
        train=train,
        **how,
    )
    return [branch.turns for branch in branches]


def video_points(*times, **fields):
    return {
        "type": "points",
        "label": "Red Cars",
        **fields,
        "points": [{"time": time, "x": 64, "y": 96} for time in times],
    }


def image_points(*images, **fields):
    return {
        "type": "points",
        "label": "Mug",
        **fields,
        "points": [{"image": image, "x": 10 * image, "y": 20} for image in images],
    }


@pytest.mark.parametrize(
    "time, shown",
    [
        (0.5, "0.5"),  # on the grid
        (0.99, "0.5"),  # floored to the grid
        (2.9, "2.9"),  # the last frame
        (2.6, "2.5"),
    ],
)
def test_a_video_point_belongs_to_a_frame_that_is_shown(parse, time, shown):
    [(_, answer)] = turns(parse(video_points(time)))
    assert answer == f'<points coords="{shown} 1 100 200">Red Cars</points>'


def test_a_video_point_moves_to_the_nearest_frame_of_a_sparse_sampling_but_not_far(parse):
    sparse = frames([0.0, 1.2, 2.4])
    assert '"1.2 1 ' in turns(parse(video_points(1.0)), sparse)[0][1]
    made = formats.format_example(
        parse(video_points(0.0), video_points(0.0, 1.7)),
        frames_or_sizes=sparse,
        rng=np.random.default_rng(0),
        train=False,
    )
    assert (made.annotations, made.dropped, len(made.branches)) == ((0,), (1,), 1)


def test_points_of_a_clip_count_from_its_start(parse):
    [(_, answer)] = turns(parse(video_points(7.5), clip=[7, 9.9]))
    assert answer.startswith('<points coords="0.5 1 ')


@pytest.mark.parametrize(
    "mode, answer",
    [
        ("bare", '<points coords="0.5 1 100 200;1.0 2 100 200">Red Cars</points>'),
        (
            "point_count",
            'Counting the <points coords="0.5 1 100 200;1.0 2 100 200">Red Cars</points> shows a total '
            "of 2.",
        ),
        ("count_point", 'There are 2 <points coords="0.5 1 100 200;1.0 2 100 200">Red Cars</points>.'),
        ("count", "2"),
    ],
)
def test_each_mode_has_its_sentence_and_one_for_none(parse, mode, answer):
    assert turns(parse(video_points(1.0, 0.5, mode=mode)))[0][1] == answer
    assert turns(parse(video_points(mode=mode)))[0][1] == "There are none."


def test_labels_of_single_images_are_lower_case_in_question_and_answer(parse):
    [(question, answer)] = turns(parse(image_points(1), images=["a.png"]), [(100, 100)])
    assert question == "Point to the mug."
    assert answer == '<points coords="1 1 100 200">mug</points>'


def test_each_image_of_a_set_has_its_own_size(parse):
    [(question, answer)] = turns(
        parse(image_points(2, 1), images=["a.png", "b.png"]), [(100, 100), (40, 40)]
    )
    assert question == "In all images, point to the Mug."
    assert answer == '<points coords="1 1 100 200;2 2 500 500">Mug</points>'


def test_training_asks_about_some_images_and_answers_for_those_alone(parse):
    example = parse(image_points(3, 1, 2, mode="point_count"), images=["a.png", "b.png", "c.png"])
    selections = set()
    for seed in range(150):
        [(question, answer)] = turns(example, [(100, 100)] * 3, seed, train=True, num_templates=1)
        named = [n for n in (1, 2, 3) if f"image_{n}" in question] or [1, 2, 3]
        assert ("all images" in question) == (len(named) == 3)
        assert [point.index for point in points.parse_points(answer, 100, 100)] == named
        assert points.read_count(answer) == len(named)
        selections.add(tuple(named))
    assert len(selections) == 7


def track(identity, *rows):
    return {
        "id": identity,
        "points": [
            {"time": time, "x": x, "y": y, **({"occluded": True} if hidden else {})}
            for time, x, y, hidden in rows
        ],
    }


CAT = track(5, *((k / 2, 10.0 * (k + 1), 20, k == 3) for k in range(6)))


def tracks(*tracks, **fields):
    return {"type": "tracks", "label": "cat", "scale": 100, "tracks": list(tracks), **fields}


def test_tracks_keep_the_annotated_times_that_are_shown(parse):
    dense = track(1, *((k / 6, 50, 50, False) for k in range(18)))
    [(_, answer)] = turns(parse(tracks(dense)))
    assert answer == (
        '<tracks coords="0.0 1 500 500;0.5 1 500 500;1.0 1 500 500;1.5 1 500 500;2.0 1 500 500;'
        '2.5 1 500 500">cat</tracks>'
    )
    [(question, answer)] = turns(parse(tracks(dense, fps=1)))
    assert question == "Track the cat at 1 FPS."
    assert answer == '<tracks coords="0.0 1 500 500;1.0 1 500 500;2.0 1 500 500">cat</tracks>'


def test_hidden_objects_are_left_out_and_tracks_with_nothing_left_are_dropped(parse):
    [(_, answer)] = turns(parse(tracks(CAT)))
    assert answer == (
        '<tracks coords="0.0 1 100 200;0.5 1 200 200;1.0 1 300 200;2.0 1 500 200;2.5 1 600 200">'
        "cat</tracks>"
    )
    unseen = tracks(track(1, (0.3, 1, 1, False)))
    hidden = tracks(track(1, (0.5, 1, 1, True)))
    never_visible = tracks(track(1, (0.5, 1, 1, True)), mode="single_point")
    made = formats.format_example(
        parse(unseen, hidden, never_visible, tracks(CAT)),
        frames_or_sizes=frames(),
        rng=np.random.default_rng(0),
        train=False,
    )
    assert (made.annotations, made.dropped) == ((3,), (0, 1, 2))
    assert turns(parse(tracks()))[0][1] == "There are none."


def test_start_and_end_of_tracks(parse):
    [(question, answer)] = turns(parse(tracks(CAT, mode="start_end")))
    assert question.startswith("video_point_ground_start_end: ")
    assert answer == '<tracks coords="0.0 1 100 200;2.5 1 600 200">cat</tracks>'


def test_single_point_tracking_continues_after_the_point_in_the_question(parse):
    example = parse(tracks(CAT, mode="single_point"))
    starts = set()
    for seed in range(60):
        asked = turns(example, seed=seed, train=True)
        if not asked:
            continue  # it started where the track ends
        [(question, answer)] = asked
        [start] = points.parse_points(question, 100, 100)
        later = points.parse_points(answer, 100, 100)
        assert question.startswith("video_single_point_track_per_frame: ")
        assert [point.index for point in later] == [t for t in (0.5, 1.0, 2.0, 2.5) if t > start.index]
        starts.add(start.index)
    assert 0.0 in starts and len(starts) > 1


def test_two_per_second_is_the_rate_of_questions_that_name_none(parse):
    questions = [turns(parse(tracks(CAT)), seed=seed, train=True)[0][0] for seed in range(60)]
    silent = [question for question in questions if "2" not in question]
    assert 15 <= len(silent) <= 45
    assert all("1" in turns(parse(tracks(CAT, fps=1)), seed=seed, train=True)[0][0] for seed in range(20))


def test_default_weights_are_those_of_the_recipe(parse):
    caption, question = {"type": "caption", "text": "t"}, {"type": "qa", "question": "q", "answer": "a"}
    count = {"type": "count", "label": "x", "count": 2}
    example = parse(video_points(0.0), tracks(CAT), caption, question, count, {**question, "weight": 3})
    branches = formats.to_branches(
        example, frames_or_sizes=frames(), rng=np.random.default_rng(0), train=True
    )
    flat = [(b.weight.scale, b.weight.by_length, b.weight.by_branches) for b in branches]
    assert flat == [
        (0.2, False, False),
        (0.2, False, False),
        (0.1, False, False),
        (1.0, True, True),
        (1.0, True, True),
        (3.0, True, True),
    ]
    [still] = formats.to_branches(
        parse(caption, images=["a.png"]), frames_or_sizes=[(9, 9)], rng=np.random.default_rng(0), train=True
    )
    assert still.weight == types.LossWeight()


def test_a_prompt_takes_the_place_of_the_question(parse):
    example = parse({**video_points(0.0), "prompt": "cars?"}, {**tracks(CAT), "prompt": "follow"})
    assert [turn[0] for turn in turns(example, train=True)] == ["cars?", "follow"]


def test_a_point_outside_the_frame_is_refused_once_the_size_is_known(parse):
    with pytest.raises(
        ValueError,
        match=r"f:1: annotations\[0\]: a point must lie inside the frame of 32 x 32; "
        r"got \(64.0, 96.0\)",
    ):
        turns(parse(video_points(0.0)), frames(width=32, height=32))


def test_a_declared_size_must_be_that_of_the_media(parse):
    with pytest.raises(ValueError, match=r"f:1: .*declared size must be that of the media, \(640, 480\)"):
        turns(parse(video_points(0.0), size=[100, 100]))


def test_media_that_do_not_fit_the_example_are_refused(parse):
    with pytest.raises(ValueError, match="f:1: needs the Frames of its video"):
        turns(parse(video_points(0.0)), [(640, 480)])
    with pytest.raises(ValueError, match="one size for each of its 1 images"):
        turns(parse(image_points(1), images=["a.png"]), [(9, 9), (9, 9)])


def test_everything_random_comes_from_the_generator(parse):
    annotations = (
        video_points(0.0),
        tracks(CAT),
        {"type": "caption", "text": "t"},
        {"type": "choice", "question": "q", "options": ["a", "b"], "answer": 0},
    )
    example = parse(*annotations)
    assert turns(example, seed=3, train=True) == turns(example, seed=3, train=True)
    assert len({str(turns(example, seed=seed, train=True)) for seed in range(20)}) > 10
    assert len({str(turns(example, seed=seed)) for seed in range(20)}) == 1


def test_one_template_per_family_can_be_asked_for(parse):
    questions = {
        turns(parse(video_points(0.0)), seed=seed, train=True, num_templates=1)[0] for seed in range(9)
    }
    assert {question for question, _ in questions} == {"Point to the Red Cars."}
    with pytest.raises(ValueError, match="num_templates must be >= 1; got 0"):
        turns(parse(video_points(0.0)), num_templates=0)


def test_templates_differ_and_hold_what_they_must():
    needed = {
        "POINT": {"label"},
        "COUNT": {"label"},
        "TRACK": {"label"},
        "TRACK_FPS": {"label", "fps"},
        "TRACK_SINGLE": {"start", "fps"},
        "LONG_CAPTION": set(),
        "SHORT_CAPTION": set(),
    }
    families = {name: family for name, family in vars(templates).items() if name.isupper()}
    for name, family in families.items():
        required = {"label", "selection"} if name.startswith("MULTI") else needed.get(name, {"label"})
        assert len(set(family)) == len(family) >= 3
        for template in family:
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field}
            assert required <= fields <= required | {"medium"}
    everything = [template for family in families.values() for template in family]
    assert len(set(everything)) == len(everything)
