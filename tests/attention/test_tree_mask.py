"""The two-vector mask against the reference's rule on random packs, and tiles against brute force."""

import jax
import numpy as np
import pytest

from molmo2_jax.attention import tiling
from molmo2_jax.attention import tree_mask
from tests import packs
from tests.attention import rows

CONFIG = packs.random_config("qwen3", 0)
T = 96


@pytest.mark.parametrize("visual_attention", ["image_tokens", "within_image", "causal"])
@pytest.mark.parametrize("seed", range(10))
def test_two_vectors_give_the_mask_of_the_reference(seed, visual_attention):
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
    count = dict.fromkeys((tiling.SKIP, tiling.FULL, tiling.INTERVAL, tiling.VISUAL), 0)
    classify = jax.jit(tiling.tile_classes, static_argnums=(1, 2))
    for seed in range(6):
        batch = packs.random_rows(seed, CONFIG, 2, T)
        mask = tree_mask.from_batch(batch, visual_attention)
        dense = np.asarray(tree_mask.dense(mask))
        interval = (i[None, :] <= i[:, None]) & (i[:, None] < mask.end[:, None, :])
        for (b, q, k), kind in np.ndenumerate(np.asarray(classify(mask, query_tile, key_tile))):
            where = (b, slice(q * query_tile, (q + 1) * query_tile), slice(k * key_tile, (k + 1) * key_tile))
            assert (kind == tiling.SKIP) == (not dense[where].any()), (seed, b, q, k)
            if kind == tiling.FULL:
                assert dense[where].all()
            if kind == tiling.INTERVAL:
                np.testing.assert_array_equal(dense[where], interval[where])
            count[int(kind)] += 1
    assert count[tiling.SKIP] and count[tiling.INTERVAL]
    assert bool(count[tiling.VISUAL]) == (visual_attention != "causal")
    assert count[tiling.FULL] or tiles != (8, 8)  # small tiles fit between the borders


def in_order(classes):
    """Returns (batch, row, column, class) of the tiles of a list: of a row, the full ones first."""
    tiles = [(*at, kind) for at, kind in np.ndenumerate(classes) if kind != tiling.SKIP]
    return sorted(tiles, key=lambda tile: (tile[0], tile[1], tile[3], tile[2]))


def test_a_work_list_names_each_needed_tile_once_query_by_query():
    batch = packs.random_rows(3, CONFIG, 2, T)
    classes = np.asarray(tiling.tile_classes(tree_mask.from_batch(batch, "image_tokens"), 16, 16))
    words, borders = (np.asarray(x) for x in tiling.work_list(classes))
    assert [tuple(map(int, tiling.unpack(word))) for word in words[:borders[-1]]] == in_order(classes)
    assert not np.any(words[borders[-1]:])
    rows_of_tiles = classes.reshape(-1, classes.shape[-1])
    full, needed = (rows_of_tiles == tiling.FULL).sum(1), (rows_of_tiles != tiling.SKIP).sum(1)
    np.testing.assert_array_equal(borders[2::2] - borders[:-1:2], needed)
    np.testing.assert_array_equal(borders[1::2] - borders[:-1:2], full)


def test_a_key_major_list_is_the_transpose_and_flags_mark_the_ends_of_columns():
    classes = np.array([[[1, 0, 2], [0, 0, 3], [2, 0, 0]], [[0, 0, 0], [2, 1, 0], [3, 0, 0]]], np.int32)
    for key_major, wanted in ((False, classes), (True, classes.transpose(0, 2, 1))):
        words, borders = tiling.work_list(classes, key_major)
        words = np.asarray(words)[:int(borders[-1])]
        listed = [tuple(map(int, tiling.unpack(word))) for word in words]
        assert listed == in_order(wanted)
        for word, (b, row, column, kind) in zip(words, listed):
            touching = np.flatnonzero(wanted[b, :, column])
            assert bool(word & tiling.FIRST_OF_COLUMN) == (row == touching[0])
            assert bool(word & tiling.LAST_OF_COLUMN) == (row == touching[-1])
            assert [other for other in range(4) if tiling.is_class(word, other)] == [kind]
        same = [bool(tiling.same_row(*pair)) for pair in zip(words, words[1:])]
        assert same == [one[:2] == other[:2] for one, other in zip(listed, listed[1:])]


def test_the_span_counts_key_tiles_open_at_once():
    diagonal = np.eye(5, dtype=np.int32)[None]
    assert int(tiling.needed_ring(diagonal)) == 1
    diagonal[0, 4, 2] = 1  # tile 2 stays open while 3 and 4 are visited
    assert int(tiling.needed_ring(diagonal)) == 3
    assert int(tiling.needed_ring(np.tril(np.ones((2, 6, 6), np.int32)))) == 6


@pytest.mark.parametrize("tiles", [(128, 128), (128, 512), (512, 256)])
def test_tiles_of_the_kernels_are_exact_on_long_rows(tiles):
    """Where groups have gaps, a tile without visible pairs may be kept, but none is missed."""
    classify = jax.jit(tiling.tile_classes, static_argnums=(1, 2))
    for seed in range(4):
        mask = rows.random_mask(seed, 1, 1024)
        visible = np.asarray(jax.jit(tree_mask.dense)(mask))
        tiled = visible.reshape(1, 1024 // tiles[0], tiles[0], 1024 // tiles[1], tiles[1])
        needed, complete = tiled.any((2, 4)), tiled.all((2, 4))
        classes = np.asarray(classify(mask, *tiles))
        np.testing.assert_array_equal(classes != tiling.SKIP, needed)
        assert complete[classes == tiling.FULL].all()
        gaps = mask._replace(group=np.where(mask.group >= 0, 7 * mask.group + 3, -1))
        with_gaps = np.asarray(classify(gaps, *tiles))
        assert (with_gaps[needed] != tiling.SKIP).all()
        assert complete[with_gaps == tiling.FULL].all()


def test_causal_masks_packed_documents_and_everything_are_special_cases():
    i, j = np.arange(6)[:, None], np.arange(6)[None, :]
    np.testing.assert_array_equal(tree_mask.dense(tree_mask.causal(1, 6))[0], j <= i)
    assert np.asarray(tree_mask.dense(tree_mask.everything(1, 6))).all()
    segment = np.array([[0, 0, 3, 3, 3, -1], [5, 5, 5, 5, 5, 5]])
    same = (segment[:, :, None] == segment[:, None, :]) & (segment[:, None, :] >= 0)
    np.testing.assert_array_equal(tree_mask.dense(tree_mask.segments(segment)), (same & (j <= i)) | (i == j))


def test_a_work_list_holds_its_largest_tile():
    word = (63 << 26) | (2047 << 15) | (3 << 13) | (2047 << 2) | 3
    unpacked = tiling.unpack(np.array([word], np.uint32).view(np.int32)[0])
    assert tuple(int(x) for x in unpacked) == (63, 2047, 2047, 3)


def test_more_rows_than_a_word_can_name_are_refused():
    with pytest.raises(ValueError, match="64 rows and 2048 tiles.*65 rows"):
        tiling.work_list(np.zeros((65, 1, 1), np.int32))
