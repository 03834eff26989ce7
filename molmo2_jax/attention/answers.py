"""Attention during decoding: one new token per answer reads the shared prompt and its own answer so far, or
new tokens of a conversation read all that its row holds before them.

L layers, B rows, Q answers or new tokens per row, T prompt tokens, or places of a row, S token slots per
answer, t = T + S keys in all, N query heads, K key heads, G query heads per key head (N = K*G), H head width.
"""

import jax
import jax.numpy as jnp

from molmo2_jax import sharding
from molmo2_jax.attention import blocked


def _by_key_head(q_BQNH, num_key_heads: int):
    """Returns the scaled queries [B, Q, K, G, H], sharded as the keys are stored."""
    B, Q, N, H = q_BQNH.shape
    q_BQKGH = (q_BQNH * H ** -0.5).reshape(B, Q, num_key_heads, N // num_key_heads, H)
    return sharding.constrain(q_BQKGH, "rows", None, "kv_heads", None, None)


def attend_row(q_BQNH, k_BKHT, v_BKTH, seen_BQT):
    """Returns [B, Q, N, H]: the new tokens of each row read the places of the row that they see."""
    k_BKHT, v_BKTH = k_BKHT.astype(q_BQNH.dtype), v_BKTH.astype(q_BQNH.dtype)
    q_BQKGH = _by_key_head(q_BQNH, k_BKHT.shape[1])
    s_BKQGT = _scores("BQKGH,BKHT->BKQGT", q_BQKGH, k_BKHT, seen_BQT[:, None, :, None])
    p_BKQGT = jax.nn.softmax(s_BKQGT, axis=-1).astype(q_BQNH.dtype)
    return jnp.einsum("BKQGT,BKTH->BQKGH", p_BKQGT, v_BKTH).reshape(q_BQNH.shape)


def _scores(equation: str, q_BQKGH, k, visible):
    s = jnp.einsum(equation, q_BQKGH, k, preferred_element_type=jnp.float32)
    return jnp.where(visible, s, blocked.MASKED)


def write(keys_LBQKHS, values_LBQKSH, k_BQKH, v_BQKH, layer, slot):
    """Returns the keys and values of all layers, with one layer's new token per answer written at `slot`."""
    def put(old, new, at):  # in place: the scan carries all layers instead of slicing and stacking them
        return jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
    k_BQKH, v_BQKH = (sharding.constrain(x, "rows", None, "kv_heads", None) for x in (k_BQKH, v_BQKH))
    return (put(keys_LBQKHS, k_BQKH[..., None], (layer, 0, 0, 0, 0, slot)),
            put(values_LBQKSH, v_BQKH[..., None, :], (layer, 0, 0, 0, slot, 0)))


def append(keys_LBKHT, values_LBKTH, k_BQKH, v_BQKH, layer, start_B):
    """Returns the keys and values of all layers, with one layer's Q new tokens of each row written at
    start[b] and after; a single token whose place is beyond the row is dropped."""
    k_BQKH, v_BQKH = (sharding.constrain(x, "rows", None, "kv_heads", None) for x in (k_BQKH, v_BQKH))
    k_BQKH, v_BQKH = k_BQKH.astype(keys_LBKHT.dtype), v_BQKH.astype(values_LBKTH.dtype)
    B, Q, _, _ = k_BQKH.shape
    if Q == 1:
        row = jnp.arange(B)
        return (keys_LBKHT.at[layer, row, :, :, start_B].set(k_BQKH[:, 0]),
                values_LBKTH.at[layer, row, :, start_B].set(v_BQKH[:, 0]))
    k_BKHQ, v_BKQH = jnp.moveaxis(k_BQKH, 1, 3), jnp.moveaxis(v_BQKH, 1, 2)
    for row in range(B):
        place = start_B[row]
        keys_LBKHT = jax.lax.dynamic_update_slice(
            keys_LBKHT, k_BKHQ[None, row:row + 1], (layer, row, 0, 0, place))
        values_LBKTH = jax.lax.dynamic_update_slice(
            values_LBKTH, v_BKQH[None, row:row + 1], (layer, row, 0, place, 0))
    return keys_LBKHT, values_LBKTH


def attend(q_BQNH, prompt_k_BKHT, prompt_v_BKTH, seen_BQT, own_k_BQKHS, own_v_BQKSH, slot):
    """Returns [B, Q, N, H]; softmax in float32 over the prompt and the answer together.

    Args:
      seen_BQT: bool, which prompt tokens each answer sees; all answers of a row share one prompt.
      slot: int32[], the last slot written; an answer sees its slots 0 ... `slot`.
    """
    B, Q, N, H = q_BQNH.shape
    T = prompt_k_BKHT.shape[3]
    prompt_k_BKHT, prompt_v_BKTH, own_k_BQKHS, own_v_BQKSH = (
        x.astype(q_BQNH.dtype) for x in (prompt_k_BKHT, prompt_v_BKTH, own_k_BQKHS, own_v_BQKSH))
    q_BQKGH = _by_key_head(q_BQNH, prompt_k_BKHT.shape[1])
    s_BKQGT = _scores("BQKGH,BKHT->BKQGT", q_BQKGH, prompt_k_BKHT, seen_BQT[:, None, :, None])
    s_BQKGS = _scores("BQKGH,BQKHS->BQKGS", q_BQKGH, own_k_BQKHS, jnp.arange(own_k_BQKHS.shape[-1]) <= slot)
    s_BKQGt = jnp.concatenate([s_BKQGT, s_BQKGS.swapaxes(1, 2)], -1)
    p_BKQGt = jax.nn.softmax(s_BKQGt, axis=-1).astype(q_BQNH.dtype)
    out_BKQGH = jnp.einsum("BKQGT,BKTH->BKQGH", p_BKQGt[..., :T], prompt_v_BKTH)
    own_BQKGH = jnp.einsum("BQKGS,BQKSH->BQKGH", p_BKQGt[..., T:].swapaxes(1, 2), own_v_BQKSH)
    return (out_BKQGH.swapaxes(1, 2) + own_BQKGH).reshape(B, Q, N, H)
