"""Rows of the published data sets become records, and these the text that the model is trained on."""

import collections
import inspect
import math
import pathlib

import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import schemas
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.schemas import media
from data_pipelines.schemas import origins
from molmo2_jax import types
from tests.data_pipelines.schemas import converted

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
# As published: ids are numbers, mask_id has texts (MolmoPoint-TrackAny).
ANY_ROW = {"id": "any_0", "video": "v", "video_path": "v.webm", "video_source": "youtube",
           "expression": "dogs", "fps": 6, "sampling_fps": 1, "height": 480, "n_frames": 18, "width": 640,
           "task": "track",
           "frame_trajectories": [{"frame": 0, "time": 0.0, "points": [
               {"id": 1, "point": [320.0, 240.0], "occluded": False},
               {"id": 0, "point": [64.0, 48.0], "occluded": False},
               {"id": 7, "point": [1.0, 1.0], "occluded": False}]}],
           "mask_id": ["0", "1"], "obj_id": [4065, 4066], "qid": "q", "anno_id": ["a", "b"]}
ELEMENT = {"height": 20, "width": 40, "x_center": 320, "y_center": 120, "name": "Close Tab",
           "intent": ["Close the tab", "Click the X"]}
TULU = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                     {"role": "assistant", "content": "Hello."}], "category": "chat", "source": "wild",
        "first_message_qwen3_tokens": 5, "empty_messages": False, "has_special_token": False}
