"""Rows as the recipe's data sets publish them become records, and these the text the model learns."""

import inspect

import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import schemas
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.schemas import media
from molmo2_jax import types

VIDEO = types.Media(sizes=((640, 480),), seconds=np.arange(7) / 2, duration=3.0, fps=6.0)
A = {"image_sha256": "a", "label": "Mug"}
POINT_ROW = {"video_id": "v", "video_duration": 3.0, "clip_start": None, "clip_end": None, "label": "ball",
             "count": 2, "two_fps_timestamps": [0.5, 1.0],
             "points": [[{"x": 10.0, "y": 20.0}], [{"x": 30.0, "y": 40.0}]]}
TRACK_ROW = {"clip": "v", "fps": 6.0, "sampling_fps": 2, "expression": "players", "width": 640, "height": 480,
             "mask_id": ["m", "k"], "frame_trajectories": [
                 {"frame": 3, "time": 0.5, "points": [{"id": "k", "point": [50, 100], "occluded": False},
                                                      {"id": "m", "point": [110, 300], "occluded": True}]},
                 {"frame": 0, "time": 0.0, "points": [{"id": "k", "point": [600, 100], "occluded": False},
                                                      {"id": "m", "point": [100, 300], "occluded": False}]}]}
TULU = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                     {"role": "assistant", "content": "Hello."}], "category": "chat", "source": "wild",
        "first_message_qwen3_tokens": 5, "empty_messages": False, "has_special_token": False}
