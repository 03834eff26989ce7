"""Attention of answers that are being written: one new token each, over a shared prompt and its own past.

B rows, Q answers per row, T prompt tokens, S slots of an answer, N query heads, K key heads, G query heads
per key head, H head width.
"""

import jax
import jax.numpy as jnp

from molmo2_jax.attention import blocked


def _scores(equation: str, q_BQKGH, k, visible):
    s = jnp.einsum(equation, q_BQKGH, k, preferred_element_type=jnp.float32)
    return jnp.where(visible, s, blocked.MASKED)


def attend(q_BQNH, prompt, seen_BQT, own, slot):
    """Returns [B, Q, N, H]; softmax in float32 over the prompt and the answer together.

    Args:
      prompt: keys and values [B, K, T, H] of the prompts, read by all answers of a row.
      seen_BQT: bool, what each answer sees of the prompt.
      own: keys and values [B, Q, K, S, H] of each answer; slots 0 ... `slot` are seen.
    """
    B, Q, N, H = q_BQNH.shape
    _, K, T, _ = prompt[0].shape
    dtype = q_BQNH.dtype
    (prompt_k, prompt_v), (own_k, own_v) = (jax.tree.map(lambda x: x.astype(dtype), tuple(one))
                                            for one in (prompt, own))
    q_BQKGH = (q_BQNH * H ** -0.5).reshape(B, Q, K, N // K, H)
    s_prompt = _scores("BQKGH,BKTH->BKQGT", q_BQKGH, prompt_k, seen_BQT[:, None, :, None])
    s_own = _scores("BQKGH,BQKSH->BQKGS", q_BQKGH, own_k, jnp.arange(own_k.shape[3]) <= slot)
    s = jnp.concatenate([s_prompt, s_own.swapaxes(1, 2)], -1)
    p_BKQGt = jax.nn.softmax(s, axis=-1).astype(dtype)
    out_BKQGH = jnp.einsum("BKQGT,BKTH->BKQGH", p_BKQGt[..., :T], prompt_v)
    own_BQKGH = jnp.einsum("BQKGS,BQKSH->BQKGH", p_BKQGt[..., T:].swapaxes(1, 2), own_v)
    return (out_BKQGH.swapaxes(1, 2) + own_BQKGH).reshape(B, Q, N, H)
