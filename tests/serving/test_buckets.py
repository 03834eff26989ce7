"""Buckets: few of them, and one for whatever media a server accepts."""

import dataclasses

import numpy as np
import pytest

from molmo2_jax import types
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.serving import buckets
from tests import test_generate

CONFIG, INPUTS = test_generate.CONFIG, dataclasses.replace(test_generate.INPUTS, max_crops=4, max_images=3)


def of_model(**options):
    return buckets.of_model(CONFIG, INPUTS, test_generate.tokenizer(), most_tokens=4096, **options)


def roots():
    """Yields roots of videos, of pictures of all shapes, and of several pictures."""
    tokenizer, pixels = test_generate.tokenizer(), lambda h, w: np.zeros((h, w, 3), np.uint8)
    for count in range(1, INPUTS.max_frames + 1):
        frames = types.Frames(np.zeros((count, 72, 72, 3), np.uint8), 1000.0 + np.arange(count), 72, 72, 5.0,
                              1.0)
        yield sequences.root(crops_lib.crops_of_frames(frames, CONFIG, INPUTS, tokenizer), tokenizer)
    for shape in ((72, 72), (72, 600), (600, 72), (300, 300), (50, 130)):
        for count in range(1, INPUTS.max_images + 1):
            images = [pixels(*shape)] * count
            yield sequences.root(crops_lib.crops_of_images(images, CONFIG, INPUTS, tokenizer), tokenizer)


@pytest.mark.parametrize("options", [{}, {"step": 4}, {"counts": (6,)}, {"parts": 4}, {"counts": (3, 100)}])
def test_a_bucket_holds_whatever_media_there_may_be(options):
    shapes = of_model(**options)
    assert all(shape.M % options.get("parts", 1) == 0 for shape in shapes) and len(set(shapes)) == len(shapes)
    for root in roots():
        shape = buckets.choose(shapes, root)
        assert len(root.tokens) <= shape.T and len(root.patches) <= shape.M and len(root.pooled) <= shape.R
        smaller = [one for one in shapes if one.M < shape.M and one.W == shape.W]
        assert all(len(root.patches) > one.M or len(root.pooled) > one.R or len(root.tokens) > one.T
                   for one in smaller)


def test_media_beyond_every_bucket_are_refused_with_the_numbers():
    *_, largest = roots()
    small = [types.RowShape(T=128, M=2, R=64, W=9)]
    with pytest.raises(buckets.TooLarge, match=r"fit 2 crops and 128 tokens; got \d+ and \d+"):
        buckets.choose(small, largest)
