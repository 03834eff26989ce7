"""Properties of the kernels of all platforms, run here by the interpreter with one shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tree_mask
from tests.attention import reference
from tests.attention import rows

B, S, N, K, H = 1, 64, 4, 2, 64

pytestmark = pytest.mark.parametrize("platform", reference.KERNELS)


def tree(examples, visual, length=S):
    """Returns the mask of one row of examples (tokens of the root, of each branch), then padding."""
    end, group = np.arange(1, length + 1, dtype=np.int32), np.full(length, -1, np.int32)
    start = 0
    for number, (root, *branches) in enumerate(examples):
        first = start + root
        end[start:first] = first + sum(branches)
        group[[i for i in visual if start <= i < first]] = number
        for branch in branches:
            end[first:first + branch] = first + branch
            first += branch
        start = first
    return tree_mask.TreeMask(end[None], group[None])


def run(platform, mask, tensors):
    return reference.value_and_gradients(reference.in_small_tiles(platform), *tensors[:3], mask, tensors[3])


def test_two_runs_are_equal_bit_for_bit(platform):
    mask, tensors = rows.random_mask(4, B, S), rows.random_tensors(4, B, S, N, K, H)
    jax.tree.map(np.testing.assert_array_equal, run(platform, mask, tensors), run(platform, mask, tensors))


def test_bfloat16_is_as_close_to_float32_as_dense_attention_in_bfloat16(platform):
    mask, tensors = tree([(25, 10, 8), (14,)], visual=range(3, 18)), rows.random_tensors(3, B, S, N, K, H)
    half = [jnp.asarray(x, jnp.bfloat16) for x in tensors]
    exact = [x.astype(jnp.float32) for x in half]
    wanted = reference.value_and_gradients(reference.dense, *exact[:3], mask, exact[3])
    theirs = reference.value_and_gradients(reference.dense, *half[:3], mask, half[3])
    for one, other, right in zip(run(platform, mask, half), theirs, wanted):
        assert one.dtype == jnp.bfloat16
        error, peer = (float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - right) ** 2))) for x in (one, other))
        assert error <= 2 * peer


def test_examples_and_branches_are_isolated(platform):
    mask = tree([(10, 10, 10), (18,)], visual=[3, 5, 6, 32, 35])
    root, one, other, example, padding = np.split(np.arange(S), [10, 20, 30, 48])
    tensors = rows.random_tensors(0, B, S, N, K, H)
    for asked, hidden in ((one, (other, example, padding)), (other, (one, example, padding)),
                          (example, (root, one, other, padding)), (root, (one, other, example, padding))):
        grad = np.zeros_like(tensors[3])
        grad[:, asked] = 1
        _, *grads = run(platform, mask, (*tensors[:3], grad))
        for x in grads:
            assert not np.asarray(x)[:, np.concatenate(hidden)].any()
            assert np.asarray(x)[:, asked].any()


def test_other_padding_changes_nothing_else(platform):
    mask, tensors = tree([(20, 15, 14)], visual=range(4, 12)), rows.random_tensors(6, B, S, N, K, H)
    others = [np.where(np.arange(S)[:, None, None] < 49, x, 7 * x + 1) for x in tensors]
    for one, other in zip(run(platform, mask, tensors), run(platform, mask, others)):
        np.testing.assert_array_equal(one[:, :49], other[:, :49])


def test_a_branch_in_a_pack_equals_root_and_branch_alone(platform):
    tensors = rows.random_tensors(1, B, S, N, K, H)
    packed = run(platform, tree([(20, 15, 15, 10)], visual=range(3, 18)), tensors)[0]
    kept = np.concatenate([np.arange(20), np.arange(35, 50)])
    moved = [np.pad(x[:, kept], ((0, 0), (0, S - 35), (0, 0), (0, 0))) for x in tensors]
    alone = run(platform, tree([(20, 15)], visual=range(3, 18)), moved)[0]
    np.testing.assert_allclose(packed[:, kept], alone[:, :35], atol=reference.TOLERANCE, rtol=0)


def test_queries_that_see_nothing_in_their_first_tile_are_right(platform):
    """A query tile has the end of one example and the start of the next, with a timestamp between frames."""
    mask = tree([(36,), (28,)], visual=[*range(40, 44), *range(46, 60)])
    classes = np.asarray(jax.jit(tiling_lib.tile_classes, static_argnums=(1, 2))(mask, 16, 32))
    seen = np.asarray(jax.jit(tree_mask.dense)(mask))[0]
    first = {row: 32 * int(np.flatnonzero(classes[0, row])[0]) for row in range(4)}
    assert any(not seen[16 * row:16 * row + 16, at:at + 32].any(1).all() for row, at in first.items())
    reference.assert_equal_to_dense(reference.in_small_tiles(platform), mask,
                                    *rows.random_tensors(2, B, S, N, K, H))


def test_queries_at_the_end_of_a_row_and_single_ones_read_a_cache(platform):
    """As in chunked prefill and decoding: T queries from position `first` attend to all keys."""
    q, k, v, _ = rows.random_tensors(5, 2, S, N, K, H)
    mask = rows.random_mask(5, 2, S)
    whole, seen = jax.jit(reference.dense)(q, k, v, mask), jax.jit(tree_mask.dense)(mask)
    tiling = tiling_lib.Tiling(query_tile=16, key_tile=32, ring=0, interpret=True)

    @jax.jit
    def ask(first, q, group):
        queries = tree_mask.Queries(first, group)
        out = reference.KERNELS[platform](q, k, v, tiling_lib.prepare(mask, queries, tiling), tiling)
        return out, tree_mask.dense(mask, queries)

    for count, first in ((24, (40, 24)), (1, (S - 1, 7))):
        pick = lambda x: np.stack([np.asarray(x)[row, at:at + count] for row, at in enumerate(first)])
        out, visible = ask(np.array(first, np.int32), pick(q), pick(mask.group))
        np.testing.assert_array_equal(visible, pick(seen))
        np.testing.assert_allclose(out, pick(whole), atol=reference.TOLERANCE, rtol=0)
