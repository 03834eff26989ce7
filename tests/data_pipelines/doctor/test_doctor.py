"""What the examination of data sets reports: problems once per record, sizes, samples, thumbnails."""

import dataclasses
import fractions
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines import annotations
from data_pipelines import doctor
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.doctor import examination
from data_pipelines.doctor import sample as samples
from data_pipelines.doctor import statistics
from data_pipelines.doctor import thumbnails
from data_pipelines.stream import ledger
from data_pipelines.world import write as world_write
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.inputs import video

NANO = pathlib.Path(__file__).parents[3] / "assets/nano"
MODEL = config.nano()
INPUTS = config.InputConfig(max_crops=1, high_res_crops=1, overlap_margins=(1, 1))
SETTINGS = examination.Settings(model=MODEL, inputs=INPUTS,
                                tokenizer=tokenizers.Tokenizer.from_file(NANO, MODEL.text.vocab_size))
QA = {"type": "qa", "question": "What is it?", "answer": "A dot."}


def points(**point):
    return {"type": "points", "label": "dot", "points": [point]}


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    (folder / "b.mp4").write_text("no video")
    world_write.encode(folder / "c.mp4", np.zeros((4, 32, 32, 3), np.uint8), np.arange(5),
                       fractions.Fraction(1, 4), 4)
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    (folder / "annotations.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return str(folder)


GOOD = {"images": ["a.png"], "annotations": [QA, points(x=39, y=29)]}
OUTSIDE = {"images": ["a.png"], "annotations": [QA, points(x=41, y=29)]}
BROKEN = {"video": "b.mp4", "annotations": [QA]}
LATE = {"video": "c.mp4", "annotations": [QA, points(time=9, x=1, y=1), points(time=9, x=2, y=2),
                                          points(time=0.5, x=1, y=1)]}
TEXT = {"annotations": [QA]}


def test_each_problem_is_named_and_counted_once_per_record(tmp_path):
    folder = write(tmp_path / "set", [GOOD, OUTSIDE, BROKEN, LATE, TEXT, "{", OUTSIDE])
    found = doctor.examine(folder, SETTINGS)
    result = found.result
    assert (result["records"], result["examined"], result["usable"]) == (7, 7, 3)
    assert result["usable_share"] == pytest.approx(3 / 7)
    assert result["left_out"] == {ledger.ANNOTATION: 2, ledger.MEDIA: 1, ledger.LINE: 1}
    assert result["media"] == {"images": 3, "video": 2, "text": 1}
    by_stage = {one["stage"]: one for one in result["problems"]}
    assert {stage: one["records"] for stage, one in by_stage.items()} == {
        ledger.ANNOTATION: 2, ledger.MEDIA: 1, ledger.LINE: 1, examination.NOT_SHOWN: 1}
    assert by_stage[ledger.ANNOTATION]["rule"] == (
        "annotations[]: a point must lie inside the frame of N x N")
    assert by_stage[ledger.MEDIA]["rule"].startswith("FILE: cannot be opened as a video")
    assert [one.split(": ")[0] for one in by_stage[ledger.ANNOTATION]["examples"]] == [
        "annotations.jsonl:2", "annotations.jsonl:7"]
    late = [one for one in found.problems if ":4: " in one]  # both are listed, the record is counted once
    assert len(late) == 2 and all("must have a point at a time that is shown" in one for one in late)
    assert all(one.startswith(folder) for one in found.problems)


def test_statistics_are_those_of_the_files(tmp_path):
    folder = write(tmp_path / "set", [GOOD, LATE, TEXT])
    result = doctor.examine(folder, SETTINGS).result
    assert result["duration_seconds"]["max"] == result["duration_seconds"]["mean"] == pytest.approx(1.25)
    assert result["frame_rate"]["median"] == video.index(f"{folder}/c.mp4").fps
    assert result["keyframe_seconds"]["count"] == 1
    assert result["resolutions"] == {"40 x 30": 1, "32 x 32": 1}
    assert result["frames"]["max"] == 4  # at 2 frames/s, and the last one
    assert result["crops"]["total"] == 4 + 2  # frames; overview and one tile
    assert {kind: one["amount"]["count"] for kind, one in result["annotations"].items()} == {
        "points": 4, "qa": 3}
    assert result["annotations"]["qa"]["amount"]["max"] == len("A dot.")
    assert result["reading"]["video"]["pictures"] == 4 and result["reading"]["images"]["pictures"] == 1
    assert json.loads(json.dumps(result)) == result


def test_what_a_row_cannot_hold_is_cut_or_too_large(tmp_path):
    folder = write(tmp_path / "set", [TEXT, {"annotations": [QA | {"answer": "a " * 60}]}, LATE])
    sizes = sorted(doctor.examine(folder, SETTINGS).sizes[:, 0].tolist())
    shape = types.RowShape(T=sizes[0] + 4, M=2, R=1000, W=9)
    result = doctor.examine(folder, dataclasses.replace(SETTINGS, shape=shape)).result
    assert (result["cut"], result["too_large"], result["usable"]) == (1, 1, 2)
    small = dataclasses.replace(SETTINGS, shape=shape._replace(T=1000, M=4, R=1))
    assert doctor.examine(folder, small).result["left_out"] == {ledger.SIZE: 1}
    roomy = dataclasses.replace(SETTINGS, shape=shape._replace(T=1000, M=4))
    result = doctor.examine(folder, roomy).result
    assert (result["cut"], result["too_large"], result["usable"]) == (0, 0, 3)


def test_a_folder_without_records_is_one_problem(tmp_path):
    result = doctor.examine(str(tmp_path / "none"), SETTINGS, has_thumbnails=True)
    assert result.result["left_out"] == {ledger.LINE: 1} and "must exist" in result.problems[0]
    assert result.result["tokens"] is None and result.seconds is None and not result.pictures
    (tmp_path / "annotations.jsonl").write_text("\n\n")
    assert doctor.examine(str(tmp_path), SETTINGS).result["usable"] == 0


def test_media_may_stay_unopened(tmp_path):
    folder = write(tmp_path / "set", [GOOD, BROKEN, "{"])
    result = doctor.examine(folder, dataclasses.replace(SETTINGS, has_media=False)).result
    assert (result["usable"], result["left_out"]) == (2, {ledger.LINE: 1})
    assert result["tokens"] is None and result["reading"] == {}


def test_a_sample_is_drawn_by_its_seed(tmp_path):
    assert samples.choose(10, None, 0) == samples.choose(10, 10, 0) == range(10)
    first = samples.choose(1_000_000, 50, 3)
    assert first == samples.choose(1_000_000, 50, 3) == sorted(set(first)) and len(first) == 50
    assert first != samples.choose(1_000_000, 50, 4)
    folder = write(tmp_path / "set", [TEXT] * 9)
    result = doctor.examine(folder, SETTINGS, sample=4).result
    assert (result["records"], result["examined"], result["is_sampled"]) == (9, 4, True)
    assert not doctor.examine(folder, SETTINGS, sample=9).result["is_sampled"]


def test_members_of_a_mixture_are_read_as_it_says(tmp_path):
    folder = write(tmp_path / "set", [GOOD | {"images": ["wide.png"]}])
    Image.new("RGB", (400, 200)).save(tmp_path / "set/wide.png")
    fine = dataclasses.replace(SETTINGS, inputs=dataclasses.replace(INPUTS, high_res_crops=9))
    plain, high = (doctor.examine(folder, fine, member=tasks.Member(task="set", high_res_share=share))
                   for share in (0.0, 1.0))
    assert high.result["crops"]["max"] > plain.result["crops"]["max"]


def test_a_summary_is_of_all_values():
    found = statistics.summary([1.0, 2.0, 3.0, 10.0])
    assert (found["min"], found["median"], found["max"], found["mean"]) == (1.0, 2.5, 10.0, 4.0)
    assert sum(found["histogram"]["counts"]) == found["count"] == 4 and found["total"] == 16.0
    assert statistics.summary([]) is None
    alone = statistics.summary([5.0] * 3)
    assert alone["histogram"]["counts"] == [3] and alone["histogram"]["edges"] == [5.0, 6.0]


@pytest.mark.parametrize("message, rule", [
    ("/a/annotations.jsonl:17: clip: must be 0 <= start < end seconds; got [2, 1]",
     "clip: must be N <= start < end seconds"),
    ("annotations.jsonl:3: annotations[2].points[10].x: must lie inside the frame, 0 to 640; got 7",
     "annotations[].points[].x: must lie inside the frame, N to N"),
    ("annotations.jsonl:3: /b/c 1.mp4: is empty", "FILE: is empty"),
    ("a.jsonl:4: record: must be JSON (Expecting value: line 1 (char 0)); got b'x'", "record: must be JSON"),
])
def test_problems_of_one_kind_have_one_rule(message, rule):
    assert statistics.rule(message) == rule


def test_kinds_of_problems_are_bounded():
    collected = statistics.Statistics()
    for number in range(statistics.MOST_RULES + 50):
        text = f"a:1: {chr(97 + number % 26) * (number // 26 + 1)} is wrong"
        collected.add(examination.Finding(problems=(examination.Problem(stage="line", message=text),)))
    problems = collected.result()["problems"]
    assert len(problems) == statistics.MOST_RULES + 1
    assert problems[0]["rule"] == statistics.OTHER and problems[0]["records"] == 50


def test_every_kind_of_annotation_has_an_amount_and_a_description(tmp_path):
    assert set(examination.KIND_UNITS) == set(annotations.KINDS)
    track = {"id": 1, "points": [{"time": 0, "x": 1, "y": 1}]}
    tracks = {"type": "tracks", "label": "dot", "tracks": [track]}
    all_kinds = [points(time=0, x=1, y=1), tracks, {"type": "count", "label": "dot", "count": 3}, QA,
                 {"type": "chat", "turns": ["Hi", "Ho"]}, {"type": "caption", "text": "A dot rests."},
                 {"type": "choice", "question": "Which?", "options": ["a", "b", "c"], "answer": 1}]
    folder = write(tmp_path / "set", [{"video": "c.mp4", "annotations": all_kinds}])
    example, = sources.each(sources.open_source(folder))
    assert [examination.amount(one) for one in example.annotations] == [1, 1, 3, 6, 2, 12, 3]
    texts = [thumbnails.describe(one) for one in example.annotations]
    assert all(text.startswith(one.type) for text, one in zip(texts, example.annotations, strict=True))
    assert texts[6] == "choice: Which? → b"
    assert len(thumbnails.of(example).texts) == thumbnails.MOST_TEXTS + 1


def test_thumbnails_show_points_at_their_times_in_reduced_pixels(tmp_path):
    Image.new("RGB", (1280, 640)).save(tmp_path / "wide.png")
    folder = write(tmp_path, [{"images": ["wide.png"], "annotations": [points(x=640, y=320)]},
                              {"images": ["a.png", "wide.png"], "annotations": [
                                  points(image=2, x=1280, y=640)]},
                              LATE, {"video": "c.mp4", "annotations": [QA]}])
    wide, two, late, bare = (thumbnails.of(one) for one in sources.each(sources.open_source(folder)))
    assert wide.frames[0].pixels.shape == (160, 320, 3)
    assert wide.frames[0].marks == (("1", 160.0, 80.0),)
    assert [frame.marks for frame in two.frames] == [(), (("1", 320.0, 160.0),)]
    assert [frame.label for frame in two.frames] == ["image 1", "image 2"]
    assert [frame.label for frame in late.frames] == ["0.5 s", "9.0 s"]
    assert late.frames[0].marks == (("1", 1.0, 1.0),) and len(late.frames[1].marks) == 2
    assert len(bare.frames) == thumbnails.MOST_FRAMES


def test_thumbnails_are_of_usable_records(tmp_path):
    folder = write(tmp_path / "set", [BROKEN, OUTSIDE, GOOD])
    pictures = doctor.examine(folder, SETTINGS, has_thumbnails=True).pictures
    assert [one.key for one in pictures] == ["annotations.jsonl:3"]
