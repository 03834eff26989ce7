"""Joins sequences into a row, and checks the invariants of rows. packers.py chooses what shares a row.

B rows, T tokens, M crops of P patches of C values, R pooled rows of W patches.
Source: reference: olmo/data/dynamic_packer.py; attention/tree_mask.py explains the two vectors from which the
attention mask follows.
"""

from collections.abc import Sequence as Listing

import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import types


def join(sequences: Listing[types.Sequence], shape: types.RowShape,
         patch_shape: tuple[int, int] | None = None, has_choices: bool = False) -> types.Batch:
    """Returns a Batch of one row (B = 1): the sequences one after the other, then padding.

    patch_shape: (P, C); needed only if no sequence of the row has crops.
    has_choices: for a model with a pointer; without, sequences have no choices, and `choice` is None.

    Raises:
      ValueError: the sequences exceed a budget or differ in patch shape, or the row breaks an invariant.
    """
    used = {"T": sum(len(one.tokens) for one in sequences), "M": sum(len(one.patches) for one in sequences),
            "R": sum(len(one.pooled) for one in sequences),
            "W": max((one.pooled.shape[1] for one in sequences if len(one.pooled)), default=0)}
    limits = shape._asdict()
    over = [f"{name} = {used[name]} of {limits[name]}" for name in limits if used[name] > limits[name]]
    if over:
        raise ValueError(f"sequences must fit the row; got {', '.join(over)}")
    shapes = {one.patches.shape[1:] for one in sequences if len(one.patches)}
    shapes |= {tuple(patch_shape)} if patch_shape is not None else set()
    if len(shapes) != 1:
        raise ValueError("the patches of a row must have one shape (P, C), given by patch_shape if no "
                         f"sequence has crops; got {sorted(shapes)}")
    row = _empty_row(shape, shapes.pop(), has_choices)
    state = {"token": 0, "crop": 0, "pooled": 0, "group": 0, "image": 0}
    for number, one in enumerate(sequences):
        _place(row, one, number, state)
    batch = types.Batch(**{name: None if value is None else value[None] for name, value in row.items()})
    check_invariants(batch)
    return batch


def join_for(model: config_lib.Molmo2Config, sequences: Listing[types.Sequence], shape: types.RowShape
             ) -> types.Batch:
    """Returns `join` of sequences as a model reads them: its patch shape, and choices if it has a pointer."""
    return join(sequences, shape, model.vision.patch_shape, model.pointer is not None)


def _empty_row(shape: types.RowShape, patch_shape: tuple[int, int], has_choices: bool = False
               ) -> dict[str, np.ndarray]:
    """Returns the fields of a row of padding, without the batch axis."""
    absent = dict.fromkeys(("group", "image", "example", "branch", "pooled", "choice"), -1)
    row = {name: np.full(spec.shape[1:], absent.get(name, 0), spec.dtype)
           for name, spec in types.batch_shapes(1, shape, patch_shape, has_choices)._asdict().items()
           if spec is not None}
    row["end"] += np.arange(1, shape.T + 1, dtype=np.int32)
    return row


def _place(row: dict[str, np.ndarray], one: types.Sequence, number: int, state: dict[str, int]) -> None:
    """Writes a sequence into the row at the offsets in `state`, and advances them."""
    length, crops, pooled = len(one.tokens), len(one.patches), len(one.pooled)
    place = slice(state["token"], state["token"] + length)
    for name in ("tokens", "targets", "weights", "positions", "branch"):
        row[name][place] = getattr(one, name)
    row["example"][place] = number
    if one.choice is not None:
        is_row = (one.choice >= 0) & (one.choice < types.NO_MORE)
        row["choice"][place] = one.choice + np.where(is_row, state["pooled"], 0)
    row["end"][place] = state["token"] + _ends(one.branch)
    is_visual = one.image >= 0
    if is_visual.any():
        row["group"][place] = np.where(is_visual, state["group"], -1)
        row["image"][place] = np.where(is_visual, state["image"] + one.image, -1)
        state["group"] += 1
        state["image"] += int(one.image.max()) + 1
    if crops:
        P = one.patches.shape[1]
        row["patches"][state["crop"]:state["crop"] + crops] = one.patches
        shifted = np.where(one.pooled >= 0, one.pooled + state["crop"] * P, -1)
        row["pooled"][state["pooled"]:state["pooled"] + pooled, :one.pooled.shape[1]] = shifted
    state["token"] += length
    state["crop"] += crops
    state["pooled"] += pooled


def _ends(branch: np.ndarray) -> np.ndarray:
    """Returns int[T]: the index after the last token of each token's branch; T for tokens of the root."""
    if not len(branch):
        return np.zeros(0, np.int32)
    borders = np.append(np.flatnonzero(np.diff(branch)) + 1, len(branch))
    ends = borders[np.searchsorted(borders, np.arange(len(branch)), side="right")]
    return np.where(branch < 0, len(branch), ends)


def stack(rows: Listing[types.Batch]) -> types.Batch:
    """Returns one batch of all rows.

    Raises:
      ValueError: there is no row, or shapes differ between rows.
    """
    if not rows:
        raise ValueError("a batch must have at least one row; got none")
    joined = {}
    for name, parts in zip(types.Batch._fields, zip(*rows, strict=True), strict=True):
        shapes = {None if part is None else part.shape[1:] for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"rows of a batch must have one shape of {name}; got {sorted(map(str, shapes))}")
        joined[name] = None if parts[0] is None else np.concatenate(parts)
    return types.Batch(**joined)