CASES = {  # schema, rows, further arguments: the turns of every record, in the wording of evaluation
    "molmo2_cap": ([{"video_id": "v", "annotation_score": 3, "merged_caption": "Long.",
                     "video_caption": "Short.", "video_frame_merged_caption": ""},
                    {"video_id": "v", "annotation_score": 2, "merged_caption": "x", "video_caption": "",
                     "video_frame_merged_caption": ""}], {},
                   [[("video_merged_caption:", "Long."), ("Describe this video in short.", "Short.")]]),
    "pixmo_cap": ([{"image_sha256": "a", "caption": "A mug.", "transcripts": ["I see a mug"]}],
                  {"transcripts": True},
                  [[("Describe this image.", "A mug."), ("transcript:", "I see a mug")]]),
    "video_choice": ([{"video_id": "v", "Question": "What?", "Answer": "a cat", "NegativeAnswers": ["a dog"],
                       "Category": "x", "subtitle": [{"start": 0.0, "end": 1.0, "text": "hi"}]}], {},
                     [[("What?\nOnly return the correct answer option.\nA. a cat\nB. a dog", "A. a cat")]]),
    "human_qa": ([{"video_id": "v", "question": " Who? ", "answer": " Ann "},
                  {"video_id": "v", "question": "Why?", "answer": " "}], {}, [[("Who?", "Ann")]]),
    "ask_model_anything": ([{"image_sha256": "a", "question": "How many mugs?", "answer": "Two."},
                            {"image_sha256": "a", "question": "How many years old?", "answer": "9"}], {},
                           [[("Please do not mark anything. How many mugs?", "Two."),
                             ("How many years old?", "9")]]),
    "cap_qa": ([{"image_sha256": "a", "question": "[USER] What? [ASSISTANT] A mug. [USER] Which colour?",
                 "answer": "Red."}], {}, [[("What?", "A mug.", "Which colour?", "Red.")]]),
    "multi_image_qa": ([{"id": 1, "images": ["media/a.jpg", "media/b.jpg"],
                         "qa_pairs": {"question": ["Same?"], "answer": ["No."]}}], {}, [[("Same?", "No.")]]),
    "cosyn": ([{"id": "a", "qa_pairs": [{"question": "Sum?", "explanation": "1 + 1.", "answer": "2"}]}],
              {"kind": "table"},
              [[("cosyn_table_exp: Sum? Provide reasoning steps and then give the short answer.",
                 "1 + 1. Answer: 2")]]),
    "vqa": ([{"image_id": "a", "message_list": [{"question": "Colour?", "answers": ["red", "blue", "red"]}]}],
            {"style": "okvqa"}, [[("okvqa: Colour?", "red")]]),
    "chart_qa": ([{"image_id": "a", "query": "Max?", "label": ["7"], "human_or_machine": 0}], {},
                 [[("chart_qa: Max?", "7")]]),
    "a_okvqa": ([{"image_id": "a", "question": "What?", "choices": ["cat", "dog"], "correct_choice_idx": 1,
                  "direct_answers": ["dog", "dog", "pet"]}], {},
                [[("What?\nOnly return the correct answer option.\nA. cat\nB. dog", "B. dog"),
                  ("a_okvqa_da: What?", "dog")]]),
    "mantis": ([{"images": ["media/a.jpg", "media/b.jpg"], "mc_question": "Same?", "choices": ["yes", "no"],
                 "correct_choice_idx": 1}, {"images": ["media/a.jpg"], "mc_question": "?", "choices": [],
                                            "correct_choice_idx": 0}], {},
               [[("Same?\nOnly return the correct answer option.\nA. yes\nB. no", "B. no")]]),
    "label": ([{"video_id": "v", "label": "running", "start": 0.5, "end": 2.0}], {},
              [[("kinetics_label: What is happening?", "running")]]),
    "ai2d": ([{"image": "media/a.jpg", "question": "Which?", "answer_texts": ["a", "b"], "correct_answer": 1,
               "abc_label": True, "option_is_abc": [True, True]},
              {"image": "media/a.jpg", "question": "Which?", "answer_texts": ["leaf", "root"],
               "correct_answer": 1, "abc_label": True, "option_is_abc": [False, False]}], {},
             [[("Which?\nOnly return the correct answer option.\nA\nB", "B")],
              [("Which?\nOnly return the correct answer option.\nA. leaf\nB. root", "B. root")]]),
    "science_qa": ([{"image": "media/a.jpg", "question": "Which?", "choices": ["x", "y"], "answer": 0,
                     "hint": "Look."}, {"image": None, "question": "?", "choices": ["x", "y"], "answer": 0}],
                   {}, [[("Look.\nWhich?\nOnly return the correct answer option.\nA. x\nB. y", "A. x")]]),
    "video_qa": ([{"video_id": "v", "question": "Who?", "answer": "Ann"},
                  {"video_id": "v", "question": "How many?", "answer": 2}], {},
                 [[("video_short_answer: Who?", "Ann"), ("video_short_answer: How many?", "2")]]),
    "llava_video": ([{"video": "v.mp4", "conversations": [
        {"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ann"},
        {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here"}]}], {},
        [[("video_short_answer: Who?", "Ann"), ("video_short_answer: Where?", "Here")]]),
    "perception_test": ([{"id": "v", "mc_question": [{"question": "?", "options": ["x", "y", "z"],
                                                      "answer_id": 2}]}], {},
                        [[("?\nOnly return the correct answer option.\nA. x\nB. y\nC. z", "C. z")]]),
    "tgif": ([{"gif_name": "g", "question": "Does?", "answer": "1",
               **{f"a{number}": f"o{number}" for number in range(1, 6)}},
              {"gif_name": "g", "question": "How often?", "answer": "4"}], {},
             [[("Does?\nOnly return the correct answer option.\nA. o1\nB. o2\nC. o3\nD. o4\nE. o5", "B. o2"),
               ("video_short_answer: Does?", "o2"), ("video_short_answer: How often?", "4")]]),
    "tvqa": ([{"vid_name": "v", "q": "Who?", "answer_idx": 0, "ts": "1.0-2.5", "subtitles": [
        {"start": 0.5, "end": 1.5, "text": "hi"}, {"start": 2.5, "end": 3.0, "text": "bye"}],
        **{f"a{number}": f"o{number}" for number in range(5)}},
        {"vid_name": "v", "q": "Who?", "answer_idx": 0, "ts": "nan-nan"}], {},
        [[("Who?\nOnly return the correct answer option.\nA. o0\nB. o1\nC. o2\nD. o3\nE. o4", "A. o0")]]),
    "cinepile": ([{"video_id": "v", "subtitles": "Hi. Bye.", "examples": {
        "question": ["?"], "choices": [["x", "y"]], "answer_key_position": [1]}}], {},
        [[("?\nOnly return the correct answer option.\nA. x\nB. y", "B. y")]]),
    "qv_highlights": ([{"vid": "v", "query": "a dog", "relevant_windows": [[0, 1], [2, 2.5]]},
                       {"vid": "v", "query": "a cat", "relevant_windows": [[0, 1]] * 6}], {},
                      [[("video_short_answer: When does this happen: a dog", "Segments: [0-1], [2-2.5]")]]),
    "activity_net": ([{"id": "v", "subset": "training", "annotations": [
        {"segment": [0.5, 2], "label": "surfing"}, {"segment": [2, 3], "label": "diving"}]},
        {"id": "v", "subset": "validation", "annotations": []}], {},
        [[("activitynet_label: What is happening?", "surfing")],
         [("activitynet_label: What is happening?", "diving")]]),
    "academic_video_point": ([{"subset": "mevis", "video_name": "n", "category": "Cat", "count": 1,
                               "timestamps": [1.0], "points": [[{"x": 10.0, "y": 20.0}]],
                               "video_duration": 9.0, "clip_start_time": 0.25, "clip_end_time": 3.0}], {},
                             [[("How many cat are there in the video?",
                                'Counting the <points coords="0.5 1 100 200">cat</points> shows a total of '
                                "1.")]]),
    "tulu": ([TULU, TULU | {"category": "coding"}, TULU | {"first_message_qwen3_tokens": 9000}], {},
             [[("System: Be brief.\nHi", "Hello.")]]),
    "hardcodes": ([{"questions": ["Who are you?", "Name?"], "response": "Molmo."}], {},
                  [[("Who are you?", "Molmo.")], [("Name?", "Molmo.")]]),
    "pixmo_points": ([A | {"points": [{"x": 50, "y": 101.0}]}, A | {"label": "Cup", "points": []}], {},
                     [[("How many mug are there in the image?",
                        'Counting the <points coords="1 1 500 1000">mug</points> shows a total of 1.'),
                       ("How many cup are there in the image?", "There are none.")],
                      [("Point to the mug.", '<points coords="1 1 500 1000">mug</points>'),
                       ("Point to the cup.", "There are none.")]]),
    "pixmo_count": ([A | {"count": 1, "points": {"x": [320], "y": [48]}}], {},
                    [[("How many mug are there in the image?", 'Counting the <points coords="1 1 500 100">mug'
                       "</points> shows a total of 1.")],
                     [("Point to the mug.", '<points coords="1 1 500 100">mug</points>')]]),
    "cosyn_point": ([{"id": "a", "questions": ["Where is the peak?"], "names": ["Peak"],
                      "answer_points": [{"x": [5.0], "y": [10.0]}]}], {},
                    [[("Where is the peak?", '<points coords="1 1 050 100">peak</points>')]]),
    "multi_image_point": ([{"images": ["media/a.jpg", "media/b.jpg"], "labels": ["Mugs", "a mug"],
                            "normalized_labels": ["mug", "mug"], "counts": [1, 1],
                            "points": [[{"x": 50, "y": 50}], [{"x": 20, "y": 10}]]}], {},
                          [[("In all images, point to the Mugs.",
                             '<points coords="1 1 500 500;2 2 200 100">Mugs</points>')]]),
    "video_point": ([POINT_ROW, POINT_ROW | {"count": 9}, POINT_ROW | {"two_fps_timestamps": [0.5, 9.0]}],
                    {"most": 5}, [[("How many ball are there in the video?",
                                    'Counting the <points coords="0.5 1 100 200;1.0 2 300 400">ball</points> '
                                    "shows a total of 2.")]]),
    "tracks": ([TRACK_ROW, TRACK_ROW | {"fps": 25.0}], {},
               [[("Track the players.", '<tracks coords="0.0 1 156 625 2 938 208;0.5 2 078 208">players'
                  "</tracks>")]]),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/mevis").mkdir()
    for name in ("a.jpg", "b.jpg", "v.mp4", "v_2fps.mp4", "g.gif", "mevis/n.mp4"):
        (tmp_path / "media" / name).write_bytes(b"x")
    return tmp_path


def turns_of(example):
    """Returns the conversations about an example whose media have 640 x 480 pixels and last 3 seconds."""
    media = VIDEO if example.video else types.Media(sizes=((640, 480),) * len(example.images))
    branches = formats.to_branches(example, media=media, rng=np.random.default_rng(0),
                                   asking=formats.PLAIN)
    return [branch.turns for branch in branches]


@pytest.mark.parametrize("schema", sorted(schemas.SCHEMAS))
def test_rows_become_what_the_model_learns(schema, folder):
    rows, how, expected = CASES[schema]
    number, errors = schemas.convert(schema, rows, folder, **how)
    examples = sources.read_jsonl(folder / "annotations.jsonl")
    assert number == len(examples) and not errors
    assert [turns_of(example) for example in examples] == expected


def test_loss_weights_of_chart_qa_favour_questions_by_people(folder):
    row = {"image_id": "a", "query": "Max?", "label": "7"}
    schemas.convert("chart_qa", [row | {"human_or_machine": kind} for kind in (0, 1)], folder)
    human, generated = sources.read_jsonl(folder / "annotations.jsonl")
    assert human.annotations[0].weight.scale == pytest.approx(1.477, abs=1e-3)
    assert generated.annotations[0].weight.scale == pytest.approx(0.523, abs=1e-3)


def test_an_image_with_many_points_is_divided(folder):
    rows = [A | {"label": str(number), "points": [{"x": 1, "y": place} for place in range(number)]}
            for number in (40, 61, 20, 1)]
    schemas.convert("pixmo_points", rows, folder)
    examples = sources.read_jsonl(folder / "annotations.jsonl")
    assert [[one.label for one in example.annotations] for example in examples] == [
        ["40", "20"], ["40", "20"], ["1"], ["1"]]


def test_points_of_long_videos_are_asked_about_their_clip(folder):
    long = POINT_ROW | {"video_duration": 200.0, "two_fps_timestamps": [100.0, 101.25]}
    rows = [long | {"clip_start": 90.0, "clip_end": 150.0}, long | {"clip_start": 0.0, "clip_end": 90.0},
            long]
    schemas.convert("video_point", rows, folder)
    [example] = sources.read_jsonl(folder / "annotations.jsonl")
    assert example.clip == (90.0, 150.0)
    assert [point.time for point in example.annotations[0].points] == [10.0, 11.0]


def test_records_without_media_are_left_out_and_named(folder):
    number, [error] = schemas.convert("label", [{"video_id": "gone", "label": "x"}], folder)
    assert number == 0 and "media/gone.mp4" in str(error)
    with pytest.raises(ValueError, match="must have the column 'label'"):
        schemas.convert("label", [{"video_id": "v"}], folder)
    schemas.convert("label", [{"video_id": "v", "label": "x"}], folder)
    with pytest.raises(ValueError, match="must have the column 'label'"):
        schemas.convert("label", [{"video_id": "v"}], folder)
    assert len(sources.read_jsonl(folder / "annotations.jsonl")) == 1  # what was there stays
    with pytest.raises(ValueError, match="a schema must be one of"):
        schemas.convert("labels", [], folder)


def test_what_the_recipe_draws_at_every_use_is_drawn_then(folder):
    schemas.convert("video_point", [POINT_ROW], folder)
    [example] = sources.read_jsonl(folder / "annotations.jsonl")

    def answers(example):
        return {formats.to_branches(example, media=VIDEO, rng=np.random.default_rng(seed),
                                    asking=formats.Asking())[0].turns[1] for seed in range(12)}
    assert len({answer.startswith("Counting") for answer in answers(example)}) == 2
    schemas.convert("video_choice", [{"video_id": "v", "Question": "?", "Answer": "yes",
                                      "NegativeAnswers": ["no"]}], folder)
    [example] = sources.read_jsonl(folder / "annotations.jsonl")
    assert {"A. yes", "B. yes"} & answers(example) or len(answers(example)) > 2


def test_every_task_of_the_recipe_has_a_schema_that_takes_its_arguments():
    for mixture in ("pretrain", "sft"):
        for member in tasks.members(tasks.MIXTURES[mixture]):
            task = tasks.TASKS[member.task]
            parameters = inspect.signature(schemas.SCHEMAS[task.schema].records).parameters
            assert set(dict(task.how)) <= set(parameters), task


def test_the_recipes_mixtures_have_its_shares():
    sizes = {name: task.examples or 10_000 for name, task in tasks.TASKS.items()}
    shares = tasks.rates(tasks.MIXTURES["sft"], sizes)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["tulu"] == pytest.approx(0.0995 / 1.1)
    assert shares["molmo2_video_point_0_5"] == pytest.approx(0.15 / 1.1 * 0.4)
    assert shares["kinetics_qa"] == pytest.approx(shares["tgif"])  # both pretend to have 60,000
    assert shares["molmo2_cap"] / shares["molmo2_human_qa"] == pytest.approx(1.5 * (100 / 43) ** 0.5)
    assert tasks.rates(tasks.MIXTURES["pretrain"], sizes)["pixmo_cap_with_transcripts"] == pytest.approx(0.6)


def test_rows_that_do_not_fit_leave_the_others_of_their_image(folder):
    good = {"image_sha256": "a", "question": "Who?", "answer": "Ann"}
    rows = [good, good | {"question": None}, good | {"answer": ""}, {"image_sha256": "a"},
            ValueError("line 7"), {"question": "?"}]
    number, errors = schemas.convert("ask_model_anything", rows, folder)
    [example] = sources.read_jsonl(folder / "annotations.jsonl")
    assert number == 1 and [one.answer for one in example.annotations] == ["Ann"]
    told = "\n".join(map(str, errors))
    for part in ("does not fit it (TypeError", "must have the column 'question'",
                 "annotations[0].answer: must be", "line 7", "must have the column 'id'"):
        assert part in told


def test_images_are_named_by_what_the_rows_have():
    assert media.image({"image": "media/x.png", "image_sha256": "s"}) == "media/x.png"
    assert media.image({"image": None, "image_url": "u"}) == (
        "media/0bfe935e70c321c7ca3afc75ce0d0ca2f98b5422e008bb31c00c6d7f1f1c0ad6.jpg")
    assert media.images({"image_urls": ["u", "u"]}) == [media.image({"image_url": "u"})] * 2
    assert media.video({"clip": "c", "video": "v"}) == "media/c.mp4"
    assert media.video({"video": "v.webm"}) == "media/v.webm"


def test_a_video_with_several_rows_is_a_conversation_at_some_uses_and_asked_in_its_own_words(folder):
    rows = [POINT_ROW | {"question": "How many balls?"}, POINT_ROW | {"label": "Hat"}]
    schemas.convert("video_point", rows, folder)
    [example] = sources.read_jsonl(folder / "annotations.jsonl")
    assert example.dialogue_share == 0.2
    assert [turns[0] for turns in turns_of(example)] == [
        "How many balls?", "How many Hat are there in the video?"]
    schemas.convert("video_point", rows[:1], folder)
    [example] = sources.read_jsonl(folder / "annotations.jsonl")
    assert example.dialogue_share == 0


def test_times_of_a_clip_lie_on_its_own_grid(folder):
    row = POINT_ROW | {"video_duration": 200.0, "clip_start": 90.2, "clip_end": 150.0,
                       "two_fps_timestamps": [90.7, 91.6]}
    schemas.convert("video_point", [row], folder)
    [example] = sources.read_jsonl(folder / "annotations.jsonl")
    assert [point.time for point in example.annotations[0].points] == pytest.approx([0.5, 1.0])


def test_tracks_say_the_rate_that_decides_which_frames_are_shown(folder):
    schemas.convert("tracks", [TRACK_ROW], folder)
    assert sources.read_jsonl(folder / "annotations.jsonl")[0].tracking_fps == 2


def test_images_with_many_points_are_a_set_of_their_own(folder):
    rows = [A | {"points": [], "label": kind, "collection_method": kind} for kind in ("pointing", "counting")]
    schemas.convert("pixmo_points", rows, folder, method="counting")
    examples = sources.read_jsonl(folder / "annotations.jsonl")
    assert {one.label for example in examples for one in example.annotations} == {"counting"}


def test_hardcoded_answers_stand_beside_media_of_all_kinds(folder):
    rows = [{"questions": [f"Who are you, {number}?" for number in range(200)], "response": "Molmo."}]
    number, errors = schemas.convert("hardcodes", rows, folder, media_folder="media")
    examples = sources.read_jsonl(folder / "annotations.jsonl")
    assert number == 200 and not errors
    kinds = [(bool(example.video), len(example.images)) for example in examples]
    kinds_seen = ((False, 0), (False, 1), (True, 0), (False, 2))
    shares = [kinds.count(kind) / 200 for kind in kinds_seen]
    assert shares == pytest.approx([0.35, 0.25, 0.25, 0.15], abs=0.1)
