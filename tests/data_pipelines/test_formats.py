import string

import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import records
from data_pipelines.formats import templates
from molmo2_jax import types
from molmo2_jax.inputs import points

HALF_SECONDS = np.append(np.arange(6) / 2, 2.9)


def frames(seconds=HALF_SECONDS, width=640, height=480):
    return types.Media(
        sizes=((width, height),),
        seconds=np.asarray(seconds, float),
        duration=float(seconds[-1]),
        fps=30.0,
    )


def stills(*sizes):
    return types.Media(sizes=sizes)


@pytest.fixture
def parse(tmp_path):
    for name in ("v.mp4", "a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"x")

    def parsed(*annotations, images=None, **fields):
        media = {"images": images} if images else {"video": "v.mp4"}
        return records.parse_record(
            {**media, "annotations": list(annotations), **fields}, tmp_path, key="f:1"
        )

    return parsed


def turns(example, media=None, seed=0, train=False, **how):
    branches = formats.to_branches(
        example,
        media=frames() if media is None else media,
        rng=np.random.default_rng(seed),
        asking=formats.Asking(train=train, **how),
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
        media=sparse,
        rng=np.random.default_rng(0),
        asking=formats.PLAIN,
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
    [(question, answer)] = turns(parse(image_points(1), images=["a.png"]), stills((100, 100)))
    assert question == "Point to the mug."
    assert answer == '<points coords="1 1 100 200">mug</points>'


def test_each_image_of_a_set_has_its_own_size(parse):
    [(question, answer)] = turns(
        parse(image_points(2, 1), images=["a.png", "b.png"]), stills((100, 100), (40, 40))
    )
    assert question == "In all images, point to the Mug."
    assert answer == '<points coords="1 1 100 200;2 2 500 500">Mug</points>'


def test_training_asks_about_some_images_and_answers_for_those_alone(parse):
    example = parse(image_points(3, 1, 2, mode="point_count"), images=["a.png", "b.png", "c.png"])
    selections = set()
    for seed in range(150):
        [(question, answer)] = turns(example, stills(*[(100, 100)] * 3), seed, train=True, num_templates=1)
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
        media=frames(),
        rng=np.random.default_rng(0),
        asking=formats.PLAIN,
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
        example, media=frames(), rng=np.random.default_rng(0), asking=formats.Asking()
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
        parse(caption, images=["a.png"]),
        media=stills((9, 9)),
        rng=np.random.default_rng(0),
        asking=formats.Asking(),
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
    with pytest.raises(ValueError, match="f:1: media must match the record: a video"):
        turns(parse(video_points(0.0)), stills((640, 480)))
    with pytest.raises(ValueError, match="one size for each of its 1 images"):
        turns(parse(image_points(1), images=["a.png"]), stills((9, 9), (9, 9)))


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


def test_every_family_of_templates_is_listed_once():
    listed = {**templates.FAMILIES, **templates.PUBLISHED}
    assert len(listed) == len(templates.FAMILIES) + len(templates.PUBLISHED)
    tables = {"FAMILIES", "PUBLISHED"}
    assert listed == {name: value for name, value in vars(templates).items()
                      if name.isupper() and name not in tables}


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
    families = templates.FAMILIES
    for name, family in families.items():
        required = {"label", "selection"} if name.startswith("MULTI") else needed.get(name, {"label"})
        assert len(set(family)) == len(family) >= 3
        for template in family:
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field}
            assert required <= fields <= required | {"medium"}
    everything = [template for family in families.values() for template in family]
    assert len(set(everything)) == len(everything)


def test_pretraining_asks_by_style_and_label_and_says_how_long_the_answer_is(parse):
    caption, chat = {"type": "caption", "text": "t" * 900}, {"type": "chat", "turns": ["Hi", "a" * 150]}
    example = parse(image_points(1), image_points(1, mode="point_count"),
                    image_points(1, style="cosyn_point"), caption, {**caption, "style": "transcript"}, chat,
                    images=["a.png"])
    asked = [turns(example, stills((100, 100)), seed, train=True, is_pretraining=True) for seed in range(60)]
    assert {tuple(question for question, _ in branches[:3]) for branches in asked} == {
        ("pointing: mug", "point_count: mug", "cosyn_point: mug")}
    for place, style in ((3, "long_caption"), (4, "transcript")):
        lengths = [branches[place][0].removeprefix(style).rstrip(":") for branches in asked]
        told = [int(length) for length in lengths if length]
        assert 40 <= len(told) < 60 and all(50 <= length <= 70 for length in told) and len(set(told)) > 3
    assert {branches[5][0][-4:] for branches in asked} == {": Hi"}
    plain = turns(example, stills((100, 100)), is_pretraining=True)
    assert plain[3][0] == "long_caption 65:" and plain[5][0] == "text_sft 65: Hi"


def test_pretraining_weighs_every_answer_token_alike(parse):
    weights = formats.Weights(pointing=1, video_captions=1, by_length=False, by_branches=False)
    example = parse(video_points(0.0), {"type": "caption", "text": "t"},
                    {"type": "qa", "question": "q", "answer": "a"})
    branches = formats.to_branches(example, media=frames(), rng=np.random.default_rng(0),
                                   asking=formats.Asking(weights=weights))
    flat = types.LossWeight(scale=1, by_length=False, by_branches=False)
    assert [branch.weight for branch in branches] == [flat] * 3


def test_captions_of_moments_and_of_parts_name_their_times(parse):
    clip = {"type": "caption", "text": "t", "start": 8.0, "end": 9.25}
    example = parse({"type": "caption", "text": "t", "time": 7.5}, clip,
                    {**clip, "style": "video_clip_transcript_start_end"}, clip=[7, 9.9])
    assert [question for question, _ in turns(example)] == [
        "Describe the frame at 0.5 seconds.", "Describe the video from 1.0 seconds to 2.2 seconds.",
        "Transcribe what is said from 1.0 seconds to 2.2 seconds."]
    asked = {question for seed in range(60) for question, _ in turns(example, seed=seed, train=True)[:2]}
    assert any("00:00:00.5" in question for question in asked)
    assert any("from 00:00:01.0" in question for question in asked)
    assert any("0.5 seconds" in question for question in asked)
    [(long, _)] = turns(parse({"type": "caption", "text": "t", "time": 3725.25}), frames([0.0, 9e9]), 5,
                        train=True)
    assert "01:02:05.2" in long or "3725.2 seconds" in long


def test_captions_of_motion_and_of_an_object_stand_behind_their_style(parse):
    example = parse({"type": "caption", "text": "t", "style": "video_motion_caption"},
                    {"type": "caption", "text": "t", "object": "red ball"},
                    {"type": "caption", "text": "t", "style": "video_merged_caption"})
    assert [question for question, _ in turns(example)] == [
        "video_motion_caption: Describe the motion in this video.",
        "video_object_caption: Describe the red ball in this video.", "video_merged_caption:"]


def test_each_use_draws_one_of_several_questions_or_captions(parse):
    example = parse({"type": "qa", "question": ["q{1}", "q2"], "answer": "a"},
                    {"type": "caption", "text": ["one", "two"]},
                    {"type": "qa", "question": "q{}?", "answer": "a", "style": "video_short_answer"})
    drawn = [turns(example, seed=seed, train=True) for seed in range(40)]
    assert {branches[0][0] for branches in drawn} == {"q{1}", "q2"}
    assert {branches[1][1] for branches in drawn} == {"one", "two"}
    short = {branches[2][0] for branches in drawn}
    assert len(short) > 5
    assert all(text.startswith("video_short_answer: ") and "q{}?" in text for text in short)
    plain = turns(example)
    assert [plain[0][0], plain[1][1], plain[2][0]] == ["q{1}", "one", "video_short_answer: q{}?"]


def test_points_may_have_a_prompt_for_each_mode(parse):
    example = parse(video_points(0.5, mode=["bare", "count"], prompt={"count": "How many red cars?"}))
    pairs = {turns(example, seed=seed, train=True, num_templates=1)[0] for seed in range(20)}
    assert {(question, answer[:1]) for question, answer in pairs} == {
        ("Point to the Red Cars.", "<"), ("How many red cars?", "1")}


def test_some_uses_of_points_may_have_one_of_several_prompts(parse):
    example = parse(video_points(0.5, prompt=["Cars?", "Click a car"], prompt_share=0.5))
    asked = [turns(example, seed=seed, train=True, num_templates=1)[0][0] for seed in range(60)]
    assert set(asked) == {"Cars?", "Click a car", "Point to the Red Cars."}
    assert 15 < asked.count("Point to the Red Cars.") < 45
    assert turns(example)[0][0] == "Cars?"   # outside training the first one
    always = parse(video_points(0.5, prompt=["Cars?", "Click a car"]))
    assert {turns(always, seed=seed, train=True)[0][0] for seed in range(20)} == {"Cars?", "Click a car"}


def test_a_prompt_keeps_the_prefix_of_its_style(parse):
    [(question, _)] = turns(parse(tracks(CAT, mode="start_end", prompt="ends?")))
    assert question == "video_point_ground_start_end: ends?"


def test_options_of_a_diagram_with_letters_of_its_own_carry_none(parse):
    example = parse({"type": "choice", "question": "Which?", "options": ["B", "A", "C"], "answer": 0,
                     "labelled": False})
    assert turns(example) == [("Which?\nOnly return the correct answer option.\nB\nA\nC", "B")]
    assert {turns(example, seed=seed, train=True)[0][1] for seed in range(40)} == {"B"}


def test_annotations_may_be_turns_of_one_conversation_at_some_uses(parse):
    example = parse(video_points(0.0), {"type": "qa", "question": "q", "answer": "a", "style": "vqa2"},
                    dialogue=0.25)
    drawn = [turns(example, seed=seed, train=True, num_templates=1) for seed in range(200)]
    joined = [branches[0] for branches in drawn if len(branches) == 1]
    assert 30 <= len(joined) <= 70
    points_first = ("Point to the Red Cars.", '<points coords="0.0 1 100 200">Red Cars</points>')
    assert set(joined) == {(*points_first, "q", "a")}
    assert len(turns(example)) == 2 and turns(example)[1][0] == "vqa2: q"
    made = formats.format_example(example, media=frames(), rng=np.random.default_rng(4),
                                  asking=formats.Asking())
    weights = [branch.weight.scale for branch in made.branches]
    assert (weights, made.annotations) in (([0.2, 1.0], (0, 1)), ([0.2], (0,)))


def test_templates_of_published_data_differ_and_hold_what_they_must():
    needed = {"SHORT_ANSWER": {"question"}, "OBJECT_CAPTION": {"object"}, "FRAME_CAPTION": {"time"},
              "CLIP_CAPTION": {"start", "end"}, "CLIP_TRANSCRIPT": {"start", "end"}}
    for name, family in templates.PUBLISHED.items():
        required = needed.get(name, set())
        assert len(set(family)) == len(family) >= 3
        for template in family:
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field}
            assert required <= fields <= required | {"medium"}
