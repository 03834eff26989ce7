"""Grouped-query attention under a message-tree mask; one signature, several executions.

B batch, T query positions, S key positions, N query heads, K key heads, G query heads per key head
(N = K*G; query head n uses key head n // G), H head width; Q answers that share a prompt.
"""

import jax
import jax.numpy as jnp

from molmo2_jax.attention import blocked
from molmo2_jax.attention import tree_mask

IMPLEMENTATIONS = ("dense", "blocked")
TILE = 64  # positions per side of a tile of the blocked path


def attend(q_BTNH, k_BTKH, v_BTKH, mask: tree_mask.TreeMask, implementation: str | None = None):
    """Returns [B, T, N, H]: softmax(q k / sqrt(H)) v where `mask` allows; softmax in float32.

    Args:
      implementation: "dense" materialises the mask (tests), "blocked" visits the tiles that the mask
        touches. None picks "blocked".

    Raises:
      ValueError: unknown implementation.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}")
    with jax.named_scope("tree_attention"):
        if implementation == "dense":
            return attend_visible(q_BTNH, k_BTKH, v_BTKH, tree_mask.dense(mask))
        length = q_BTNH.shape[1]
        padded = -(-length // TILE) * TILE
        widen = lambda x: jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        q = widen(q_BTNH * q_BTNH.shape[-1] ** -0.5)
        out = blocked.attend(q, widen(k_BTKH), widen(v_BTKH), tree_mask.pad(mask, padded), TILE)
        return out[:, :length]


def _scores(q_BTNH, k_BSKH, visible_BTS):
    """Returns float32[B, K, G, T, S], masked; queries are scaled here."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * H ** -0.5).reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    return jnp.where(visible_BTS[:, None, None], s_BKGTS, blocked.MASKED)


def attend_visible(q_BTNH, k_BSKH, v_BSKH, visible_BTS):
    """Returns [B, T, N, H] under an explicit mask bool[B, T, S]."""
    p_BKGTS = jax.nn.softmax(_scores(q_BTNH, k_BSKH, visible_BTS), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH).reshape(q_BTNH.shape)


def attend_answers(q_BQNH, prompt_k_BTKH, prompt_v_BTKH, seen_BQT, own_k_BQSKH, own_v_BQSKH, slot):
    """Returns [B, Q, N, H]: one token of each of Q answers over one shared prompt and its own answer.

    Args:
      seen_BQT: bool, what each answer sees of the prompt.
      own_k_BQSKH, own_v_BQSKH: of each answer; slots 0 ... `slot` are seen.
    """
    B, Q, N, H = q_BQNH.shape
    S = own_k_BQSKH.shape[2]
    dtype = q_BQNH.dtype

    def alone(x):  # answers become rows of their own
        return x.astype(dtype).reshape(B * Q, *x.shape[2:])

    s_prompt = _scores(q_BQNH, prompt_k_BTKH.astype(dtype), seen_BQT)                      # [B, K, G, Q, T]
    s_own = _scores(alone(q_BQNH)[:, None], alone(own_k_BQSKH), (jnp.arange(S) <= slot)[None, None])
    s_own = jnp.moveaxis(s_own.reshape(B, Q, *s_prompt.shape[1:3], S), 1, 3)               # [B, K, G, Q, S]
    p = jax.nn.softmax(jnp.concatenate([s_prompt, s_own], -1), axis=-1).astype(dtype)
    p_prompt, p_own = jnp.split(p, [seen_BQT.shape[-1]], axis=-1)
    out = jnp.einsum("BKGQT,BTKH->BQKGH", p_prompt, prompt_v_BTKH.astype(dtype))
    out = out + jnp.einsum("BKGQS,BQSKH->BQKGH", p_own, own_v_BQSKH.astype(dtype))
    return out.reshape(B, Q, N, H)
