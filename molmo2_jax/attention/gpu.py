"""Flash attention over a TreeMask for NVIDIA GPUs, in Triton: choice of tiles, and the kernels.

The work lists are those of the TPU kernels, with one program per row of a list: tiles that no query needs are
not visited, and the mask of the others is computed in registers from two integers per key.

One program computes one query tile of one head over the key tiles of its row of the work list; for the
gradients of keys, one key tile over the query tiles of its row, for all query heads of the key head. A loop
over the tiles without a mask comes before a loop over the others.

B rows, T queries, S keys, N query heads, K key heads, G query heads per key head, H head width; q, k lengths
of a query and of a key tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from molmo2_jax.attention import flash
from molmo2_jax.attention import tiling as tiling_lib

SMALLEST_SIDE = 16  # of a product on a tensor core
NUM_WARPS = 8
QUERIES_AT_ONCE = 64  # for the gradients of keys; with 128 the sums do not fit into registers


def choose_tiling(head_dim: int) -> tiling_lib.Tiling:
    """Returns the tiling: 128 queries by 64 keys for heads up to 128 wide, half of each above.

    The gradients take two passes; a program accumulates only for its own tile.
    """
    part = 1 if head_dim <= 128 else 2
    return tiling_lib.Tiling(query_tile=128 // part, key_tile=64 // part, ring=0)


def _specs(q, k, tiling):
    """Returns (grid, specs of q, of one number per query, of k, of `query_group`, of `keys`).

    A program gets one query tile of one head, and reads tiles of all keys.
    """
    B, K, G, T, H = q.shape
    S, length = k.shape[2], tiling.query_tile
    head = lambda n: (lax.div(n, G), lax.rem(n, G))
    return (T // length, K * G, B), [
        pl.BlockSpec((None, None, None, length, H), lambda i, n, b: (b, *head(n), i, 0)),
        pl.BlockSpec((None, None, None, length), lambda i, n, b: (b, *head(n), i)),
        pl.BlockSpec((None, None, S, H), lambda i, n, b: (b, head(n)[0], 0, 0)),
        pl.BlockSpec((None, 1, length), lambda i, n, b: (b, 0, i)),
        pl.BlockSpec((None, 2, S), lambda i, n, b: (b, 0, 0))]


def _key_major_specs(q, k, tiling):
    """Returns the same for programs with one key tile and all queries of its key head, read in tiles."""
    B, K, G, T, H = q.shape
    S, length = k.shape[2], tiling.key_tile
    return (S // length, K, B), [
        pl.BlockSpec((None, None, G, T, H), lambda j, h, b: (b, h, 0, 0, 0)),
        pl.BlockSpec((None, None, G, T), lambda j, h, b: (b, h, 0, 0)),
        pl.BlockSpec((None, None, length, H), lambda j, h, b: (b, h, j, 0)),
        pl.BlockSpec((None, 1, T), lambda j, h, b: (b, 0, 0)),
        pl.BlockSpec((None, 2, length), lambda j, h, b: (b, 0, j))]


def _call(name, kernel, grid, work, operands, in_specs, outs, out_specs, tiling, num_stages, key_major=False):
    """Returns the outputs of a kernel; the work lists stay in device memory."""
    lists = (*((work.key_words, work.key_borders) if key_major else (work.words, work.borders)), work.first)
    whole = [pl.BlockSpec(x.shape, lambda *at: (0,)) for x in lists]
    return pl.pallas_call(
        functools.partial(kernel, tiling=tiling), grid=grid, in_specs=[*whole, *in_specs],
        out_specs=out_specs, out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=num_stages),
        interpret=tiling.interpret, name=name,
    )(*lists, *operands, work.query_group, work.keys)


def _for_tiles(borders, body, carry, repeat=1):
    """Returns `carry` after body(is_masked, word number, repetition, carry) for each word of this program."""
    row = 2 * (pl.program_id(2) * pl.num_programs(0) + pl.program_id(0))
    for is_masked in (False, True):
        start = borders[row + is_masked]
        count = (borders[row + is_masked + 1] - start) * repeat

        def step(n, carry, start=start, is_masked=is_masked):
            return body(is_masked, start + lax.div(n, repeat), lax.rem(n, repeat), carry)

        carry = lax.fori_loop(0, count, step, carry)
    return carry


def forward(q_BKGTH, k_BKSH, v_BKSH, work: tiling_lib.Work, tiling: tiling_lib.Tiling):
    """Returns ([B, K, G, T, H] output, float32[B, K, G, T] base-2 log of the sum of exponentials)."""
    grid, (query, per_query, key, *masks) = _specs(q_BKGTH, k_BKSH, tiling)
    log_sum = jax.ShapeDtypeStruct(q_BKGTH.shape[:-1], jnp.float32)
    return _call("tree_attention", _forward_kernel, grid, work, (q_BKGTH, k_BKSH, v_BKSH),
                 [query, key, key, *masks], [q_BKGTH, log_sum], [query, per_query], tiling, num_stages=3)


def _forward_kernel(words, borders, first, q_ref, k_ref, v_ref, query_group, keys, out, log_sum, *, tiling):
    q = q_ref[...]
    i = (first[pl.program_id(2)] + pl.program_id(0) * tiling.query_tile
         + jnp.arange(tiling.query_tile))[:, None]
    group = query_group[0, :][:, None]

    def body(is_masked, n, _, carry):
        maximum, total, acc = carry
        at, j = _stretch(tiling_lib.column_of(words[n]) * tiling.key_tile, tiling.key_tile)
        s = flash.dot(q, k_ref[at, :], (1, 1))
        if is_masked:
            visible = tiling_lib.visible(i, j[None], keys[0, at][None], group, keys[1, at][None])
            s = jnp.where(visible, s, flash.MASKED)
        new = jnp.maximum(maximum, s.max(-1))
        p = jnp.exp2(s - new[:, None])
        decay = jnp.exp2(maximum - new)
        acc = decay[:, None] * acc + flash.dot(p.astype(q.dtype), v_ref[at, :], (1, 0))
        return new, decay * total + p.sum(-1), acc

    start = (jnp.full(tiling.query_tile, flash.MASKED, jnp.float32),
             jnp.zeros(tiling.query_tile, jnp.float32), jnp.zeros(q.shape, jnp.float32))
    maximum, total, acc = _for_tiles(borders, body, start)
    out[...] = (acc / total[:, None]).astype(out.dtype)
    log_sum[...] = maximum + jnp.log2(total)


def _stretch(start, length):
    """Returns (slice, positions)."""
    return pl.ds(start, length), start + jnp.arange(length)


def backward(q, k, v, grad, log_sum, delta, work: tiling_lib.Work, tiling: tiling_lib.Tiling):
    """Returns (dq, dk, dv) of the scaled queries, keys and values, in the layout of `forward`."""
    operands = (q, k, v, grad, log_sum, delta)

    def run(name, kernel, specs, outs, **options):
        grid, (query, per_query, key, *masks) = specs
        in_specs = [query, key, key, query, per_query, per_query, *masks]
        return _call(name, kernel, grid, work, operands, in_specs, outs,
                     [query if out is q else key for out in outs], tiling, num_stages=2, **options)

    [dq] = run("tree_attention_query_gradient", _query_kernel, _specs(q, k, tiling), [q])
    dk, dv = run("tree_attention_key_gradients", _key_kernel, _key_major_specs(q, k, tiling), [k, v],
                 key_major=True)
    return dq, dk, dv


def _tile_gradients(ours, theirs, log_sum, delta, visible):
    """Returns (p, ds) of a tile, in the dtype of the operands.

    Args:
      ours, theirs: (q, gradient of the output) and (k, v), or the other way round, for the tile transposed.
      visible: None where every query sees every key.
    """
    p = jnp.exp2(flash.dot(ours[0], theirs[0], (1, 1)) - log_sum)
    if visible is not None:
        p = jnp.where(visible, p, 0.0)
    ds = p * (flash.dot(ours[1], theirs[1], (1, 1)) - delta)
    return p.astype(ours[0].dtype), ds.astype(ours[0].dtype)


def _query_kernel(words, borders, first, q_ref, k_ref, v_ref, grad, log_sum, delta, query_group, keys, dq_out,
                  *, tiling):
    ours = q_ref[...], grad[...]
    i = (first[pl.program_id(2)] + pl.program_id(0) * tiling.query_tile
         + jnp.arange(tiling.query_tile))[:, None]
    group, statistics = query_group[0, :][:, None], (log_sum[...][:, None], delta[...][:, None])

    def body(is_masked, n, _, dq):
        at, j = _stretch(tiling_lib.column_of(words[n]) * tiling.key_tile, tiling.key_tile)
        k, visible = k_ref[at, :], None
        if is_masked:
            visible = tiling_lib.visible(i, j[None], keys[0, at][None], group, keys[1, at][None])
        return dq + flash.dot(_tile_gradients(ours, (k, v_ref[at, :]), *statistics, visible)[1], k, (1, 0))

    dq = _for_tiles(borders, body, jnp.zeros(dq_out.shape, jnp.float32))
    dq_out[...] = (dq * flash.LN_2).astype(dq_out.dtype)


def _key_kernel(words, borders, first, q_ref, k_ref, v_ref, grad_ref, log_sum, delta, query_group, keys,
                dk_out, dv_out, *, tiling):
    ours = k_ref[...], v_ref[...]
    j = (pl.program_id(0) * tiling.key_tile + jnp.arange(tiling.key_tile))[:, None]
    first_query = first[pl.program_id(2)]
    end, group = keys[0, :][:, None], keys[1, :][:, None]
    length = min(QUERIES_AT_ONCE, tiling.query_tile)
    parts = tiling.query_tile // length

    def body(is_masked, n, turn, carry):
        dk, dv = carry
        g, part = lax.div(turn, parts), lax.rem(turn, parts)
        at, i = _stretch(tiling_lib.column_of(words[n]) * tiling.query_tile + part * length, length)
        q, grad, visible = q_ref[g, at, :], grad_ref[g, at, :], None
        if is_masked:
            visible = tiling_lib.visible((first_query + i)[None], j, end, query_group[0, at][None], group)
        p, ds = _tile_gradients(ours, (q, grad), log_sum[g, at][None], delta[g, at][None], visible)
        return dk + flash.dot(ds, q, (1, 0)), dv + flash.dot(p, grad, (1, 0))

    zeros = jnp.zeros(dk_out.shape, jnp.float32)
    dk, dv = _for_tiles(borders, body, (zeros, zeros), repeat=q_ref.shape[0] * parts)
    dk_out[...] = (dk * flash.LN_2).astype(dk_out.dtype)
    dv_out[...] = dv.astype(dv_out.dtype)


KERNELS = flash.Kernels(forward, backward)


def attend(q_BTNH, k_BSKH, v_BSKH, work: tiling_lib.Work, tiling: tiling_lib.Tiling):
    """Returns [B, T, N, H]: softmax attention where the mask of `work` allows, in the dtype of q.

    Triton arrays need sides that are powers of two, so other head widths are padded.
    """
    width = max(SMALLEST_SIDE, pl.next_power_of_2(q_BTNH.shape[-1]))
    return flash.attend(KERNELS, q_BTNH, k_BSKH, v_BSKH, work, tiling, width)