CASES = {  # schema: rows, further arguments, the turns of every record in the wording of evaluation
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
    "options_qa": ([{"video": "v", "q_body": "Why?", "option0": "rain", "option1": "", "option2": "fog",
                     "option3": "", "answer": 2}],
                   {"question": "q_body", "options": "option0 option1 option2 option3", "openly": True},
                   [[("Why?\nOnly return the correct answer option.\nA. rain\nB. fog", "B. fog"),
                     ("video_short_answer: Why?", "fog")]]),
    "first_answer": ([{"video": "v.mp4", "question": "Which exit?", "answer": ["7", "seven"]},
                      {"video": "v.mp4", "question": "Which road?", "answer": " "}], {},
                     [[("video_short_answer: Which exit?", "7")]]),
    "joined_qa": ([{"question_id": "v_v_0", "video_name": "v", "question": "is it dark"},
                   {"question_id": "v_v_0", "answer": "no", "type": 3},
                   {"question_id": "v_v_1", "video_name": "v", "question": "who waits"}], {},
                  [[("video_short_answer: is it dark?", "no")]]),
    "localized_narratives": ([{"video_name": "v", "qa_pairs": [
        {"question_id": "1", "raw_question": "Who falls?", "raw_answer": "a boy"}]}], {},
        [[("video_short_answer: Who falls?", "a boy")]]),
    "actor_captions": ([{"id": 1, "video": "v.mp4", "captions": ["He runs."], "actor_names": ["Man"]}], {},
                       [[("video_object_caption: Describe the man in this video.", "He runs.")]]),
    "paxion": ([{"video_uid": "v", "clip_start": 0.5, "clip_end": 2.0, "clip_text": "#C opens a door",
                 "action_antonym_clip_text": "#C closes a door"},
                {"rel_vid_path": "v.mp4", "label": "Lifting a cup",
                 "label_action_antonym_clip_text": "Dropping a cup"}], {},
               [[("Which action does the video show?\nOnly return the correct answer option.\n"
                  "A. Opens a door\nB. Closes a door\nC. Not sure", "A. Opens a door")],
                [("Which action does the video show?\nOnly return the correct answer option.\n"
                  "A. Lifting a cup\nB. Dropping a cup\nC. Not sure", "A. Lifting a cup")]]),
    "clevrer": ([{"scene_index": 0, "video_filename": "v.mp4", "questions": [
        {"question_id": 0, "question": "How many spheres?", "answer": "2"},
        {"question_id": 1, "question": "What will happen?", "choices": [
            {"choice_id": 0, "choice": "x", "answer": "wrong"}, {"choice_id": 1, "choice": "y",
                                                                 "answer": "correct"}]},
        {"question_id": 2, "question": "Why?", "choices": [
            {"choice_id": 0, "choice": "x", "answer": "correct"}, {"choice_id": 1, "choice": "y",
                                                                   "answer": "correct"}]}]}], {},
        [[("video_short_answer: How many spheres?", "2"),
          ("What will happen?\nOnly return the correct answer option.\nA. x\nB. y", "B. y")]]),
    "funqa": ([{"task": "H1", "visual_input": "v.mp4", "instruction": "When?", "output": "[1, 5]"},
               {"task": "H2", "visual_input": "v.mp4", "instruction": "Describe it.", "output": "A fall."},
               {"visual_input": "v.mp4", "gt": "2", "instruction": "Choose.\nThe Question is: Why?\n "
                "The Options are: ['Options 1: rain', 'Options 2: ice']"}], {},
              [[("video_short_answer: Describe it.", "A fall."),
                ("Why?\nOnly return the correct answer option.\nA. rain\nB. ice", "B. ice")]]),
    "star": ([{"video_id": "v", "start": 0.5, "end": 2.5, "question": "What opened?", "answer": "The door.",
               "choices": [{"choice_id": 0, "choice": "The box."}, {"choice_id": 1, "choice": "The door."}]}],
             {}, [[("video_short_answer: What opened?", "The door."),
                   ("What opened?\nOnly return the correct answer option.\nA. The box.\nB. The door.",
                    "B. The door.")]]),
    "how2qa": ([{"video_id": "v", "span": "[0.5:2.0]", "wrong0": "b", "wrong1": "c", "wrong2": "d",
                 "question": "Who?", "answer": "a"},
                {"video_id": "v", "span": "[2.0:2.0]", "wrong0": "b", "wrong1": "c", "wrong2": "d",
                 "question": "Who?", "answer": "a"}], {},
               [[("Who?\nOnly return the correct answer option.\nA. a\nB. b\nC. c\nD. d", "A. a")]]),
    "camerabench": ([{"video_path": "v.mp4", "mc_qa_list": [
        {"Question": "Pan?", "Answer": "left", "NegativeAnswers": ["right"]}]}], {},
        [[("Pan?\nOnly return the correct answer option.\nA. left\nB. right", "A. left")]]),
    "countix": ([{"video_path": "v.mp4", "class": "push up", "count": "7"}], {},
                [[("video_short_answer: How often does this happen: push up?", "7")]]),
    "motion_caption": ([{"video_path": "v.mp4", "motion_caption": "She waves."}], {},
                       [[("video_motion_caption: Describe the motion in this video.", "She waves.")]]),
    "charades_sta": ([{"line": "v 0.5 2.0##a person opens a door."}, {"line": "v 2.0 2.0##nothing."}], {},
                     [[("charades_sta: What is happening?", "a person opens a door.")]]),
    "youcook2": ([{"id": "v", "subset": "training", "annotations": [
        {"id": 0, "segment": [1, 2], "sentence": "cut the bread"}]},
        {"id": "v", "subset": "validation", "annotations": []}], {},
        [[("youcook2_label: What is happening?", "cut the bread.")],
         [("Describe the video from 1.0 seconds to 2.0 seconds.", "cut the bread.")]]),
    "ego4d": ([{"clip": "v.mp4", "corrupt": False, "message_list": [
        {"question": "Label the clip.", "answer": "wash hands", "style": "ego4d_mq_label_clip"}]},
        {"clip": "v.mp4", "corrupt": True, "message_list": []}], {},
        [[("ego4d_mq_label_clip: Label the clip.", "wash hands")]]),
    "epic_kitchens": ([{"participant_id": "P01", "video_id": "v", "start_timestamp": "00:00:01.000",
                        "stop_timestamp": "00:00:02.500", "narration": "take cup"}], {},
                      [[("epic_kitchens_label: What is happening?", "take cup")]]),
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
    "gui_point": ([{"id": "a", "metadata": "{}", "html": "<html></html>", "annotation": [
        ELEMENT, ELEMENT | {"intent": []}, ELEMENT | {"name": ""},
        ELEMENT | {"name": " ", "intent": []}]}], {},
        [[("Close the tab", '<points coords="1 1 500 250">close tab</points>'),
          ("Point to the close tab.", '<points coords="1 1 500 250">close tab</points>'),
          ("Close the tab", '<points coords="1 1 500 250">close the tab</points>')]]),
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
    for name in ("a.jpg", "b.jpg", "v.mp4", "v.webm", "v_2fps.mp4", "g.gif", "mevis/n.mp4"):
        (tmp_path / "media" / name).write_bytes(b"x")
    return tmp_path


def turns_of(example):
    """Returns the conversations about an example whose media have 640 x 480 pixels and last 3 seconds."""
    media = VIDEO if example.video else types.Media(sizes=((640, 480),) * len(example.images))
    branches = formats.to_branches(example, media=media, rng=np.random.default_rng(0),
                                   asking=formats.PLAIN)
    return [branch.turns for branch in branches]


@pytest.mark.parametrize("schema", sorted(schemas.SCHEMAS))
def test_rows_become_the_text_that_the_model_is_trained_on(schema, folder):
    rows, how, expected = CASES[schema]
    number, errors = converted.convert(schema, rows, folder, **how)
    examples = sources.examples(folder)
    assert number == len(examples) and not errors
    assert [turns_of(example) for example in examples] == expected


def test_loss_weights_of_chart_qa_favour_questions_written_by_people(folder):
    row = {"image_id": "a", "query": "Max?", "label": "7"}
    converted.convert("chart_qa", [row | {"human_or_machine": kind} for kind in (0, 1)], folder)
    human, generated = sources.examples(folder)
    assert human.annotations[0].weight.scale == pytest.approx(1.477, abs=1e-3)
    assert generated.annotations[0].weight.scale == pytest.approx(0.523, abs=1e-3)


def test_an_image_with_many_points_is_split(folder):
    rows = [A | {"label": str(number), "points": [{"x": 1, "y": place} for place in range(number)]}
            for number in (40, 61, 20, 1)]
    converted.convert("pixmo_points", rows, folder)
    examples = sources.examples(folder)
    assert [[one.label for one in example.annotations] for example in examples] == [
        ["40", "20"], ["40", "20"], ["1"], ["1"]]


def test_points_of_long_videos_are_asked_about_their_clip(folder):
    long = POINT_ROW | {"video_duration": 200.0, "two_fps_timestamps": [100.0, 101.25]}
    rows = [long | {"clip_start": 90.0, "clip_end": 150.0}, long | {"clip_start": 0.0, "clip_end": 90.0},
            long]
    converted.convert("video_point", rows, folder)
    [example] = sources.examples(folder)
    assert example.clip == (90.0, 150.0)
    assert [point.time for point in example.annotations[0].points] == [10.0, 11.0]


def test_oversampled_points_are_used_more_often_with_those_that_are_as_numerous(folder):
    def row(count):
        return POINT_ROW | {"label": str(count), "count": count, "two_fps_timestamps": [0.5],
                            "points": [[{"x": 1.0, "y": float(place)} for place in range(count)]]}

    converted.convert("video_point", [row(count) for count in (5, 6, 26, 61)], folder, oversampled=True)
    examples = sources.examples(folder)
    assert [[one.label for one in example.annotations] for example in examples] == [
        ["5", "6", "26"], ["6", "26"], ["26"], ["26"]]


def test_points_may_be_asked_about_whole_videos_of_any_length(folder):
    long = POINT_ROW | {"video_duration": 200.0, "two_fps_timestamps": [100.0, 101.25],
                        "clip_start": 90.0, "clip_end": 150.0}
    converted.convert("video_point", [long, long | {"clip_start": None, "clip_end": None}], folder,
                      longest=math.inf)
    [example] = sources.examples(folder)
    assert example.clip is None and len(example.annotations) == 2
    assert [point.time for point in example.annotations[0].points] == [100.0, 101.0]


def test_records_without_media_are_left_out_and_reported(folder):
    number, [error] = converted.convert("label", [{"video_id": "gone", "label": "x"}], folder)
    assert number == 0 and "media/gone.mp4" in str(error)
    with pytest.raises(ValueError, match="must have the column 'label'"):
        converted.convert("label", [{"video_id": "v"}], folder)
    converted.convert("label", [{"video_id": "v", "label": "x"}], folder)
    with pytest.raises(ValueError, match="must have the column 'label'"):
        converted.convert("label", [{"video_id": "v"}], folder)
    assert len(sources.examples(folder)) == 1  # what was there stays


def test_what_the_recipe_draws_at_every_use_is_drawn_at_every_use(folder):
    converted.convert("video_point", [POINT_ROW], folder)
    [example] = sources.examples(folder)

    def answers(example):
        return {formats.to_branches(example, media=VIDEO, rng=np.random.default_rng(seed),
                                    asking=formats.Asking())[0].turns[1] for seed in range(12)}
    assert len({answer.startswith("Counting") for answer in answers(example)}) == 2
    converted.convert("video_choice", [{"video_id": "v", "Question": "?", "Answer": "yes",
                                      "NegativeAnswers": ["no"]}], folder)
    [example] = sources.examples(folder)
    assert {"A. yes", "B. yes"} & answers(example) or len(answers(example)) > 2


def test_elements_of_screenshots_are_asked_for_by_any_intent_and_sometimes_by_name(folder):
    converted.convert("gui_point", [{"id": "a", "annotation": [ELEMENT]}], folder)
    [example] = sources.examples(folder)
    media = types.Media(sizes=((640, 480),))
    asking = formats.Asking(num_templates=1)
    asked = collections.Counter(
        formats.to_branches(example, media=media, rng=np.random.default_rng(seed), asking=asking)[0].turns[0]
        for seed in range(400))
    assert asked.keys() == {*ELEMENT["intent"], "Point to the close tab."}
    assert 50 < asked["Point to the close tab."] < 110   # 80 expected, with a deviation of 8


@pytest.mark.parametrize("mixture", sorted(set(tasks.MIXTURES) - {"shapes"}))
def test_every_member_of_a_mixture_has_a_schema_that_takes_its_arguments_and_a_known_origin(mixture):
    for member in tasks.members(tasks.MIXTURES[mixture]):
        task = tasks.TASKS[member.task]
        parameters = inspect.signature(schemas.SCHEMAS[task.schema].records).parameters
        assert set(dict(task.how)) <= set(parameters), task
        is_built = member.task in origins.WITHOUT_ROWS
        assert origins.of(member.task).startswith("no rows are published" if is_built else "rows are "), task


def test_two_sets_without_published_rows_are_named_and_no_other():
    assert set(origins.WITHOUT_ROWS) == {"ai2d", "kinetics_qa"}
    assert set(origins.PUBLISHED) | set(origins.WITHOUT_ROWS) <= set(tasks.TASKS) | {"cosyn_document"}
    assert origins.of("my_folder") == ""


def test_every_schema_is_used_by_a_task():
    assert {task.schema for task in tasks.TASKS.values()} - {None} == set(schemas.SCHEMAS)


def test_rows_that_do_not_fit_do_not_remove_the_others_of_their_image(folder):
    good = {"image_sha256": "a", "question": "Who?", "answer": "Ann"}
    rows = [good, good | {"question": None}, good | {"answer": ""}, {"image_sha256": "a"},
            ValueError("line 7"), {"question": "?"}]
    number, errors = converted.convert("ask_model_anything", rows, folder)
    [example] = sources.examples(folder)
    assert number == 1 and [one.answer for one in example.annotations] == ["Ann"]
    told = "\n".join(map(str, errors))
    for part in ("does not fit it (TypeError", "must have the column 'question'",
                 "annotations[0].answer: must be", "line 7", "must have the column 'id'"):
        assert part in told


def test_media_are_named_by_the_columns_that_rows_have():
    assert media.image({"image": "media/x.png", "image_sha256": "s"}) == "media/x.png"
    assert media.image({"image": None, "image_url": "u"}) == (
        "media/0bfe935e70c321c7ca3afc75ce0d0ca2f98b5422e008bb31c00c6d7f1f1c0ad6.jpg")
    assert media.images({"image_urls": ["u", "u"]}) == [media.image({"image_url": "u"})] * 2
    assert media.video({"clip": "c", "video": "v"}) == "media/c.mp4"
    assert media.video({"video": "v.webm"}) == "media/v.webm"


def test_a_video_with_several_rows_is_a_conversation_in_some_uses_and_keeps_its_questions(folder):
    rows = [POINT_ROW | {"question": "How many balls?"}, POINT_ROW | {"label": "Hat"}]
    converted.convert("video_point", rows, folder)
    [example] = sources.examples(folder)
    assert example.dialogue_share == 0.2
    assert [turns[0] for turns in turns_of(example)] == [
        "How many balls?", "How many Hat are there in the video?"]
    converted.convert("video_point", rows[:1], folder)
    [example] = sources.examples(folder)
    assert example.dialogue_share == 0


def test_times_of_a_clip_are_on_its_own_grid(folder):
    row = POINT_ROW | {"video_duration": 200.0, "clip_start": 90.2, "clip_end": 150.0,
                       "two_fps_timestamps": [90.7, 91.6]}
    converted.convert("video_point", [row], folder)
    [example] = sources.examples(folder)
    assert [point.time for point in example.annotations[0].points] == pytest.approx([0.5, 1.0])


def test_tracks_record_the_rate_that_determines_the_sampled_frames(folder):
    converted.convert("tracks", [TRACK_ROW], folder)
    assert sources.examples(folder)[0].tracking_fps == 2


def test_tracks_with_ids_as_published_are_read_and_a_video_keeps_its_suffix(folder):
    converted.convert("tracks", [ANY_ROW, ANY_ROW | {"video_source": "MammalNet"}], folder)
    youtube, mammal = sources.examples(folder)
    assert [pathlib.Path(one.video).name for one in (youtube, mammal)] == ["v.webm", "v.mp4"]
    answer = '<tracks coords="0.0 1 100 100 2 500 500">dogs</tracks>'
    assert turns_of(youtube) == [("Track the dogs at 1 FPS.", answer)]


def test_images_with_many_points_form_their_own_set(folder):
    rows = [A | {"points": [], "label": kind, "collection_method": kind} for kind in ("pointing", "counting")]
    converted.convert("pixmo_points", rows, folder, method="counting")
    examples = sources.examples(folder)
    assert {one.label for example in examples for one in example.annotations} == {"counting"}


def test_hardcoded_answers_are_shown_with_media_of_all_kinds(folder):
    rows = [{"questions": [f"Who are you, {number}?" for number in range(200)], "response": "Molmo."}]
    number, errors = converted.convert("hardcodes", rows, folder, media_folder="media")
    examples = sources.examples(folder)
    assert number == 200 and not errors
    kinds = [(bool(example.video), len(example.images)) for example in examples]
    kinds_seen = ((False, 0), (False, 1), (True, 0), (False, 2))
    shares = [kinds.count(kind) / 200 for kind in kinds_seen]
    assert shares == pytest.approx([0.35, 0.25, 0.25, 0.15], abs=0.1)
