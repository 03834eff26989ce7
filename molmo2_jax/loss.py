"""Weighted next-token loss with z-loss, in chunks of positions so that [T, V] logits never exist at once.

B batch, T positions, D width, V vocabulary. Of a model that chooses where to point: N points of a row, R
visual tokens, p patches, W slots of a pooling window, E pointing width, K candidates of a choice.

Source: reference, olmo/train/trainer.py: sums over the global batch divided by its total weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax import types
from molmo2_jax.model import pointer


class Sums(NamedTuple):
    """Weighted sums over a batch; divide by `weight` for means."""
    nll: jax.Array
    z: jax.Array
    correct: jax.Array
    weight: jax.Array


def token_sums(logits_BTV, targets_BT, weights_BT) -> Sums:
    """Returns the weighted sums of cross-entropy, squared log-partition and top-1 hits; float32.

    Targets of weight 0 may lie outside V: in front of a visual token the next token is one.
    """
    targets_BT = jnp.where(weights_BT > 0, targets_BT, 0)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    hit_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return Sums((weights_BT * (log_z_BT - target_BT)).sum(), (weights_BT * log_z_BT**2).sum(),
                (weights_BT * hit_BT).sum(), weights_BT.sum())


def _chunks(xs, size: int):
    """Returns arrays [B, N, ...] as [number of chunks, B, length, ...]: as few chunks of `size` at most as
    possible, equally long, padded."""
    def split(x):
        B, N = x.shape[:2]
        length = -(-N // -(-N // size))
        x = jnp.pad(x, ((0, 0), (0, -N % length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, length, *x.shape[2:]), 1, 0)
    return jax.tree.map(split, xs)


def chunked_sums(hidden_BTD, head, kernel_DV, targets_BT, weights_BT, chunk: int, dtype: str) -> Sums:
    """Returns `token_sums` of `head(hidden, kernel)`, computing and recomputing `chunk` positions at a time.

    On a mesh each device does so for its own positions; the kernel is gathered in `dtype`.
    """
    def of_device(kernel_DV, hidden_BTD, targets_BT, weights_BT):
        @jax.checkpoint
        def step(total, xs):
            hidden, targets, weights = xs
            return jax.tree.map(jnp.add, total, token_sums(head(hidden, kernel_DV), targets, weights)), None

        zero = Sums(*(jnp.zeros((), jnp.float32),) * 4)
        return jax.lax.scan(step, zero, _chunks((hidden_BTD, targets_BT, weights_BT), chunk))[0]

    return sharding.sum_over_tokens(of_device, kernel_DV, ("embed", "vocab"),
                                    (hidden_BTD, targets_BT, weights_BT), dtype)


class Total(NamedTuple):
    """What sums of a whole batch are divided by."""
    weight: jax.Array                # float32[], of tokens
    choices: jax.Array | None        # float32[3], number of each kind; None without a pointer


def total_of(batch: types.Batch, config: config_lib.Molmo2Config) -> Total:
    """Returns the Total of a batch."""
    if batch.choice is None:
        return Total(batch.weights.sum(), None)
    points = pointer.points_of(batch, config)
    there = points.token < batch.tokens.shape[1], points.slot >= 0, points.cell >= 0
    return Total(batch.weights.sum(), jnp.stack([one.sum(dtype=jnp.float32) for one in there]))


def objective(sums: Sums, z_weight: float, total: Total | None = None):
    """Returns (loss, metrics): weighted means over the whole batch; 0 for a batch without loss tokens.

    total: of the whole batch, if `sums` are those of one micro-batch. Losses and metrics of all micro-batches
      then add up to those of the batch.
    """
    divisor = jnp.maximum(sums.weight if total is None else total.weight, 1e-8)
    nll, z = sums.nll / divisor, z_weight * sums.z / divisor
    return nll + z, {"loss": nll, "z_loss": z, "accuracy": sums.correct / divisor, "loss_weight": sums.weight}


def choice_objective(choices: "ChoiceSums", sums: Sums, total: Total | None = None):
    """Returns (loss, metrics) of choices, to be added to those of `objective`; arguments as there.

    Source: reference, olmo/train/trainer.py: all terms have the divisor of the tokens.
    """
    nll = choices.nll / jnp.maximum(sums.weight if total is None else total.weight, 1e-8)
    number = jnp.maximum(choices.number if total is None else total.choices, 1)
    measured = {}
    for place, kind in enumerate(("patch", "subpatch", "location")):
        measured |= {f"{kind}_loss": choices.nll[place] / number[place],
                     f"{kind}_accuracy": choices.correct[place] / number[place]}
    return nll.sum(), measured


class ChoiceSums(NamedTuple):
    """Sums over the choices of a batch, one of each kind: token, sub-patch, location."""
    nll: jax.Array       # float32[3], weighted cross-entropy
    correct: jax.Array   # float32[3], choices whose candidate of the highest score is the right one
    number: jax.Array    # float32[3]


def choice_sums(scored: pointer.Scored, batch: types.Batch, config: config_lib.Molmo2Config,
                chunk: int = 128) -> ChoiceSums:
    """Returns the sums of a packed batch's choices; scores of `chunk` points exist at a time.

    The candidates of a point are the selectable visual tokens of its example, from the one chosen before in
    its group on, and "no more points".
    """
    c = config.pointer
    visual, points = pointer.visual_of(batch, config), pointer.points_of(batch, config)
    R, W = batch.pooled.shape[1:]
    before = lambda x_BT, steps: pointer.take(x_BT, points.token - 1 + steps)

    def weights(is_there_BN, steps):
        weight_BN = before(batch.weights, steps)
        return jnp.where(is_there_BN, weight_BN if c.loss_weight == "token" else (weight_BN > 0) * 1.0, 0.0)

    key_BRE = pointer.rotate(pointer.take(scored.heads.patch_k, visual.position), visual.place, c.theta)
    place_BN = jnp.where(points.previous >= 0, pointer.take(visual.place, points.previous), 0)
    query_BNE = pointer.rotate(before(scored.heads.patch_q, 0), place_BN, c.theta)
    example_BN = pointer.take(batch.example, points.token)
    is_point_BN = points.token < batch.tokens.shape[1]

    @jax.checkpoint
    def step(total, xs):
        query, example, previous, target, weight, is_there = xs
        allowed = (visual.selectable[:, None] & (visual.example[:, None] == example[..., None])
                   & (jnp.arange(R) >= previous[..., None]))
        scores = pointer.patch_scores(query, key_BRE, scored.no_more, allowed, c.scale)
        return jax.tree.map(jnp.add, total, _choices(scores, target, weight, is_there)), None

    target_BN = jnp.minimum(points.chosen, R)
    xs = (query_BNE, example_BN, points.previous, target_BN, weights(is_point_BN, 0), is_point_BN)
    zero = (jnp.zeros((), jnp.float32),) * 3
    token = jax.lax.scan(step, zero, _chunks(xs, chunk))[0]

    slots_BNW = pointer.take(batch.pooled, points.chosen)
    sub_key_BpE = scored.sub_key.reshape(scored.sub_key.shape[0], -1, scored.sub_key.shape[-1])
    sub_key_BNWE = pointer.take(sub_key_BpE, slots_BNW.reshape(slots_BNW.shape[0], -1)).reshape(
        *slots_BNW.shape, -1)
    sub_BNW = pointer.sub_scores(before(scored.heads.sub_q, 1), sub_key_BNWE, slots_BNW >= 0)
    sub = _choices(sub_BNW, points.slot, weights(points.slot >= 0, 1), points.slot >= 0)
    location_BN9 = before(scored.heads.location, 2)
    location = _choices(location_BN9, points.cell, weights(points.cell >= 0, 2), points.cell >= 0)
    return ChoiceSums(*(jnp.stack(parts) for parts in zip(token, sub, location)))


def _choices(scores_BNK, target_BN, weight_BN, is_there_BN):
    """Returns the weighted cross-entropy, the right choices and the choices of one kind, as sums."""
    target_BN = jnp.where(is_there_BN, target_BN, 0)
    score_BN = jnp.take_along_axis(scores_BNK, target_BN[..., None], axis=-1)[..., 0]
    nll_BN = jax.nn.logsumexp(scores_BNK, axis=-1) - score_BN
    hit_BN = jnp.argmax(scores_BNK, axis=-1) == target_BN
    return (jnp.where(is_there_BN, weight_BN * nll_BN, 0.0).sum(),
            (hit_BN & is_there_BN).sum(dtype=jnp.float32), is_there_BN.sum(dtype=jnp.float32))
