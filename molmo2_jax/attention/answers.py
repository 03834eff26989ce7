"""Attention of answers that are being written: one new token each, over a shared prompt and its own past.

L layers, B rows, Q answers per row, T prompt tokens, S slots of an answer, t = T + S, N query heads, K key
heads, G query heads per key head, H head width.
"""

import jax
import jax.numpy as jnp

from molmo2_jax.attention import blocked


def _scores(equation: str, q_BQKGH, k, visible):
    s = jnp.einsum(equation, q_BQKGH, k, preferred_element_type=jnp.float32)
    return jnp.where(visible, s, blocked.MASKED)


def write(keys_LBQKHS, values_LBQKSH, k_BQKH, v_BQKH, layer, slot):
    """Returns the keys and values of all layers with those of one more token per answer of one layer."""
    def put(old, new, at):  # in place: all layers are carried by a scan, not sliced and stacked
        return jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
    return (put(keys_LBQKHS, k_BQKH[..., None], (layer, 0, 0, 0, 0, slot)),
            put(values_LBQKSH, v_BQKH[..., None, :], (layer, 0, 0, 0, slot, 0)))


def attend(q_BQNH, prompt_k_BKHT, prompt_v_BKTH, seen_BQT, own_k_BQKHS, own_v_BQKSH, slot):
    """Returns [B, Q, N, H]; softmax in float32 over the prompt and the answer together.

    Args:
      seen_BQT: bool, what each answer sees of the prompt, which all answers of a row read.
      slot: int32[], the last slot that is written; 0 ... `slot` are seen.
    """
    B, Q, N, H = q_BQNH.shape
    K, T = prompt_k_BKHT.shape[1], prompt_k_BKHT.shape[3]
    prompt_k, prompt_v, own_k, own_v = (
        x.astype(q_BQNH.dtype) for x in (prompt_k_BKHT, prompt_v_BKTH, own_k_BQKHS, own_v_BQKSH))
    q_BQKGH = (q_BQNH * H ** -0.5).reshape(B, Q, K, N // K, H)
    s_prompt = _scores("BQKGH,BKHT->BKQGT", q_BQKGH, prompt_k, seen_BQT[:, None, :, None])
    s_own = _scores("BQKGH,BQKHS->BQKGS", q_BQKGH, own_k, jnp.arange(own_k.shape[-1]) <= slot)
    s = jnp.concatenate([s_prompt, s_own.swapaxes(1, 2)], -1)
    p_BKQGt = jax.nn.softmax(s, axis=-1).astype(q_BQNH.dtype)
    out_BKQGH = jnp.einsum("BKQGT,BKTH->BKQGH", p_BKQGt[..., :T], prompt_v)
    own_BQKGH = jnp.einsum("BQKGS,BQKSH->BQKGH", p_BKQGt[..., T:].swapaxes(1, 2), own_v)
    return (out_BKQGH.swapaxes(1, 2) + own_BQKGH).reshape(B, Q, N, H)
