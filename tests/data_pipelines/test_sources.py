import json
import pathlib
import re

import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import sources
from molmo2_jax import types

DOC = pathlib.Path(__file__).parents[2] / "docs" / "data_format.md"
VIDEO = types.Media(sizes=((640, 480),), seconds=np.arange(7) / 2, duration=3.0, fps=30.0)
EXAMPLES = re.findall(r"```json\n(.*?)```\s+```text\n(.*?)```", DOC.read_text(), re.DOTALL)


def folder_with_media(root: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names or ("clips/0001.mp4", "photos/a.png", "photos/b.png", "photos/tiny.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"reading annotations does not open media")
    return root


def write_lines(root: pathlib.Path, *lines: str) -> pathlib.Path:
    path = folder_with_media(root) / "annotations.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def video_record(annotation: dict, **fields) -> str:
    return json.dumps({"video": "clips/0001.mp4", "annotations": [annotation], **fields})


def points(**changes) -> dict:
    return {"type": "points", "label": "cup", "points": [{"time": 0.5, "x": 1, "y": 2}], **changes}


def test_every_example_of_the_document_reads_and_becomes_the_text_printed_under_it(tmp_path):
    assert len(EXAMPLES) >= 12
    for source, expected in EXAMPLES:
        path = write_lines(tmp_path, json.dumps(json.loads(source)))
        [example] = sources.examples(path.parent)
        size = (4, 3) if "tiny" in source else (640, 480)
        media = VIDEO if example.video else types.Media(sizes=(size,) * len(example.images))
        branches = formats.to_branches(example, media=media, rng=np.random.default_rng(0),
                                       asking=formats.PLAIN)
        spoken = [
            f"{who}: {turn}\n"
            for branch in branches
            for who, turn in zip(("user", "model") * 9, branch.turns)
        ]
        assert "".join(spoken) == expected


def test_every_annotation_type_has_an_example_in_the_document():
    shown = {
        annotation["type"] for source, _ in EXAMPLES for annotation in json.loads(source)["annotations"]
    }
    assert shown == {"qa", "chat", "choice", "caption", "points", "tracks", "count"}


def test_weights_of_the_document_are_those_it_explains(tmp_path):
    [source] = [source for source, _ in EXAMPLES if '"weight": 0.5' in source]
    [example] = sources.examples(write_lines(tmp_path, json.dumps(json.loads(source))).parent)
    assert [annotation.weight for annotation in example.annotations] == [
        types.LossWeight(scale=0.5),
        types.LossWeight(scale=2.0),
        types.LossWeight(scale=0.3, by_length=False, by_branches=True),
    ]


def test_times_become_relative_to_the_clip(tmp_path):
    path = write_lines(
        tmp_path,
        video_record(
            points(points=[{"time": 4.0, "x": 1, "y": 2}]),
            clip=[3.5, 6],
            subtitles=[{"start": 3, "end": 5, "text": "hello"}],
        ),
    )
    [example] = sources.examples(path.parent)
    assert example.clip == (3.5, 6.0)
    assert example.annotations[0].points[0].time == 0.5
    assert example.subtitles == ((-0.5, 1.5, "hello"),)
    assert example.key == "annotations.jsonl:1"
    assert example.source == tmp_path.name


def test_what_a_record_says_about_its_use_is_kept(tmp_path):
    path = write_lines(tmp_path, video_record(QA, tracking_fps=2, dialogue=0.2, subtitles="They talk."),
                       video_record(QA))
    said, silent = sources.examples(path.parent)
    assert (said.tracking_fps, said.dialogue_share, said.subtitles) == (2.0, 0.2, "They talk.")
    assert (silent.tracking_fps, silent.dialogue_share, silent.subtitles) == (None, 0.0, ())


QA = {"type": "qa", "question": "Q?", "answer": "A"}
TRACK = {"id": 1, "points": [{"time": 0, "x": 1, "y": 2}]}
CHOICE = {"type": "choice", "question": "Q?", "options": ["a", "b"], "answer": 0}
MASK = {"id": 1, "time": 0.5, "size": [2, 2], "counts": [1, 3]}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "record: must be one JSON object per line"),
        ("[1]", r"record: must be an object; got \[1\]"),
        ('{"annotations": [], "annotations": []}', "record: must not repeat a field"),
        ('{"annotations": []}', r"annotations: must not be empty; got \[\]"),
        ('{"video": "clips/0001.mp4"}', "record: must have the fields annotations; got"),
        (video_record(QA, images=["photos/a.png"]), "video: must not be given together with images"),
        (video_record(QA, extra=1), r"record: must only have the fields .*; got \['extra'\]"),
        (
            video_record({**QA, "anwser": "x"}),
            r"annotations\[0\]: must only have the fields .*got \['anwser'\]",
        ),
        (
            video_record({"type": "qa", "question": "Q?"}),
            r"annotations\[0\]: must have the fields question, answer",
        ),
        (
            video_record({**QA, "answer": " "}),
            r"annotations\[0\].answer: must be a text that is not empty; got ' '",
        ),
        (
            video_record({**QA, "answer": "<im_patch>"}),
            r"annotations\[0\].answer: .*special token.*<im_patch>",
        ),
        (
            video_record({**QA, "type": "quiz"}),
            r"annotations\[0\].type: must be one of points, .*; got 'quiz'",
        ),
        (video_record({**QA, "weight": -1}), r"annotations\[0\].weight: must be >= 0; got -1"),
        (
            video_record({**QA, "weight": True}),
            r"annotations\[0\].weight: must be a finite number; got True",
        ),
        (
            video_record({**QA, "weight": {"by_length": False}}),
            r"annotations\[0\].weight: must have the fields scale",
        ),
        (
            video_record({**QA, "weight": {"scale": 1, "by_length": 1}}),
            r"weight.by_length: must be true or false",
        ),
        (
            video_record(QA, video="clips/9.mp4"),
            r"video: must be a file \(relative to .*\); got 'clips/9.mp4'",
        ),
        (
            video_record(QA, video="clips/empty.mp4"),
            "video: must not be an empty file; got 'clips/empty.mp4'",
        ),
        (video_record(QA, clip=[2, 2]), r"clip: must be 0 <= start < end seconds; got \[2, 2\]"),
        (video_record(QA, clip=2), r"clip: must be \[start, end\] in seconds; got 2"),
        (video_record(QA, size=[0, 4]), r"size: must be \[width, height\] in pixels; got \[0, 4\]"),
        (
            video_record(QA, subtitles=[{"start": 2, "end": 1, "text": "x"}]),
            r"subtitles\[0\].end: must be after start",
        ),
        (video_record(QA, dialogue=2), "dialogue: must be <= 1.0; got 2"),
        (video_record(QA, tracking_fps=0.5), "tracking_fps: must be an integer from 1 to 1000.*; got 0.5"),
        (json.dumps({"tracking_fps": 1, "annotations": [QA]}), "tracking_fps: must only be given with a"),
        (json.dumps({"subtitles": "x", "annotations": [QA]}), "subtitles: must only be given with a video"),
        (video_record(QA, subtitles=3), "subtitles: must be a list; got 3"),
        (video_record({**QA, "question": []}), r"annotations\[0\].question: must not be empty"),
        (video_record({"type": "caption", "text": "t", "start": 1}), "end: must be given with start"),
        (video_record({"type": "caption", "text": "t", "start": 2, "end": 2}), "end: must be after start"),
        (json.dumps({"images": ["photos/a.png"],
                     "annotations": [{"type": "caption", "text": "t", "time": 1}]}),
         r"annotations\[0\].time: must only be given with a video; got 1"),
        (video_record(points(prompt=[])), r"annotations\[0\].prompt: must not be empty"),
        (video_record(points(prompt=["a"], prompt_share=2)), r"annotations\[0\].prompt_share: must be <= 1"),
        (video_record(points(prompt={"all": "x"})),
         r"annotations\[0\].prompt: must only have the fields bare.*'all'"),
        (video_record({**CHOICE, "labelled": 0}), "labelled: must be true or false; got 0"),
        (video_record(points(mode="all")),
         r"annotations\[0\].mode: must be one or a list of bare, .*; got 'all'"),
        (
            video_record(points(), clip=[1, 2]),
            r"points\[0\].time: must lie in the clip from 1.0 to 2.0 .*; got 0.5",
        ),
        (video_record(points(), size=[640, 1]), r"points\[0\].y: must lie inside the frame, 0 to 1; got 2"),
        (video_record(points(scale=1)), r"points\[0\].y: must lie inside the frame, 0 to 1.0; got 2"),
        (
            video_record(points(points=[{"time": 0, "x": -1, "y": 2}])),
            r"points\[0\].x: must lie inside .*; got -1",
        ),
        (
            video_record(points(points=[{"time": 0, "x": "1", "y": 2}])),
            r"points\[0\].x: must be a finite number",
        ),
        (
            video_record(points(points=[{"time": 0, "x": float("nan"), "y": 2}])),
            r"points\[0\].x: must be a finite",
        ),
        (
            video_record(points(points=[{"x": 1, "y": 2}])),
            r"points\[0\].time: must be given for a video; got None",
        ),
        (video_record(points(points=[{"time": 0, "y": 2}])), r"points\[0\].x: must be given"),
        (
            video_record(points(points=[{"time": 0, "image": 1, "x": 1, "y": 2}])),
            r"image: must only be given with",
        ),
        (
            video_record(points(points=[{"time": 0, "x": 1, "y": 2, "id": 3}] * 2)),
            r"must not repeat the same id",
        ),
        (
            video_record(points(scale=0)),
            r"annotations\[0\].scale: must be > 0: one or \[x, y\]; got \[0, 0\]",
        ),
        (
            video_record({"type": "tracks", "label": "a", "tracks": [TRACK, TRACK]}),
            r"tracks: must not repeat the same",
        ),
        (
            video_record({"type": "tracks", "label": "a", "tracks": [TRACK], "fps": 0.5}),
            r"fps: must be an integer",
        ),
        (
            video_record({"type": "tracks", "label": "a", "tracks": [], "mode": "single_point"}),
            "exactly one track",
        ),
        (
            video_record({"type": "tracks", "label": "a", "tracks": [{"id": 1, "points": []}]}),
            "must not be empty",
        ),
        (
            video_record({"type": "count", "label": "a", "count": -1}),
            r"count: must be an integer >= 0; got -1",
        ),
        (
            video_record({"type": "count", "label": "a", "count": 1.5}),
            r"count: must be an integer >= 0; got 1.5",
        ),
        (video_record({**CHOICE, "answer": 2}), r"answer: must be the index of an option, 0 to 1; got 2"),
        (video_record({**CHOICE, "options": ["a"]}), r"options: must be 2 to 26 texts"),
        (
            video_record({**CHOICE, "options": ["a", "a"]}),
            r"options: must not repeat the same text; got \['a'\]",
        ),
        (video_record({"type": "chat", "turns": ["a"]}), r"turns: must alternate user and model"),
        (
            video_record({"type": "caption", "text": "a", "length": "tiny"}),
            "length: must be long or short; got 'tiny'",
        ),
        (
            video_record(points(), masks=[{**MASK, "counts": [1, 2]}]),
            r"masks\[0\].counts: .* = 4; got \[1, 2\]",
        ),
        (
            video_record(points(), masks=[MASK, MASK]),
            "masks: must not repeat the same object, time and image",
        ),
        (
            video_record(points(), masks=[MASK], size=[9, 9]),
            r"masks\[0\].size: must be \[height, width\] of the media",
        ),
        ('{"annotations": [{"type": "count", "label": "a", "count": 1}]}', "must have a video or images"),
        (
            '{"images": ["photos/a.png"], "annotations": [{"type": "tracks", "label": "a", "tracks": []}]}',
            "of type tracks must have a video",
        ),
        (
            '{"images": ["photos/a.png", "photos/b.png"], "annotations": [{"type": "points", "label": "a", '
            '"points": [{"x": 1, "y": 1}]}]}',
            r"points\[0\].image: must be given unless there is exactly one image",
        ),
        (
            '{"images": ["photos/a.png"], "size": [4, 4], "annotations": [{"type": "qa"}]}',
            r"size: must hold \[width",
        ),
    ],
)
def test_a_violation_names_file_line_field_rule_and_value(tmp_path, line, message):
    path = write_lines(tmp_path, video_record(QA), line)
    (tmp_path / "clips/empty.mp4").touch()
    with pytest.raises(ValueError, match=message) as caught:
        sources.examples(path.parent)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_a_folder_is_read_to_its_end_past_broken_records(tmp_path):
    path = write_lines(
        tmp_path, video_record(QA), "{", "", video_record(points(mode="x")), video_record(CHOICE)
    )
    examples, errors = sources.read_folder(path.parent)
    assert [example.key for example in examples] == ["annotations.jsonl:1", "annotations.jsonl:5"]
    assert [str(error).split(":")[1] for error in errors] == ["2", "4"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_records_is_refused(tmp_path, content):
    path = tmp_path / "annotations.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"must hold at least one record; got {len(content)} bytes"):
        sources.examples(path.parent)
