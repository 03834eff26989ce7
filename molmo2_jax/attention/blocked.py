"""Flash attention over a TreeMask in plain XLA: one loop over the tiles that the mask touches.

Memory is O(S), work proportional to the visible tiles. The default on CPU and the fallback elsewhere.

B batch, T queries and S keys (whole tiles), N query heads, K key heads, G query heads per key head, H head
width, Q query tiles, t tile length, g = G*t rows of one query tile (all heads that share a key head at once).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from molmo2_jax.attention import tiling as tiling_lib

MASKED = -1e30  # finite: a fully masked first tile is later multiplied by exp(MASKED - m) = 0


def _split_queries(x_BTNH, heads: int, tile: int):
    """Returns [B, Q, K, g, H]."""
    B, T, N, H = x_BTNH.shape
    x = x_BTNH.reshape(B, T // tile, tile, heads, N // heads, H).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(B, T // tile, heads, N // heads * tile, H)


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


def _tiles(work, tiling):
    """Returns a function (batch, query tile, key tile) -> bool[t, t]: the mask of one tile."""
    batch = work.keys.shape[0]
    end, key_group = (x.reshape(batch, -1, tiling.key_tile) for x in (work.keys[:, 0], work.keys[:, 1]))
    query_group = work.query_group.reshape(batch, -1, tiling.query_tile)

    def visible(b, q, k):
        i = work.first[b] + q * tiling.query_tile + jnp.arange(tiling.query_tile)
        j = k * tiling.key_tile + jnp.arange(tiling.key_tile)
        return tiling_lib.visible(i[:, None], j, end[b, k], query_group[b, q][:, None], key_group[b, k])

    return visible


def _scores(q_KgH, k_KtH, visible_tt):
    """Returns float32[K, g, t] scores; `visible_tt` is repeated for the G heads within g."""
    s = jnp.einsum("KgH,KtH->Kgt", q_KgH, k_KtH, preferred_element_type=jnp.float32)
    K, g, t = s.shape
    s = jnp.where(visible_tt[None, None], s.reshape(K, -1, *visible_tt.shape), MASKED)
    return s.reshape(K, g, t)


def attend(q_BTNH, k_BSKH, v_BSKH, work: tiling_lib.Work, tiling: tiling_lib.Tiling):
    """Returns [B, T, N, H]: softmax attention where the mask of `work` allows, in the dtype of q."""
    length, num_keys = q_BTNH.shape[1], work.keys.shape[-1]
    widen = lambda x, length: jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
    q = widen(q_BTNH * q_BTNH.shape[-1] ** -0.5, work.query_group.shape[-1])
    return _attend(tiling, q, widen(k_BSKH, num_keys), widen(v_BSKH, num_keys), work)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling, q_BTNH, k_BSKH, v_BSKH, work):
    return _forward(tiling, q_BTNH, k_BSKH, v_BSKH, work)[0]


def _forward(tiling, q_BTNH, k_BSKH, v_BSKH, work):
    visible = _tiles(work, tiling)
    q = _split_queries(q_BTNH, k_BSKH.shape[2], tiling.query_tile)
    k, v = _split_keys(k_BSKH, tiling.key_tile), _split_keys(v_BSKH, tiling.key_tile)

    def step(n, carry):
        m, l, acc = carry
        b, i, j, _ = tiling_lib.unpack(work.words[n])
        s = _scores(q[b, i], k[b, j], visible(b, i, j))
        m_new = jnp.maximum(m[b, i], s.max(-1))
        p = jnp.exp(s - m_new[..., None])
        decay = jnp.exp(m[b, i] - m_new)
        pv = jnp.einsum("Kgt,KtH->KgH", p.astype(v.dtype), v[b, j], preferred_element_type=jnp.float32)
        return (m.at[b, i].set(m_new), l.at[b, i].set(decay * l[b, i] + p.sum(-1)),
                acc.at[b, i].set(decay[..., None] * acc[b, i] + pv))

    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    start = (zeros + MASKED, zeros, jnp.zeros(q.shape, jnp.float32))
    m, l, acc = jax.lax.fori_loop(0, work.borders[-1], step, start)
    out = checkpoint_name(acc / l[..., None], tiling_lib.OUT)
    log_sum = checkpoint_name(m + jnp.log(l), tiling_lib.LOG_SUM)
    joined = _join_queries(out, tiling.query_tile).astype(q_BTNH.dtype)
    return joined, (q_BTNH, k_BSKH, v_BSKH, work, out, log_sum)


def _backward(tiling, residuals, grad_BTNH):
    q_BTNH, k_BSKH, v_BSKH, work, out, log_sum = residuals
    visible = _tiles(work, tiling)
    heads = k_BSKH.shape[2]
    q, do = (_split_queries(x, heads, tiling.query_tile) for x in (q_BTNH, grad_BTNH))
    k, v = _split_keys(k_BSKH, tiling.key_tile), _split_keys(v_BSKH, tiling.key_tile)
    delta = (out * do).sum(-1)

    def step(n, carry):
        dq, dk, dv = carry
        b, i, j, _ = tiling_lib.unpack(work.words[n])
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
    dq, dk, dv = jax.lax.fori_loop(0, work.borders[-1], step, start)
    return (_join_queries(dq, tiling.query_tile).astype(q_BTNH.dtype), _join_keys(dk).astype(k_BSKH.dtype),
            _join_keys(dv).astype(v_BSKH.dtype), tiling_lib.no_gradient(work))


_attend.defvjp(_forward, _backward)
