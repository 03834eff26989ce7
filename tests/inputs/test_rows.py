"""Rows of packed sequences: contents, masks, invariants."""

import json
import pathlib

import numpy as np
import pytest

from molmo2_jax import types
from molmo2_jax.inputs import rows as rows_lib

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "goldens/packer/cases.json").read_text())
P, C, W = 4, 3, 4


def random_sequence(rng, *, is_text=False, num_branches=None):
    """A valid sequence: BOS, images separated by text, then branches (0: a single conversation)."""
    image = [-1]
    num_images = 0 if is_text else int(rng.integers(1, 4))
    for number in range(num_images):
        image += [-1] * int(rng.integers(0, 3)) + [number] * int(rng.integers(1, 6))
    num_branches = int(rng.integers(0, 4)) if num_branches is None else num_branches
    branch = [-1] * len(image)
    positions = list(range(len(image)))
    for number in range(max(1, num_branches)):
        length = int(rng.integers(1, 7))
        branch += [number if num_branches else -1] * length
        positions += range(positions[-1] + 1 if not num_branches else len(image), 10**6)[:length]
    length = len(branch)
    image = np.array(image + [-1] * (length - len(image)), np.int32)
    pooled = rng.integers(-1, num_images * P, (int((image >= 0).sum()), int(rng.integers(1, W + 1))))
    pooled[:, 0] = np.maximum(pooled[:, 0], 0)
    return types.Sequence(
        tokens=rng.integers(1, 100, length, dtype=np.int32), branch=np.array(branch, np.int32),
        targets=rng.integers(1, 100, length, dtype=np.int32), weights=rng.random(length, np.float32),
        positions=np.array(positions, np.int32), image=image, pooled=pooled.astype(np.int32),
        patches=rng.integers(0, 256, (num_images, P, C), dtype=np.uint8))


def random_row(rng, count=4, T=160):
    sequences = [random_sequence(rng, is_text=rng.random() < 0.3) for _ in range(count)]
    return sequences, rows_lib.join(sequences, types.RowShape(T=T, M=16, R=90, W=W), (P, C))


@pytest.mark.parametrize("case", GOLDENS["pack"], ids=lambda case: f"{len(case['examples'])} examples")
def test_rows_equal_the_recorded_concatenations(case):
    """The recorded arrays are random, so the row is compared before its invariants are checked."""
    sequences = [_recorded(example) for example in case["examples"]]
    packed = case["packed"]
    length, crops = len(packed["input_tokens"]), len(packed.get("images", []))
    pooled = np.array(packed.get("token_pooling", np.zeros((0, 4))))
    row = rows_lib._empty_row(types.RowShape(length, max(crops, 1), max(len(pooled), 1), 9), (9, 3))
    state = dict.fromkeys(("token", "crop", "pooled", "group", "image"), 0)
    for number, one in enumerate(sequences):
        rows_lib._place(row, one, number, state)
    np.testing.assert_array_equal(row["tokens"], packed["input_tokens"])
    np.testing.assert_array_equal(row["targets"], packed["target_tokens"])
    np.testing.assert_array_equal(row["positions"], packed["position_ids"])
    np.testing.assert_allclose(row["weights"], packed["loss_masks"], rtol=1e-6)
    np.testing.assert_array_equal(row["patches"][:crops], np.array(packed.get("images", np.zeros((0, 9, 3)))))
    np.testing.assert_array_equal(row["pooled"][:len(pooled), :pooled.shape[1]], pooled)
    assert np.all(row["pooled"][:, pooled.shape[1]:] == -1)
    has_branches = np.array([(one.branch >= 0).any() for one in sequences])
    local = np.where(row["branch"] < 0, 10000 * has_branches[row["example"]], row["branch"])
    np.testing.assert_array_equal(row["example"] * 100000 + local, packed["subsegment_ids"])


