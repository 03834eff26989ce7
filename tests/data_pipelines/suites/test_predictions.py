"""Answers on disk: appended line by line, torn lines cut off, keys of all that an answer depends on."""

import dataclasses
import json

import pytest

from data_pipelines.suites import benchmark as benchmarks
from data_pipelines.suites import predictions
from molmo2_jax import types


def prediction(name, answer="B", **more):
    return predictions.Prediction(benchmark="tomato", id=name, answer=answer, key=f"k{name}", **more)


def test_what_is_appended_is_read_again(tmp_path):
    store = predictions.Store.of(tmp_path, "tomato")
    assert store.read() == {}
    made = [prediction("1", "“B”\n", frames=3, seconds=0.5), prediction("2", is_complete=False)]
    store.append(made[:1])
    store.append(made[1:])
    assert store.read() == {one.key: one for one in made}
    assert store.path == tmp_path / "predictions/tomato.jsonl"


@pytest.mark.parametrize("torn", ['{"id": "2", "answ', '{"id": "2", "answer": "x"}', "\x00\x00",
                                  '{"id"\n{"torn'])
def test_a_torn_last_line_is_not_read_and_is_cut_off_before_the_next(tmp_path, torn):
    store = predictions.Store(tmp_path / "tomato.jsonl")
    store.append([prediction("1")])
    with open(store.path, "a") as file:
        file.write(torn)
    assert set(store.read()) - {""} == {"k1"}
    store.append([prediction("3")])
    assert set(store.read()) == {"k1", "k3"}
    whole = store.path.read_text().splitlines()
    assert json.loads(whole[-1])["id"] == "3" and len(whole) == 2 + torn.count("\n")


def test_a_file_of_one_torn_line_begins_anew(tmp_path):
    store = predictions.Store(tmp_path / "tomato.jsonl")
    store.path.write_text("x" * 200_000)   # longer than the blocks in which a line end is looked for
    store.append([prediction("1")])
    assert list(store.read()) == ["k1"] and store.path.read_text().count("\n") == 1


def test_a_key_changes_with_everything_an_answer_depends_on_but_not_with_where_the_files_are():
    def item(prompt="Q?", video="/a/v.mp4", **more):
        return benchmarks.Item(id="1", cluster="v", prompt=prompt, target=None,
                               example=types.Example(annotations=(), video=video, **more))

    settings = {"inputs": {"max_frames": 8}}
    same = predictions.key_of("tomato", item(), settings, "w")
    assert same == predictions.key_of("tomato", item(video="/elsewhere/v.mp4"), settings, "w")
    others = [predictions.key_of("mlvu", item(), settings, "w"),
              predictions.key_of("tomato", item("Q!"), settings, "w"),
              predictions.key_of("tomato", item(clip=(0.0, 1.0)), settings, "w"),
              predictions.key_of("tomato", item(subtitles=((0.0, 1.0, "hi"),)), settings, "w"),
              predictions.key_of("tomato", item(tracking_fps=1), settings, "w"),
              predictions.key_of("tomato", dataclasses.replace(item(), id="2"), settings, "w"),
              predictions.key_of("tomato", item(), {"inputs": {"max_frames": 9}}, "w"),
              predictions.key_of("tomato", item(), settings, "v")]
    assert len({same, *others}) == 9


def test_answers_of_other_programs_need_an_id_and_an_answer(tmp_path, caplog):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": 7, "answer": "B"}\n[1]\n\n{"id": "8", "answer": "C", "extra": 1}\n')
    found = predictions.of_path(path, ["tomato"])
    assert {name: one.answer for name, one in found["tomato"].items()} == {"7": "B", "8": "C"}
    with pytest.raises(ValueError, match="must name its benchmark, one of tomato, mlvu; got 'mine' for id"):
        predictions.of_path(path, ["tomato", "mlvu"])
    path.write_text('{"id": "7", "answer": "B", "benchmark": "mlvu"}\n')
    assert predictions.of_path(path, ["tomato", "mlvu"])["mlvu"]["7"].benchmark == "mlvu"


def test_an_output_folder_holds_the_answers_to_several_benchmarks(tmp_path):
    predictions.Store.of(tmp_path, "tomato").append([prediction("1"), prediction("1", "C")])
    predictions.Store.of(tmp_path, "mlvu").append([
        predictions.Prediction(benchmark="mlvu", id="1", answer="A")])
    found = predictions.of_path(tmp_path, ["tomato"])
    assert list(found) == ["tomato"] and found["tomato"]["1"].answer == "C"
    with pytest.raises(ValueError, match="must be a file of JSON lines, or the output folder"):
        predictions.of_path(tmp_path / "none", ["tomato"])
