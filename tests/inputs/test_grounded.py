"""Points as choices: labels of the specification, round trips, texts, sequences."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import annotations
from data_pipelines import fields
from data_pipelines import formats
from molmo2_jax import config as config_lib
from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import points
from molmo2_jax.inputs import sequence
from molmo2_jax.inputs import tokenizer as tokenizers

FULL = config_lib.molmo_point_8b()
INPUTS = config_lib.InputConfig()
NANO = dataclasses.replace(config_lib.nano(), pointer=config_lib.PointerConfig(width=16))


class Words:
    """A tokenizer of letters, for layouts alone."""
    def __init__(self, config):
        self.special = {text: config.special_id(text) for text in config_lib.SPECIAL_TOKENS}
        self.reserved = ()

    def encode(self, text):
        return [ord(letter) % 100 for letter in text]


def cells(crops, config=FULL):
    return grounded.cells_of(crops, config.special_id("<im_patch>"), config.special_id("<im_low>"))


def image(height, width, config=FULL, inputs=INPUTS, count=1):
    pixels = [np.zeros((height, width, 3), np.uint8)] * count
    return crops_lib.crops_of_images(pixels, config, inputs, Words(config))


def video(count, config=FULL):
    side = config.vision.image_size
    frames = types.Frames(pixels=np.zeros((count, side, side, 3), np.uint8), seconds=np.arange(count) / 2,
                          width=640, height=480, duration=count / 2, fps=30.0)
    return crops_lib.crops_of_frames(frames, config, INPUTS, Words(config)), frames.media


def test_labels_are_those_of_the_specification():
    wide = image(378, 640)      # tiling 1 x 2, stitched 27 x 46
    assert wide.grids[0].shape == (27, 46)
    assert cells(wide).choice(0, 0.5, 0.25) == (276, 1, 2)
    square = cells(image(378, 378))
    assert square.choice(0, 0, 0) == (196, 0, 0) and square.choice(0, 1, 1) == (391, 0, 8)
    of_video = cells(video(5)[0])
    assert of_video.choice(4, 0.5, 0.5) == (364, 4, 4)
    assert of_video.choice(0, 0.999, 0.001) == (8, 2, 6)
    assert of_video.choice(0, 1 / 3, 2 / 3) == (57, 0, 0)


def test_positions_outside_are_clipped_and_others_refused():
    one = cells(image(378, 378))
    assert one.choice(0, -0.2, 1.7) == one.choice(0, 0, 1)
    with pytest.raises(ValueError, match=r"coordinates must be finite; got \(nan, 0\)"):
        one.choice(0, np.nan, 0)


@pytest.mark.parametrize("made", [image(378, 378), image(378, 640), image(1000, 300),
                                  image(500, 900, count=3), video(4)[0]])
def test_a_point_comes_back_within_half_a_cell(made):
    one, rng = cells(made), np.random.default_rng(0)
    places = [*rng.random((100, 2)), (0, 0), (1, 1), (0, 1)]
    for number, grid in enumerate(made.grids):
        h, w = grid.shape
        edges = [(n / w + by, m / h + by) for n, m in rng.integers(0, (w + 1, h + 1), (9, 2))
                 for by in (-1e-12, 0, 1e-12)]
        for x, y in places + edges:
            chosen = one.choice(number, x, y)
            back = one.position(chosen)
            assert back[0] == number and one.choice(*back) == chosen
            assert abs(back[1] - np.clip(x, 0, 1)) <= 1 / (6 * w) + 1e-9
            assert abs(back[2] - np.clip(y, 0, 1)) <= 1 / (6 * h) + 1e-9


def test_every_choice_has_a_place_of_its_own():
    made = image(378, 640)
    one, seen = cells(made), set()
    for row, slots in enumerate(made.pooled):
        for slot, patch in enumerate(slots):
            back = one.position((row, slot, 4))
            is_there = row >= 196 and patch >= 0   # the overview cannot be chosen
            assert (back is not None) == is_there
            if is_there:
                seen.add(back)
    assert len(seen) == 27 * 46
    assert one.position((10**6, 0, 0)) is None and one.position((200, 9, 0)) is None


def test_texts_are_ordered_by_choice_end_once_and_are_read_back():
    made, media = video(3)
    one = cells(made)
    how = {"cells": one, "image_of": lambda seconds: round(seconds * 2)}
    text = grounded.format_points([(1.0, [(0.9, 0.5), (0.1, 0.5)]), (0.0, [(0.5, 0.5)])], "a dog", **how)
    plain, choices = grounded.split(text)
    point = "<|token_index|><|vit_index|><|vit_loc|>"
    assert plain == f'<points coords="{point}1{point}2{point}3<|token_index|>">a dog</point>'
    assert choices[-1] == types.NO_MORE and choices[0] < choices[3] < choices[6] < 3 * 81
    assert grounded.join(plain, choices) == text
    found = grounded.parse(text, one, media)
    assert [(p.index, p.id) for p in found] == [(0.0, "1"), (1.0, "2"), (1.0, "3")]
    np.testing.assert_allclose([(p.x / 640, p.y / 480) for p in found],
                               [(0.5, 0.5), (0.1, 0.5), (0.9, 0.5)], atol=1 / 162 + 1e-9)
    assert grounded.parse(text[:text.index("3<")], one, media) == found[:2]   # cut off before an id
    assert grounded.format_points([], "a dog", **how) == "There are none."
    frames = [(0.0, {"b": (0.9, 0.9), "a": (0.1, 0.1)}), (0.5, {"b": None, "a": (0.2, 0.1)}),
              (1.0, {"b": (0.1, 0.1)})]
    tracks = grounded.format_tracks(frames, "cars", **how)
    assert [p.id for p in grounded.parse(tracks, one, media)] == ["1", "2", "1", "2"]
    assert tracks.startswith("<tracks ") and tracks.endswith(">cars</point>")


@pytest.mark.parametrize("count", [0, 3])
def test_choices_are_written_as_coordinates_that_scores_read(count):
    """count: images; 0 for a video."""
    if count:
        made = image(500, 900, count=count)
        media, how = types.Media(sizes=[(900, 500)] * count), {"image_of": lambda index: index - 1}
        groups = [(1, [(0.9, 0.5), (0.1, 0.5)]), (3, [(0.5, 0.5)])]
    else:
        (made, media), how = video(3), {"image_of": lambda seconds: round(seconds * 2)}
        groups = [(0.0, [(0.5, 0.5)]), (1.0, [(0.1, 0.5), (0.9, 0.5)])]
    one = cells(made)
    text = points.format_point_count(groups, "dogs", grounded.format_points, cells=one, **how)
    written = grounded.numbered(text, one, media)
    size = {"sizes": media.sizes} if count else dict(zip(("width", "height"), media.sizes[0]))
    read, chosen = points.parse_points(written, **size), grounded.parse(text, one, media)
    assert [(p.index, p.id) for p in read] == [(p.index, p.id) for p in chosen] and len(read) == 3
    np.testing.assert_allclose([(p.x, p.y) for p in read], [(p.x, p.y) for p in chosen], atol=0.5)
    assert points.read_count(written) == 3 and "vit_index" not in written
    media = dataclasses.replace(media, cells=one)
    answer = generate.read_answer(text, media)
    answered = evaluate.Answered(example=types.Example(annotations=()), media=media, answer=answer,
                                 question=generate.Question(turns=("Count dogs.",)))
    assert answered.text == written and [p.id for p in answer.points] == ["1", "2", "3"]
    assert "vit_index" not in grounded.numbered(text[:text.index("3<")], one, media)
    for broken in ("There are none.", '<points coords="', '<points coords="<|token_index:9999|>', "coords"):
        assert points.parse_points(grounded.numbered(broken, one, media), **size) == []


def test_an_annotation_becomes_a_sequence_whose_tokens_carry_choices():
    example = types.Example(video="a.mp4", key="a:1", annotations=(
        annotations.Points(label="Dog", points=(annotations.Point(id=1, x=0.5, y=0.5, time=0.5),),
                           scale=(1, 1), modes=("point_count",)),))
    tokenizer = tokenizers.train_small(["Counting the dog shows a total of 1."], NANO.text.vocab_size)
    side = NANO.vision.image_size
    frames = types.Frames(pixels=np.zeros((3, side, side, 3), np.uint8), seconds=np.arange(3) / 2, width=640,
                          height=480, duration=1.5, fps=30.0)
    made = crops_lib.crops_of_frames(frames, NANO, INPUTS, tokenizer)
    media = dataclasses.replace(frames.media, cells=cells(made, NANO))
    rng = np.random.default_rng(0)
    [branch] = formats.to_branches(example, media=media, rng=rng, asking=formats.PLAIN)
    flat = sequence.build(made, [branch], tokenizer)
    held = {name: flat.choice[flat.tokens == NANO.special_id(name)].tolist() for name in grounded.TOKENS}
    row, slot, cell = media.cells.choice(1, 0.5, 0.5)
    assert held == {"<|token_index|>": [row, types.NO_MORE], "<|vit_index|>": [types.inner(slot)],
                    "<|vit_loc|>": [types.inner(cell)]}
    assert (flat.choice == -1).sum() == len(flat.tokens) - 4
    learnt = flat.targets[flat.weights > 0]
    assert [NANO.special_id(name) in learnt for name in grounded.TOKENS] == [True] * 3
    text = dataclasses.replace(formats.PLAIN, grammar="text")
    [branch] = formats.to_branches(example, media=media, rng=rng, asking=text)
    assert 'coords="0.5 1 500 500"' in branch.turns[1]
    assert sequence.build(made, [branch], tokenizer).choice is None
    tokens = dataclasses.replace(formats.PLAIN, grammar="tokens")
    with pytest.raises(ValueError, match="needs a model with config.PointerConfig"):
        formats.to_branches(example, media=frames.media, rng=rng, asking=tokens)


def test_users_cannot_write_choices():
    with pytest.raises(ValueError, match="special tokens"):
        fields.text("Here: <|token_index:3|>", "answer")
    branch = types.Branch(turns=("<|token_index:3|>", "<|vit_index:2|> b"))
    tokenizer = tokenizers.train_small(["a b"], NANO.text.vocab_size)
    with pytest.raises(ValueError, match="special tokens"):
        sequence.build(None, [dataclasses.replace(branch, turns=("<|token_index|>", "b"))], tokenizer)
    flat = sequence.build(None, [branch], tokenizer)   # of a user, it is text
    assert (flat.choice != -1).sum() == 1