def _recorded(example):
    length = len(example["input_tokens"])
    local = np.array(example.get("subsegment_ids", [10000] * length))
    return types.Sequence(
        tokens=np.array(example["input_tokens"], np.int32), image=np.full(length, -1, np.int32),
        targets=np.array(example["target_tokens"], np.int32),
        weights=np.array(example["loss_masks"], np.float32),
        positions=np.array(example["position_ids"], np.int32),
        branch=np.where(local == 10000, -1, local).astype(np.int32),
        patches=np.array(example.get("images", np.zeros((0, 9, 3))), np.uint8),
        pooled=np.array(example.get("token_pooling", np.zeros((0, 4))), np.int32))


def dense_rule(sequences, T):
    """Returns bool[T, T]: the attention mask, from subsegment ids as the reference writes them."""
    sub, visual = np.full(T, -1), np.zeros(T, bool)
    place = 0
    for number, one in enumerate(sequences):
        part = slice(place, place + len(one.tokens))
        is_tree = (one.branch >= 0).any()
        sub[part] = 100000 * number + np.where(one.branch < 0, 10000 if is_tree else 0, one.branch)
        visual[part] = one.image >= 0
        place = part.stop
    query, key = np.arange(T)[:, None], np.arange(T)[None]
    same_example = sub[:, None] // 100000 == sub[None] // 100000
    both_visual = visual[:, None] & visual[None] & same_example
    return (sub >= 0)[None] & (sub[:, None] <= sub[None]) & ((key <= query) | both_visual)


@pytest.mark.parametrize("seed", range(40))
def test_end_and_group_say_the_same_as_the_dense_rule(seed):
    rng = np.random.default_rng(seed)
    sequences, batch = random_row(rng, count=int(rng.integers(1, 6)))
    end, group = batch.end[0], batch.group[0]
    query, key = np.arange(len(end))[:, None], np.arange(len(end))[None]
    allowed = (key <= query) & (query < end[None])
    allowed |= (group[:, None] == group[None]) & (group[None] >= 0)
    valid = batch.example[0] >= 0
    np.testing.assert_array_equal(allowed[valid], dense_rule(sequences, len(end))[valid])
    np.testing.assert_array_equal(allowed[~valid], np.eye(len(end), dtype=bool)[~valid])


def test_a_row_holds_its_sequences_and_nothing_else():
    rng = np.random.default_rng(5)
    sequences, batch = random_row(rng)
    patches, pooled, images = [], [], 0
    for number, one in enumerate(sequences):
        mine = batch.example[0] == number
        for name in ("tokens", "targets", "weights", "positions", "branch"):
            np.testing.assert_array_equal(getattr(batch, name)[0][mine], getattr(one, name))
        np.testing.assert_array_equal(batch.image[0][mine] - images * (one.image >= 0), one.image)
        images += one.image.max() + 1
        shifted = np.where(one.pooled >= 0, one.pooled + P * sum(map(len, patches)), -1)
        pooled.append(np.pad(shifted, ((0, 0), (0, W - shifted.shape[1])), constant_values=-1))
        patches.append(one.patches)
    patches, pooled = np.concatenate(patches), np.concatenate(pooled)
    np.testing.assert_array_equal(batch.patches[0, :len(patches)], patches)
    np.testing.assert_array_equal(batch.pooled[0, :len(pooled)], pooled)
    assert not batch.patches[0, len(patches):].any() and np.all(batch.pooled[0, len(pooled):] == -1)
    for name in ("tokens", "targets", "weights", "positions"):
        assert not getattr(batch, name)[0][batch.example[0] < 0].any()


def test_join_names_every_broken_budget():
    one = random_sequence(np.random.default_rng(0))
    length, rows = len(one.tokens), len(one.pooled)
    with pytest.raises(ValueError, match=f"got T = {length} of {length - 1}, R = {rows} of {rows - 1}$"):
        rows_lib.join([one], types.RowShape(T=length - 1, M=16, R=rows - 1, W=W))


