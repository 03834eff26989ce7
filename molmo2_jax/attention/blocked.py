"""Flash attention over a TreeMask in plain XLA: one loop over the tiles that the mask touches.

Memory grows with S, work with the number of visible tiles. The default on CPU and the fallback elsewhere.

B batch, S positions, K key heads, G query heads per key head, H head width, Q query tiles, t tile length,
g = G*t rows of one query tile (all heads that share a key head at once).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from molmo2_jax.attention import tree_mask

MASKED = -1e30  # finite: a fully masked first tile is later multiplied by exp(MASKED - m) = 0


def _split_queries(x_BSNH, heads: int, tile: int):
    """Returns [B, Q, K, g, H]."""
    B, S, N, H = x_BSNH.shape
    x = x_BSNH.reshape(B, S // tile, tile, heads, N // heads, H).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(B, S // tile, heads, N // heads * tile, H)


def _join_queries(x_BQKgH, tile: int):
    B, Q, K, g, H = x_BQKgH.shape
    x = x_BQKgH.reshape(B, Q, K, g // tile, tile, H).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(B, Q * tile, K * (g // tile), H)


def _split_keys(x_BSKH, tile: int):
    """Returns [B, tiles, K, t, H]."""
    B, S, K, H = x_BSKH.shape
    return x_BSKH.reshape(B, S // tile, tile, K, H).transpose(0, 1, 3, 2, 4)


def _join_keys(x_BQKtH):
    B, Q, K, t, H = x_BQKtH.shape
    return x_BQKtH.transpose(0, 1, 3, 2, 4).reshape(B, Q * t, K, H)


def _tiles(mask, tile):
    """Returns the work list and a function (batch, query tile, key tile) -> bool[t, t]."""
    words, count = tree_mask.work_list(tree_mask.tile_classes(mask, tile, tile))
    end, group = (x.reshape(x.shape[0], -1, tile) for x in mask)
    offset = jnp.arange(tile)

    def visible(b, q, k):
        i, j = q * tile + offset[:, None], k * tile + offset[None, :]
        causal = (j <= i) & (i < end[b, k][None])
        return causal | ((group[b, q][:, None] == group[b, k][None]) & (group[b, k][None] >= 0))

    return words, count, visible


def _scores(q_KgH, k_KtH, visible_tt):
    """Returns float32[K, g, t] scores; `visible` repeats over the G heads inside g."""
    s = jnp.einsum("KgH,KtH->Kgt", q_KgH, k_KtH, preferred_element_type=jnp.float32)
    K, g, t = s.shape
    s = jnp.where(visible_tt[None, None], s.reshape(K, g // t, t, t), MASKED)
    return s.reshape(K, g, t)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BSNH, k_BSKH, v_BSKH, mask: tree_mask.TreeMask, tile: int):
    """Softmax attention under `mask`; q is already scaled. S must be a multiple of `tile`."""
    return _forward(q_BSNH, k_BSKH, v_BSKH, mask, tile)[0]


def _forward(q_BSNH, k_BSKH, v_BSKH, mask, tile):
    words, count, visible = _tiles(mask, tile)
    q = _split_queries(q_BSNH, k_BSKH.shape[2], tile)
    k, v = _split_keys(k_BSKH, tile), _split_keys(v_BSKH, tile)

    def step(n, carry):
        m, l, acc = carry
        b, i, j, _ = tree_mask.unpack(words[n])
        s = _scores(q[b, i], k[b, j], visible(b, i, j))
        m_new = jnp.maximum(m[b, i], s.max(-1))
        p = jnp.exp(s - m_new[..., None])
        decay = jnp.exp(m[b, i] - m_new)
        pv = jnp.einsum("Kgt,KtH->KgH", p.astype(v.dtype), v[b, j], preferred_element_type=jnp.float32)
        return (m.at[b, i].set(m_new), l.at[b, i].set(decay * l[b, i] + p.sum(-1)),
                acc.at[b, i].set(decay[..., None] * acc[b, i] + pv))

    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    m, l, acc = jax.lax.fori_loop(0, count, step, (zeros + MASKED, zeros, jnp.zeros(q.shape, jnp.float32)))
    out = acc / l[..., None]
    joined = _join_queries(out, tile).astype(q_BSNH.dtype)
    return joined, (q_BSNH, k_BSKH, v_BSKH, mask, out, m + jnp.log(l))


def _backward(tile, residuals, grad_BSNH):
    q_BSNH, k_BSKH, v_BSKH, mask, out, log_sum = residuals
    words, count, visible = _tiles(mask, tile)
    heads = k_BSKH.shape[2]
    q, do = _split_queries(q_BSNH, heads, tile), _split_queries(grad_BSNH, heads, tile)
    k, v = _split_keys(k_BSKH, tile), _split_keys(v_BSKH, tile)
    delta = (out * do).sum(-1)

    def step(n, carry):
        dq, dk, dv = carry
        b, i, j, _ = tree_mask.unpack(words[n])
        s = _scores(q[b, i], k[b, j], visible(b, i, j))
        p = jnp.exp(s - log_sum[b, i][..., None])
        dp = jnp.einsum("KgH,KtH->Kgt", do[b, i], v[b, j], preferred_element_type=jnp.float32)
        ds = (p * (dp - delta[b, i][..., None])).astype(q.dtype)
        add_k = jnp.einsum("Kgt,KgH->KtH", ds, q[b, i], preferred_element_type=jnp.float32)
        add_v = jnp.einsum("Kgt,KgH->KtH", p.astype(q.dtype), do[b, i],
                           preferred_element_type=jnp.float32)
        add_q = jnp.einsum("Kgt,KtH->KgH", ds, k[b, j], preferred_element_type=jnp.float32)
        return dq.at[b, i].add(add_q), dk.at[b, j].add(add_k), dv.at[b, j].add(add_v)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, count, step, start)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)
    return (_join_queries(dq, tile).astype(q_BSNH.dtype), _join_keys(dk).astype(k_BSKH.dtype),
            _join_keys(dv).astype(v_BSKH.dtype), no_gradient)


attend.defvjp(_forward, _backward)
