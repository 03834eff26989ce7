"""Weighted next-token loss with z-loss, in chunks of positions so that [T, V] logits never exist at once.

B batch, T positions, D width, V vocabulary.

Source: reference, olmo/train/trainer.py: sums over the global batch divided by its total weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from molmo2_jax import sharding


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


def chunked_sums(hidden_BTD, head, kernel_DV, targets_BT, weights_BT, chunk: int, dtype: str) -> Sums:
    """Returns `token_sums` of `head(hidden, kernel)`, computing and recomputing `chunk` positions at a time.

    On a mesh each device does so for its own positions; the kernel travels in `dtype`.
    """
    def of_device(kernel_DV, hidden_BTD, targets_BT, weights_BT):
        B, T, _ = hidden_BTD.shape
        positions = min(chunk, T)

        def split(x):
            x = jnp.pad(x, ((0, 0), (0, -T % positions)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(B, -1, positions, *x.shape[2:]), 1, 0)

        @jax.checkpoint
        def step(total, xs):
            hidden, targets, weights = xs
            return jax.tree.map(jnp.add, total, token_sums(head(hidden, kernel_DV), targets, weights)), None

        zero = Sums(*(jnp.zeros((), jnp.float32),) * 4)
        return jax.lax.scan(step, zero, (split(hidden_BTD), split(targets_BT), split(weights_BT)))[0]

    return sharding.sum_over_tokens(of_device, kernel_DV, ("embed", "vocab"),
                                    (hidden_BTD, targets_BT, weights_BT), dtype)


def objective(sums: Sums, z_weight: float):
    """Returns (loss, metrics): weighted means over the whole batch; 0 for a batch without loss tokens."""
    divisor = jnp.maximum(sums.weight, 1e-8)
    nll, z = sums.nll / divisor, z_weight * sums.z / divisor
    return nll + z, {"loss": nll, "z_loss": z, "accuracy": sums.correct / divisor, "loss_weight": sums.weight}
