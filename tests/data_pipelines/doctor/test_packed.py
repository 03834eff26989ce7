"""The rows shown are those that training gets, and what is said to be missing is what they lack."""

import contextlib
import json

import numpy as np
import pytest

from data_pipelines import pipeline
from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.doctor import examination
from data_pipelines.doctor import packed
from data_pipelines.stream import preparation
from launch.support import examined
from molmo2_jax import types
from molmo2_jax.inputs import packers
from molmo2_jax.render import pictures

LONG = " ".join(map(str, range(100, 170)))


def qa(number, answer="yes"):
    return {"type": "qa", "question": f"question {number}?", "answer": answer}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video with an annotation at no time that is shown, a picture, texts, and a broken line."""
    folder = tmp_path_factory.mktemp("data")
    frames = [np.full((48, 48, 3), 60 * n, np.uint8) for n in range(4)]
    pictures.write_video(folder / "clip.mp4", frames, fps=2)
    (folder / "dot.png").write_bytes(pictures.encode(frames[1]))
    late = {"type": "tracks", "label": "dot", "fps": 2, "tracks": [
        {"id": 1, "points": [{"time": 1.27, "x": 5, "y": 5}]}]}   # frames are shown at 1.0 and 1.5 s
    records = [
        {"video": "clip.mp4", "annotations": [qa(0), late, qa(1)]},
        {"images": ["dot.png"], "annotations": [qa(2)]},
        {"annotations": [qa(3), qa(4, LONG), qa(5)]},
        {"annotations": [qa(6, LONG)]}]
    lines = [json.dumps(one) for one in records]
    (folder / "annotations.jsonl").write_text("\n".join([*lines, '{"annotations": 7}', ""]))
    return folder


@pytest.fixture(scope="module")
def settings():
    return examined.settings_of_no_run()


def data_config(folder, **fields):
    return pipeline.DataConfig(**{
        "train": (str(folder),), "seed": 5, "row_tokens": 512, "row_crops": 8, "batch_rows": 4,
        "packer": packers.OldestFirst(buffer=2), "num_workers": 0, "prefetch": 0, **fields})


@pytest.mark.parametrize("streams, number", [(1, 4), (2, 3), (4, 9)])
def test_the_rows_are_the_first_of_the_run(folder, settings, streams, number):
    data = data_config(folder, streams=streams)
    how = settings.model, settings.inputs, settings.tokenizer
    with contextlib.closing(pipeline.make_iterator(data, *how)) as batches:
        expected = next(batches)
    found = packed.first_rows(data, *how, number)
    for got, wanted in zip(found.batch, expected, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(got, wanted[:number])
    assert [note.key for note in found.skipped] == ["annotations.jsonl:5"]
    assert len(found.members) == min(number, 4)
    for row, members in enumerate(found.members):
        sizes = [int((found.batch.example[row] == place).sum()) for place in range(len(members))]
        assert [one.tokens for one in members] == sizes
        assert sum(sizes) == (found.batch.example[row] >= 0).sum()
        assert {one.key for one in members} <= {f"annotations.jsonl:{line}" for line in range(1, 5)}
        assert {one.source for one in members} == {str(folder)}


def test_what_a_short_row_cuts_is_told_with_its_reason(folder, settings):
    tokens = 90
    data = data_config(folder, row_tokens=tokens)
    found = packed.first_rows(data, settings.model, settings.inputs, settings.tokenizer, 8)
    seen = {}
    for row, members in enumerate(found.members):
        for place, one in enumerate(members):
            held = settings.tokenizer.spell(found.batch.tokens[row][found.batch.example[row] == place])
            seen.setdefault(one.key, (one, held))
    tree, held = seen["annotations.jsonl:3"]
    assert tree.whole_tokens > tokens and tree.left_out
    whole = "".join([held, *(text for text, _ in tree.left_out)])
    for text in ("question 3?", "question 4?", "question 5?", LONG):
        assert whole.count(text) == 1
    one, held = seen["annotations.jsonl:4"]
    ((text, reason),) = one.left_out
    assert (held + text).endswith(LONG) and one.tokens == tokens
    assert reason == (f"a row ends at token {tokens}: {one.whole_tokens - tokens} of {one.whole_tokens} "
                      "tokens")


def test_a_record_is_what_training_makes_of_it(folder, settings):
    source = sources.open_source(folder)
    member = tasks.Member(task=str(folder))
    found = packed.of_record(source[0], settings, member, 0)
    ((one,),) = found.members
    assert (one.key, one.annotations, one.branches) == ("annotations.jsonl:1", 3, 2)
    assert one.left_out == (("tracks: dot (1)", packed.INVISIBLE),)
    expected = preparation.prepare(source[0], settings.model, settings.inputs, settings.tokenizer,
                                   preparation.generator(0, 0))
    np.testing.assert_array_equal(found.batch.tokens[0], expected.tokens)
    np.testing.assert_array_equal(found.batch.patches[0], expected.patches)


def test_a_record_is_cut_to_the_row_of_a_run_or_refused(folder, settings):
    source, member = sources.open_source(folder), tasks.Member(task=str(folder))
    short = examination.Settings(model=settings.model, inputs=settings.inputs, tokenizer=settings.tokenizer,
                                 shape=types.RowShape(T=200, M=1, R=64, W=9))
    ((one,),) = packed.of_record(source[3], short, member, 3).members
    assert one.tokens == 200 < one.whole_tokens and one.left_out
    with pytest.raises(preparation.Refused, match="M = 5 of 1"):
        packed.of_record(source[0], short, member, 0)
