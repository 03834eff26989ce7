"""Choices while answers are written: which tokens may come next, and what the grounding tokens choose.

A point is `<|token_index|>`, `<|vit_index|>`, `<|vit_loc|>` in a row; each chooses from the state of the
token before it. Points ascend: a visual token is not before that of the previous point, and within the same
one slots ascend. "No more points" closes the group; an answer has one. The first token of an answer is none
of the three.

B rows, Q answers per row, R visual tokens, W slots of a pooling window, A tapped width, E pointing width, D
decoder width, p patches of a row.

Source: reference, olmo/models/molmo_point/molmo_point.py (generate). Deliberate difference: a visual token is
not chosen again if it has no filled slot after the last one (the reference tests for the last slot of the
window, and then repeats a point where a window at the border has fewer).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax import types
from molmo2_jax.model import pointer

TEXT, TOKEN_CHOSEN, SLOT_CHOSEN = 0, 1, 2   # what the last token was


class Prompt(NamedTuple):
    """What prompts offer to choose from."""
    key: Any            # [B, R, E], rotated
    selectable: Any     # bool[B, R]
    place: Any          # int32[B, R]
    visual: Any         # [B, R, D]
    features: Any       # [B, p, A]
    pooled: Any         # int32[B, R, W]


class Progress(NamedTuple):
    """Where each answer stands; rows and slots are -1 before the first choice."""
    stage: Any          # int32[B, Q]
    row: Any            # int32[B, Q], of the point being written
    slot: Any           # int32[B, Q]
    last_row: Any       # int32[B, Q], of the last complete point
    last_slot: Any      # int32[B, Q]
    is_closed: Any      # bool[B, Q]
    choice: Any         # int32[B, Q, N], of each token so far, as in types.Batch


def start(num_rows: int, num_questions: int, num_new: int) -> Progress:
    """Returns the Progress of empty answers."""
    none = jnp.full((num_rows, num_questions), -1, jnp.int32)
    return Progress(none * 0, none, none, none, none, none > 0,
                    jnp.full((num_rows, num_questions, num_new), -1, jnp.int32))


def begin(prompt: Prompt, num_questions: int, num_new: int) -> Progress:
    """Returns the Progress of empty answers about prompts; one that offers nothing is closed: no point."""
    empty = start(prompt.selectable.shape[0], num_questions, num_new)
    return empty._replace(is_closed=empty.is_closed | ~prompt.selectable.any(-1, keepdims=True))


def nothing(num_rows: int, shape: types.RowShape, config: config_lib.Molmo2Config, dtype) -> Prompt:
    """Returns the Prompt of rows without visual tokens, of the sizes M, R, W of `shape`."""
    def zeros(*sizes, kind=dtype):
        return jnp.zeros((num_rows, *sizes), kind)

    features = shape.M * config.vision.num_patches, len(config.connector.taps) * config.vision.width
    return Prompt(
        key=zeros(shape.R, config.pointer.width), selectable=zeros(shape.R, kind=bool),
        place=zeros(shape.R, kind=jnp.int32), visual=zeros(shape.R, config.text.width),
        features=zeros(*features), pooled=zeros(shape.R, shape.W, kind=jnp.int32) - 1)


def put(prompt: Prompt, part: Prompt, row) -> Prompt:
    """Returns the Prompt with all of `part`, which is at most as large, from a row on."""
    return Prompt(*(jax.lax.dynamic_update_slice(whole, one.astype(whole.dtype), (row, *[0] * (one.ndim - 1)))
                    for whole, one in zip(prompt, part)))


def written(row_BQ, slot_BQ) -> Progress:
    """Returns a Progress for `fed_back` of tokens that stand in a prompt.

    Args:
      row_BQ: what a `<|token_index|>` chose, and at the `<|vit_index|>` after it the same; -1 elsewhere.
      slot_BQ: what a `<|vit_index|>` chose; -1 elsewhere.
    """
    stage = jnp.where(slot_BQ >= 0, SLOT_CHOSEN, jnp.where(row_BQ >= 0, TOKEN_CHOSEN, TEXT))
    return Progress(stage, row_BQ, slot_BQ, None, None, None, None)


def placed(prompt: Prompt, progress: Progress) -> tuple[Prompt, Progress]:
    """Returns both with rows on the devices that hold their prompts; the progress is everywhere."""
    return (Prompt(*(sharding.constrain(x, "rows", *[None] * (x.ndim - 1)) for x in prompt)),
            sharding.replicate(progress))


def allowed(progress: Progress | None, is_first: bool, config: config_lib.Molmo2Config):
    """Returns bool[B, Q, V + E]: the tokens that may come next; without a progress, bool[V + E] of text."""
    token, slot, cell = map(config.special_id, config_lib.GROUNDING_TOKENS)
    ids = jnp.arange(config.num_logits)
    is_text = ids < config.text.vocab_size
    if progress is None:
        return is_text
    stage = progress.stage[..., None]
    in_text = is_text | ((ids == token) & ~progress.is_closed[..., None] & (not is_first))
    return jnp.where(stage == TOKEN_CHOSEN, ids == slot,
                     jnp.where(stage == SLOT_CHOSEN, ids == cell, in_text))


def choose(prompt: Prompt, progress: Progress, heads: pointer.Heads, tokens_BQ, no_more_E, sub_key,
           config: config_lib.Molmo2Config, count) -> Progress:
    """Returns the progress after new tokens with what they chose.

    Args:
      heads: of the states [B, Q, D] from which the tokens were chosen. sub_key: [B, Q, W, A] -> [B, Q, W, E].
      count: tokens of each answer before this one.
    """
    token, slot, cell = map(config.special_id, config_lib.GROUNDING_TOKENS)
    c, R = config.pointer, prompt.pooled.shape[1]
    last, has_last = progress.last_row, progress.last_row >= 0
    window_BQW = pointer.take(prompt.pooled, last)
    slots = jnp.arange(window_BQW.shape[-1])
    has_more = ((window_BQW >= 0) & (slots > progress.last_slot[..., None])).any(-1)
    rows = jnp.arange(R)
    is_after = jnp.where(has_more, 0, 1)[..., None] + last[..., None] <= rows
    allowed_BQR = prompt.selectable[:, None] & (is_after | ~has_last[..., None])
    place_BQ = jnp.where(has_last, pointer.take(prompt.place, last), 0)
    query_BQE = pointer.rotate(heads.patch_q, place_BQ, c.theta)
    scores = pointer.patch_scores(query_BQE, prompt.key, no_more_E, allowed_BQR, c.scale)
    may_end = has_last | ~allowed_BQR.any(-1)
    scores = scores.at[..., R].set(jnp.where(may_end, scores[..., R], -jnp.inf))
    row = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    ends = row == R

    window_BQW = pointer.take(prompt.pooled, progress.row)
    features_BQWA = pointer.take(prompt.features, window_BQW.reshape(window_BQW.shape[0], -1)).reshape(
        *window_BQW.shape, -1)
    is_free = (progress.row != last)[..., None] | (slots > progress.last_slot[..., None])
    is_free &= window_BQW >= 0
    chosen_slot = jnp.argmax(pointer.sub_scores(heads.sub_q, sub_key(features_BQWA), is_free), axis=-1)
    chosen_slot = chosen_slot.astype(jnp.int32)
    chosen_cell = jnp.argmax(heads.location, axis=-1).astype(jnp.int32)

    is_token, is_slot, is_cell = (tokens_BQ == one for one in (token, slot, cell))
    choice = jnp.where(is_token, jnp.where(ends, types.NO_MORE, row), jnp.where(
        is_slot, types.inner(chosen_slot), jnp.where(is_cell, types.inner(chosen_cell), -1)))
    return Progress(
        stage=jnp.where(is_token & ~ends, TOKEN_CHOSEN, jnp.where(is_slot, SLOT_CHOSEN, TEXT)),
        row=jnp.where(is_token & ~ends, row, progress.row),
        slot=jnp.where(is_slot, chosen_slot, progress.slot),
        last_row=jnp.where(is_cell, progress.row, progress.last_row),
        last_slot=jnp.where(is_cell, progress.slot, progress.last_slot),
        is_closed=progress.is_closed | (is_token & ends),
        choice=progress.choice.at[..., count].set(choice))


def fed_back(prompt: Prompt, progress: Progress, embed_sub):
    """Returns [B, Q, D], what is added to the embeddings of the last tokens.

    Args:
      embed_sub: [B, Q, A] -> [B, Q, D].
    """
    features_BQA = pointer.take(prompt.features, pointer.patch_of(prompt.pooled, progress.row, progress.slot))
    visual_BQD = pointer.take(prompt.visual, progress.row)
    is_token, is_slot = (progress.stage[..., None] == stage for stage in (TOKEN_CHOSEN, SLOT_CHOSEN))
    return jnp.where(is_token, visual_BQD, 0) + jnp.where(is_slot, embed_sub(features_BQA), 0)