def test_a_row_of_text_needs_the_shape_of_patches():
    text = random_sequence(np.random.default_rng(0), is_text=True)
    with pytest.raises(ValueError, match=r"shape \(P, C\)"):
        rows_lib.join([text], types.RowShape(T=50, M=2, R=9, W=W))
    assert rows_lib.join([text], types.RowShape(T=50, M=2, R=9, W=W), (P, C)).patches.shape == (1, 2, P, C)


def test_a_row_has_the_shapes_and_dtypes_that_were_announced():
    rng = np.random.default_rng(2)
    shape = types.RowShape(T=150, M=16, R=90, W=W + 2)
    sequences = [random_sequence(rng) for _ in range(3)]
    for held in (sequences, []):
        row = rows_lib.join(held, shape, (P, C))
        announced = types.batch_shapes(1, shape, (P, C))
        assert row.choice is None and announced.choice is None
        assert [(x.shape, x.dtype) for x in row[:-1]] == [(x.shape, x.dtype) for x in announced[:-1]]
        row = rows_lib.join(held, shape, (P, C), has_choices=True)
        announced = types.batch_shapes(1, shape, (P, C), has_choices=True)
        assert [(x.shape, x.dtype) for x in row] == [(x.shape, x.dtype) for x in announced]
    assert rows_lib.stack([row] * 3).pooled.shape == types.batch_shapes(3, shape, (P, C)).pooled.shape


def test_stacked_rows_stay_as_they_are():
    rng = np.random.default_rng(3)
    rows = [random_row(rng)[1] for _ in range(3)]
    batch = rows_lib.stack(rows)
    rows_lib.check_invariants(batch)
    for number, row in enumerate(rows):
        for whole, part in zip(batch[:-1], row[:-1], strict=True):
            np.testing.assert_array_equal(whole[number], part[0])
    with pytest.raises(ValueError, match="one shape of tokens"):
        rows_lib.stack([rows[0], random_row(rng, T=161)[1]])
    with pytest.raises(ValueError, match="at least one row"):
        rows_lib.stack([])


def _broken(batch, name, place, value):
    array = getattr(batch, name).copy()
    array[place] = value
    return batch._replace(**{name: array})


def _two_trees():
    """Row 0 of two: [root 0..., visual, branch 0, branch 1] twice, then padding."""
    rng = np.random.default_rng(11)
    return rows_lib.stack([
        rows_lib.join([random_sequence(rng, num_branches=2) for _ in range(2)],
                      types.RowShape(T=120, M=16, R=90, W=W))
        for _ in range(2)])


@pytest.mark.parametrize("name, rule", [
    ("end", "end must be"), ("group", "group must number|visual tokens must"),
    ("image", "image must"), ("example", "examples must|branches must|padding must"),
    ("branch", "branches must|begin with its root|padding must"), ("positions", "positions must restart"),
    ("tokens", "tokens must be ids"), ("targets", "targets must be ids"),
    ("weights", "weights must be finite")])
def test_any_changed_entry_breaks_an_invariant_by_name(name, rule):
    batch = _two_trees()
    length = int((batch.example[1] >= 0).sum())
    for position in range(batch.tokens.shape[1]):
        is_number = name in ("tokens", "targets", "weights") and position < length
        value = -3 if is_number else getattr(batch, name)[1, position] + 7
        with pytest.raises(ValueError, match=f"({rule}).*row 1, position"):
            rows_lib.check_invariants(_broken(batch, name, (1, position), value))


def test_pooled_rows_must_name_patches_of_the_row_and_come_first():
    batch = _two_trees()
    with pytest.raises(ValueError, match="pooled must name patches 0 ... 63"):
        rows_lib.check_invariants(_broken(batch, "pooled", (1, 0, 0), 64))
    with pytest.raises(ValueError, match="in use must come first; row 1, position 89"):
        rows_lib.check_invariants(_broken(batch, "pooled", (1, 89, 0), 0))


def test_weights_must_be_finite():
    with pytest.raises(ValueError, match="weights must be finite.*row 0, position 3 has nan"):
        rows_lib.check_invariants(_broken(_two_trees(), "weights", (0, 3), np.nan))
