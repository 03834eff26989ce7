"""Points in replies: with labels, in pixels, of any media, and so far in the chunks of a stream."""

import dataclasses
import json
import types as stand_in

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")

from launch.server import replies
from molmo2_jax import config
from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import tokenizer as tokenizers

VIDEO = types.Media(sizes=((200, 100),), seconds=np.array([0.0, 0.5]), duration=1.0, fps=2.0)
IMAGES = types.Media(sizes=((200, 100), (50, 50)))
SAID = '<points coords="0.5 1 100 200 2 500 500">red dot</points>'


def test_an_answer_without_media_has_no_points():
    assert replies.points(SAID, types.Media()) == []
    assert replies.places(generate.Answer(text="Hello."), types.Media())["points"] == []


def test_points_have_labels_and_the_time_or_image_they_are_in():
    assert replies.points(SAID, VIDEO) == [
        {"id": "1", "label": "red dot", "frame_time": 0.5, "x": 20.0, "y": 20.0},
        {"id": "2", "label": "red dot", "frame_time": 0.5, "x": 100.0, "y": 50.0}]
    assert replies.points('<points coords="2 1 500 500">dot</points>', IMAGES) == [
        {"id": "1", "label": "dot", "image": 2, "x": 25.0, "y": 25.0}]


def test_chunks_have_the_points_so_far_when_there_are_new_ones():
    completion = replies.Completion("name", "model", stand_in.SimpleNamespace(media=VIDEO))
    counts = []
    for place in range(0, len(SAID), 4):
        chunk = json.loads(completion.piece(SAID[place:place + 4]).removeprefix(b"data: "))
        assert chunk["choices"][0]["delta"]["content"] == SAID[place:place + 4]
        if "molmo2" in chunk:
            counts.append([one["id"] for one in chunk["molmo2"]["points"]])
    assert counts == [["1"], ["1", "2"]]


def test_points_chosen_among_visual_tokens_have_labels_and_come_once_their_id_is_complete():
    model = dataclasses.replace(config.nano(), pointer=config.PointerConfig(width=16))
    tokenizer = tokenizers.train_small(["red dot"], model.text.vocab_size)
    frames = types.Frames(np.zeros((2, 72, 72, 3), np.uint8), np.array([0.0, 0.5]), 180, 90, 1.0, 2.0)
    crops = crops_lib.crops_of_frames(frames, model, config.InputConfig(), tokenizer)
    cells = grounded.cells_of(crops, *map(model.special_id, ("<im_patch>", "<im_low>")))
    media = dataclasses.replace(frames.media, cells=cells)
    said = grounded.format_points([(0.5, [(0.1, 0.1)] * 10)], "red dot", cells=cells, image_of=lambda _: 1)
    found = replies.points(said, media)
    assert [one["id"] for one in found] == [str(n) for n in range(1, 11)]
    assert {(one["label"], one["frame_time"]) for one in found} == {("red dot", 0.5)}
    assert abs(found[0]["x"] - 18) <= 180 / 9 / 6 and abs(found[0]["y"] - 9) <= 90 / 9 / 6
    ids = [replies.points(said[:end], media, is_partial=True) for end in range(len(said))]
    assert all([one["id"] for one in part] == [str(n + 1) for n in range(len(part))] for part in ids)
    assert len(ids[-1]) == 10
