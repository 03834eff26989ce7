"""The two-vector mask against the reference's rule on random packs, and tiles against brute force."""

import jax
import numpy as np
import pytest

from molmo2_jax.attention import tree_mask
from tests import packs

CONFIG = packs.random_config("qwen3", 0)
T = 96


@pytest.mark.parametrize("visual_attention", ["image_tokens", "within_image", "causal"])
@pytest.mark.parametrize("seed", range(10))
def test_two_vectors_say_what_the_reference_says(seed, visual_attention):
    batch = packs.random_rows(seed, CONFIG, 3, T)
    valid = batch.example >= 0
    ours = np.asarray(tree_mask.dense(tree_mask.from_batch(batch, visual_attention)))
    theirs = packs.seen_by_the_reference(batch, visual_attention)
    np.testing.assert_array_equal(ours[valid], theirs[valid])
    np.testing.assert_array_equal(ours[~valid], np.broadcast_to(np.eye(T, dtype=bool), ours.shape)[~valid])


def test_the_picture_in_the_docstring_is_true():
    mask = tree_mask.TreeMask(np.array([[7, 7, 7, 5, 5, 7, 7]]), np.array([[0, -1, 0, -1, -1, -1, -1]]))
    drawn = """
        x . x . . . .
        x x . . . . .
        x x x . . . .
        x x x x . . .
        x x x x x . .
        x x x . . x .
        x x x . . x x"""
    wanted = np.array([[c == "x" for c in line.split()] for line in drawn.split("\n") if line.strip()])
    np.testing.assert_array_equal(np.asarray(tree_mask.dense(mask))[0], wanted)


@pytest.mark.parametrize("tiles", [(8, 8), (16, 8), (8, 24), (32, 16)])
@pytest.mark.parametrize("visual_attention", ["image_tokens", "within_image", "causal"])
def test_tile_classes_equal_brute_force(tiles, visual_attention):
    query_tile, key_tile = tiles
    i = np.arange(T)
    count = dict.fromkeys((tree_mask.SKIP, tree_mask.FULL, tree_mask.INTERVAL, tree_mask.VISUAL), 0)
    classify = jax.jit(tree_mask.tile_classes, static_argnums=(1, 2))
    for seed in range(6):
        batch = packs.random_rows(seed, CONFIG, 2, T)
        mask = tree_mask.from_batch(batch, visual_attention)
        dense = np.asarray(tree_mask.dense(mask))
        interval = (i[None, :] <= i[:, None]) & (i[:, None] < mask.end[:, None, :])
        for (b, q, k), kind in np.ndenumerate(np.asarray(classify(mask, query_tile, key_tile))):
            where = (b, slice(q * query_tile, (q + 1) * query_tile), slice(k * key_tile, (k + 1) * key_tile))
            assert (kind == tree_mask.SKIP) == (not dense[where].any()), (seed, b, q, k)
            if kind == tree_mask.FULL:
                assert dense[where].all()
            if kind == tree_mask.INTERVAL:
                np.testing.assert_array_equal(dense[where], interval[where])
            count[int(kind)] += 1
    assert count[tree_mask.SKIP] and count[tree_mask.INTERVAL]
    assert bool(count[tree_mask.VISUAL]) == (visual_attention != "causal")
    assert count[tree_mask.FULL] or tiles != (8, 8)  # small tiles fit between the borders


def test_a_work_list_names_each_needed_tile_once_query_by_query():
    batch = packs.random_rows(3, CONFIG, 2, T)
    classes = np.asarray(tree_mask.tile_classes(tree_mask.from_batch(batch, "image_tokens"), 16, 16))
    words, count = tree_mask.work_list(classes)
    listed = [tuple(int(x) for x in tree_mask.unpack(word)) for word in words[:int(count)]]
    assert listed == [(*at, kind) for at, kind in np.ndenumerate(classes) if kind != tree_mask.SKIP]
    assert not np.any(np.asarray(words)[int(count):])


def test_a_work_list_holds_its_largest_tile():
    word = (63 << 26) | (2047 << 15) | (2047 << 4) | 3
    unpacked = tree_mask.unpack(np.array([word], np.uint32).view(np.int32)[0])
    assert tuple(int(x) for x in unpacked) == (63, 2047, 2047, 3)


def test_more_rows_than_a_word_can_name_are_refused():
    with pytest.raises(ValueError, match="64 rows and 2048 tiles.*65 rows"):
        tree_mask.work_list(np.zeros((65, 1, 1), np.int32))
