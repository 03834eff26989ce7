"""Grouped-query attention under a message-tree mask; one signature, several executions.

B batch, T query positions, S key positions, N query heads, K key heads, G query heads per key head
(N = K*G; query head n uses key head n // G), H head width.
"""

import jax
import jax.numpy as jnp

from molmo2_jax.attention import blocked, tree_mask

IMPLEMENTATIONS = ("dense", "blocked")
TILE = 128  # positions per side of a tile of the blocked path


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


def attend_visible(q_BTNH, k_BSKH, v_BSKH, visible_BTS):
    """Returns [B, T, N, H] under an explicit mask bool[B, T, S]; for decoding, where T is 1 or small."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * H ** -0.5).reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    s_BKGTS = jnp.where(visible_BTS[:, None, None], s_BKGTS, blocked.MASKED)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH).reshape(B, T, N, H)