def _require(is_right: np.ndarray, rule: str, got: np.ndarray) -> None:
    """Raises ValueError for the first [row, position] at which a rule is broken."""
    if not is_right.all():
        row, position = np.argwhere(~is_right)[0]
        raise ValueError(f"{rule}; row {row}, position {position} has {got[row, position]}")


def check_invariants(batch: types.Batch) -> None:
    """Checks the invariants that the attention mask and the model rely on (numpy, on the host).

    Raises:
      ValueError: an invariant is broken; the message names it, and the row and position of the first case.
    """
    position = np.arange(batch.tokens.shape[1])[None]
    is_valid = batch.example >= 0
    before = np.pad(batch.example, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    is_first = is_valid & (batch.example != before)
    branch_before = np.pad(batch.branch, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    is_border = is_first | (is_valid & (batch.branch != branch_before))
    _check_order(batch, is_valid, before, is_first, branch_before, is_border)
    example_start = np.maximum.accumulate(np.where(is_first, position, 0), axis=1)
    _check_ends(batch, position, is_valid, is_first, is_border, example_start)
    _check_visual(batch, position, is_valid, example_start)
    _check_values(batch, is_valid)
    if batch.choice is not None:
        R = batch.pooled.shape[1]
        _require((batch.choice == -1) | is_valid & ((batch.choice < R) | (batch.choice == types.NO_MORE)),
                 f"a choice must be a row 0 ... {R - 1} of pooled, a slot or cell, or NO_MORE", batch.choice)


def _check_order(batch, is_valid, before, is_first, branch_before, is_border) -> None:
    follows = is_valid & ((batch.example == before) | (batch.example == before + 1))
    was_valid = np.pad(is_valid, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    _require(~is_valid | was_valid, "padding must come last", batch.example)
    _require(~is_valid | follows, "examples must be contiguous and numbered 0, 1, ...", batch.example)
    _require(is_valid | (batch.branch == -1), "padding must have branch -1", batch.branch)
    _require(~is_first | (batch.branch == -1), "an example must begin with its root, branch -1",
             batch.branch)
    next_branch = ~is_border | is_first | (batch.branch == branch_before + 1)
    _require(next_branch, "branches must be contiguous and numbered 0, 1, ... after their root",
             batch.branch)


def _next_border(is_border: np.ndarray) -> np.ndarray:
    """Returns int[B, T]: the first border after each position; T if there is none."""
    T = is_border.shape[1]
    places = np.where(is_border, np.arange(T)[None], T)
    after = np.pad(places[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    return np.minimum.accumulate(after[:, ::-1], axis=1)[:, ::-1]


def _check_ends(batch, position, is_valid, is_first, is_border, example_start) -> None:
    is_pad_start = ~is_valid & np.pad(is_valid, ((0, 0), (1, 0)))[:, :-1]
    example_end = _next_border(is_first | is_pad_start)
    branch_end = _next_border(is_border | is_pad_start)
    end = np.where(is_valid, np.where(batch.branch < 0, example_end, branch_end), position + 1)
    _require(batch.end == end, "end must be the end of the branch, of the example for a root token, and "
             "position + 1 for padding", batch.end)
    root_length = np.take_along_axis(branch_end, example_start, axis=1) - example_start
    branch_start = np.maximum.accumulate(np.where(is_border, position, 0), axis=1)
    offset = position - branch_start + np.where(batch.branch < 0, 0, root_length)
    _require(batch.positions == np.where(is_valid, offset, 0),
             "positions must restart in every example, and after the root in every branch", batch.positions)


def _check_visual(batch, position, is_valid, example_start) -> None:
    is_visual = batch.group >= 0
    _require(~is_visual | (is_valid & (batch.branch < 0)), "visual tokens must be in roots", batch.group)
    last = np.maximum.accumulate(np.where(is_visual, position, -1), axis=1)
    last_before = np.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    is_first = is_visual & (last_before < example_start)
    group = np.where(is_visual, np.cumsum(is_first, axis=1) - 1, -1)
    _require(batch.group == group, "group must number the examples that have visual tokens, at these "
             "tokens, and be -1 elsewhere", batch.group)
    _require((batch.image >= 0) == is_visual, "image must be >= 0 exactly where group is", batch.image)
    highest = np.maximum.accumulate(np.pad(batch.image, ((0, 0), (1, 0)), constant_values=-1), axis=1)[:, :-1]
    is_next = batch.image == highest + 1
    _require(~is_visual | is_next | ((batch.image == highest) & ~is_first),
             "image must number the images and frames of a row 0, 1, ...", batch.image)


def _check_values(batch, is_valid) -> None:
    for name in ("tokens", "targets"):
        value = getattr(batch, name)
        _require(np.where(is_valid, value >= 0, value == 0), f"{name} must be ids >= 0, and 0 at padding",
                 value)
    weights = batch.weights
    _require(np.isfinite(weights) & (weights >= 0) & (is_valid | (weights == 0)),
             "weights must be finite, >= 0, and 0 at padding", weights)
    _, M, P, _ = batch.patches.shape
    in_range = (batch.pooled >= -1) & (batch.pooled < M * P)
    _require(in_range.all(-1), f"pooled must name patches 0 ... {M * P - 1}, or -1", batch.pooled)
    is_used = (batch.pooled >= 0).any(-1)
    was_used = np.pad(is_used, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    _require(~is_used | was_used, "pooled rows in use must come first", batch.pooled)
