"""Flash attention over a TreeMask for TPU: choice of tiles, and the kernels.

Tiles that no query needs are neither loaded nor visited: the grid runs over a work list, whose length is
known only on the device. Tiles in which every query sees every key are computed without a mask; in the others
the kernel computes the mask from two integers per key. A tile holds all query heads of a key head, so keys
and values are loaded once for the whole group.

The kernels: forward; gradients in one fused pass, or in one pass for queries and one for keys. The grid is
(key heads, words of the work list). One step computes one tile for all query heads of a key head.

B rows, K key heads, G query heads per key head, T queries, S keys, H head width; q, k lengths of a query and
of a key tile, g = G*q; R rows and C columns of any block in fast memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from molmo2_jax.attention import flash
from molmo2_jax.attention import tiling as tiling_lib

LANES = 128
BACKWARD_PRODUCTS = 5  # of a tile, in one pass: scores, their gradients, dq, dk, dv; in two passes 7
EXPECTED_SHARE = 0.25  # of all pairs that is visible in packed rows; for XLA's estimate of a call's time
KINDS = (tiling_lib.FULL, tiling_lib.INTERVAL, tiling_lib.VISUAL)
MAX_WORDS = 2**17    # of a work list: 512 KiB, half of the scalar memory of a core
RESERVED = 16 * 2**20  # bytes of fast memory for everything but the ring and the mask


def tile_lengths(num_queries: int, num_keys: int, num_groups: int) -> tuple[int, int]:
    """Returns the queries and keys of a tile, unless there are too many tiles of that size."""
    return (min(512, LANES * max(1, 1024 // (LANES * num_groups)), tiling_lib.round_up(num_queries, LANES)),
            min(512, tiling_lib.round_up(num_keys, LANES)))


def choose_tiling(rows: int, num_queries: int, num_keys: int, num_groups: int, head_dim: int
                  ) -> tiling_lib.Tiling:
    """Returns the tiling for the current TPU: 1024 rows of queries, of up to 512 positions, by 512 keys.

    Smaller tiles would skip slightly more of the mask, but each step has an overhead of some 300 cycles, a
    quarter of the time of a tile half this size. The ring is as large as fast memory allows.

    Raises:
      ValueError: scalar memory cannot hold the list of tiles.
    """
    def num_words():
        key_tiles = tiling_lib.num_key_tiles(num_queries, num_keys, query_tile, key_tile)
        return rows * -(-num_queries // query_tile) * key_tiles

    query_tile, key_tile = tile_lengths(num_queries, num_keys, num_groups)
    while num_words() > MAX_WORDS and query_tile * num_groups < 2048:
        query_tile *= 2
    if num_words() > MAX_WORDS:
        raise ValueError(f"attention on a TPU handles at most {MAX_WORDS} tiles per device; got "
                         f"{num_words()} for {rows} rows of {num_queries} queries and {num_keys} keys")
    vmem_bytes = min(100 * 2**20, pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8)
    mask_bytes = 4 * rows * (num_queries + 2 * num_keys)
    ring_tile_bytes = 2 * 4 * key_tile * tiling_lib.round_up(head_dim, LANES)
    ring = min(tiling_lib.num_key_tiles(num_queries, num_keys, query_tile, key_tile),
               max(0, vmem_bytes - RESERVED - mask_bytes) // ring_tile_bytes)
    return tiling_lib.Tiling(query_tile=query_tile, key_tile=key_tile, ring=ring, vmem_bytes=vmem_bytes)


def _widen(x_R128, width):
    """Returns [R, width] from [R, 128] with equal lanes."""
    if width <= LANES:
        return x_R128[:, :width]
    return jnp.tile(x_R128, (1, width // LANES)) if width % LANES == 0 else x_R128[:, :1]


def _down(row_1n):
    """Returns [n, 128]: a row turned into a column, the same in all lanes."""
    return jnp.broadcast_to(row_1n, (LANES, row_1n.shape[1])).T


def _fold(x_RC):
    """Returns [R, 128] with the same row sums; lanes are summed only once, after the last tile."""
    columns = x_RC.shape[1]
    if columns < LANES:
        return jnp.pad(x_RC, ((0, 0), (0, LANES - columns)))
    return sum(x_RC[:, c:c + LANES] for c in range(0, columns, LANES))


class _Tile:
    """The mask's integers for one tile, as rows; `end` is relative to the tile's first key."""

    def __init__(self, word, first, query_group, keys, query_tile_of, key_tile_of, tiling):
        q_tile, k_tile = tiling.query_tile, tiling.key_tile
        batch = tiling_lib.batch_of(word)
        query_0 = pl.multiple_of(query_tile_of(word) * q_tile, q_tile)
        key_0 = pl.multiple_of(key_tile_of(word) * k_tile, k_tile)
        self.distance = first[batch] + query_0 - key_0
        self.query_group = query_group[batch, :, pl.ds(query_0, q_tile)]
        keys = keys[batch, :, pl.ds(key_0, k_tile)]
        self.end, self.key_group = keys[0:1] - key_0, keys[1:2]

    def visible(self, kind, query_axis, end, query_group, key_group):
        """Returns the mask, queries along `query_axis`; `end` and groups are broadcast to its shape."""
        shape = jnp.broadcast_shapes(end.shape, query_group.shape, key_group.shape)
        i, j = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (query_axis, 1 - query_axis))
        # One comparison for j <= i < end: for a key after the query, i - j is huge as an unsigned number.
        visible = (i + self.distance - j).astype(jnp.uint32) < (end - j).astype(jnp.uint32)
        return visible | (query_group == key_group) if kind == tiling_lib.VISUAL else visible


def _borders(words, n):
    """Returns whether word n is the first, and the last, of its row of tiles."""
    end = pl.num_programs(1) - 1
    before, after = words[jnp.maximum(n - 1, 0)], words[jnp.minimum(n + 1, end)]
    return ((n == 0) | ~tiling_lib.same_row(words[n], before),
            (n == end) | ~tiling_lib.same_row(words[n], after))


def _for_each_kind(word, compute):
    """Calls compute(kind) for the class of the word: three code paths, so a full tile pays for no mask."""
    for kind in KINDS:
        pl.when(tiling_lib.is_class(word, kind))(functools.partial(compute, kind))


class _Call:
    """Block specs and limits that all kernels share. `key_major`: rows of the list are key tiles.

    The mask's integers are few, so all of them stay in fast memory: each operand loaded tile by tile costs
    every step some 40 cycles of the scalar unit. Addresses come from our own list, so bounds are unchecked.
    """

    def __init__(self, q, k, work, tiling, key_major=False):
        self.B, self.K, self.G, self.T, self.H = q.shape
        self.S, self.tiling = k.shape[2], tiling
        self.words, borders = ((work.key_words, work.key_borders) if key_major
                               else (work.words, work.borders))
        self.count = borders[-1]
        self.first, self.masks = work.first, (work.query_group, work.keys)
        query, key = tiling_lib.row_of, tiling_lib.column_of
        if key_major:
            query, key = key, query

        def block(shape, place):
            return pl.BlockSpec(shape, lambda h, n, words, first: place(h, words[n]))

        G, H, q_tile, k_tile = self.G, self.H, tiling.query_tile, tiling.key_tile
        batch = tiling_lib.batch_of
        self.query = block((None, None, G, q_tile, H), lambda h, w: (batch(w), h, 0, query(w), 0))
        self.log_sum, self.statistics = (
            block((None, None, n, q_tile), lambda h, w: (batch(w), h, 0, query(w))) for n in (G, 2 * G))
        self.key = block((None, None, k_tile, H), lambda h, w: (batch(w), h, key(w), 0))

    def __call__(self, name, kernel, operands, in_specs, out_shapes, out_specs, scratch, products):
        """Returns the outputs of a kernel; `products` is its number of matrix products per tile."""
        pairs = int(EXPECTED_SHARE * self.B * self.K * self.G * self.T * self.S)
        whole = pl.BlockSpec(memory_space=pltpu.VMEM)
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *out_shapes))
        return pl.pallas_call(
            functools.partial(kernel, tiling=self.tiling),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2, grid=(self.K, self.count),
                in_specs=[*in_specs, whole, whole], out_specs=out_specs, scratch_shapes=scratch),
            out_shape=out_shapes,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                                 vmem_limit_bytes=self.tiling.vmem_bytes,
                                                 disable_bounds_checks=True),
            cost_estimate=pl.CostEstimate(flops=2 * products * pairs * self.H, transcendentals=pairs,
                                          bytes_accessed=size),
            interpret=self.tiling.interpret, name=name,
        )(self.words, self.first, *operands, *self.masks)


def forward(q_BKGTH, k_BKSH, v_BKSH, work: tiling_lib.Work, tiling: tiling_lib.Tiling):
    """Returns ([B, K, G, T, H] output, float32[B, K, G, T] base-2 log of the sum of exponentials)."""
    call = _Call(q_BKGTH, k_BKSH, work, tiling)
    rows = call.G * tiling.query_tile
    out = jax.ShapeDtypeStruct(q_BKGTH.shape, q_BKGTH.dtype)
    log_sum = jax.ShapeDtypeStruct(q_BKGTH.shape[:-1], jnp.float32)
    statistics = pltpu.VMEM((rows, LANES), jnp.float32)
    return call("tree_attention", _forward_kernel, (q_BKGTH, k_BKSH, v_BKSH),
                [call.query, call.key, call.key], [out, log_sum], [call.query, call.log_sum],
                [statistics, statistics, pltpu.VMEM((rows, call.H), jnp.float32),
                 pltpu.VMEM((tiling.query_tile, LANES), jnp.int32)], products=2)


def _forward_kernel(words, first, q, k, v, query_group, keys, out, log_sum, maximum, total, acc, group, *,
                    tiling):
    n = pl.program_id(1)
    word = words[n]
    G, q_tile, H = q.shape
    k_tile = k.shape[0]
    starts, ends = _borders(words, n)
    tile = _Tile(word, first, query_group, keys, tiling_lib.row_of, tiling_lib.column_of, tiling)

    @pl.when(starts)
    def _():
        maximum[...] = jnp.full_like(maximum, flash.MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        group[...] = _down(tile.query_group)

    def compute(kind):
        s = flash.dot(q[...].reshape(G * q_tile, H), k[...], (1, 1))
        if kind != tiling_lib.FULL:
            visible = tile.visible(kind, 0, tile.end, _widen(group[...], k_tile), tile.key_group)
            s = jnp.where(visible[None], s.reshape(G, q_tile, k_tile), flash.MASKED).reshape(s.shape)
        old = maximum[...]
        new = jnp.maximum(old, s.max(-1, keepdims=True))
        p = jnp.exp2(s - _widen(new, k_tile))
        decay = jnp.exp2(old - new)
        maximum[...] = new
        total[...] = decay * total[...] + _fold(p)
        acc[...] = _widen(decay, H) * acc[...] + flash.dot(p.astype(v.dtype), v[...], (1, 0))

    _for_each_kind(word, compute)

    @pl.when(ends)
    def _():
        sums = jnp.broadcast_to(total[...].sum(-1, keepdims=True), total.shape)
        out[...] = (acc[...] * _widen(1 / sums, H)).astype(out.dtype).reshape(out.shape)
        logs = maximum[...] + jnp.log2(sums)
        for g in range(G):
            log_sum[g:g + 1, :] = logs[g * q_tile:(g + 1) * q_tile, :].T[0:1, :]


def backward(q, k, v, grad, log_sum, delta, work: tiling_lib.Work, tiling: tiling_lib.Tiling):
    """Returns (dq, dk, dv) of the scaled queries, keys and values, in the layout of `forward`."""
    operands = (q, k, v, grad, jnp.concatenate([log_sum, delta], 2))
    fused = lambda: _fused(operands, work, tiling)
    split = lambda: (_query_gradient(operands, work, tiling), *_key_gradients(operands, work, tiling))
    if work.span is None:
        dq, dk, dv = fused()
    elif tiling.ring == 0:
        dq, dk, dv = split()
    else:
        dq, dk, dv = lax.cond(work.span[0] <= tiling.ring, fused, split)
    if work.touched is not None:  # the kernels write nothing for keys in tiles they do not visit
        dk, dv = (jnp.where(work.touched[:, None, :, None], x, 0) for x in (dk, dv))
    return dq, dk, dv


def _tile_gradients(kind, tile, q, k, v, grad, statistics):
    """Returns (p [k, g], ds [k, g]) of a tile in the dtype of q.

    With keys as rows, the statistics of the queries are used in their stored layout, and the products for dk
    and dv also sum over the G heads.
    """
    G, q_tile, H = q.shape
    log_sum, delta = (jnp.concatenate([statistics[n:n + 1, :] for n in range(start, start + G)], axis=1)
                      for start in (0, G))
    p = jnp.exp2(flash.dot(k[...], q[...].reshape(G * q_tile, H), (1, 1)) - log_sum)
    if kind != tiling_lib.FULL:
        down = lambda row: _widen(_down(row), q_tile)
        visible = tile.visible(kind, 1, down(tile.end), tile.query_group, down(tile.key_group))
        p = jnp.where(jnp.tile(visible, (1, G)), p, 0.0)
    dp = flash.dot(v[...], grad[...].reshape(G * q_tile, H), (1, 1))
    ds = p * (dp - delta)
    return p.astype(q.dtype), ds.astype(q.dtype)


def _fused(operands, work, tiling):
    q, k = operands[:2]
    call = _Call(q, k, work, tiling)
    rows, num_tiles = call.G * tiling.query_tile, call.S // tiling.key_tile
    ring = min(tiling.ring, num_tiles) * tiling.key_tile
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    of_key = jax.ShapeDtypeStruct(k.shape, k.dtype)
    f32 = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    return call("tree_attention_gradients", _fused_kernel, operands,
                [call.query, call.key, call.key, call.query, call.statistics],
                [jax.ShapeDtypeStruct(q.shape, q.dtype), of_key, of_key], [call.query, anywhere, anywhere],
                [f32(rows, call.H), f32(ring, call.H), f32(ring, call.H),
                 pltpu.VMEM((2, tiling.key_tile, call.H), k.dtype), pltpu.SMEM((1,), jnp.int32),
                 pltpu.SemaphoreType.DMA((2,))], products=BACKWARD_PRODUCTS)


def _fused_kernel(words, first, q, k, v, grad, statistics, query_group, keys, dq_out, dk_out, dv_out,
                  dq, dk, dv, stage, is_copying, semaphores, *, tiling):
    head, n = pl.program_id(0), pl.program_id(1)
    is_end = n == pl.num_programs(1) - 1
    word = words[n]
    starts, ends = _borders(words, n)
    column = tiling_lib.column_of(word)
    tile = _Tile(word, first, query_group, keys, tiling_lib.row_of, tiling_lib.column_of, tiling)
    G, q_tile, H = q.shape
    k_tile, ring = tiling.key_tile, dk.shape[0] // tiling.key_tile
    slot = pl.ds(pl.multiple_of(lax.rem(column, ring) * k_tile, k_tile), k_tile)
    place = pl.ds(pl.multiple_of(column * k_tile, k_tile), k_tile)
    copies = [pltpu.make_async_copy(stage.at[x], out.at[tiling_lib.batch_of(word), head, place, :],
                                    semaphores.at[x]) for x, out in enumerate((dk_out, dv_out))]

    def wait():
        for copy in copies:
            copy.wait()

    @pl.when(n == 0)
    def _():
        is_copying[0] = 0

    @pl.when(starts)
    def _():
        dq[...] = jnp.zeros_like(dq)

    @pl.when((word & tiling_lib.FIRST_OF_COLUMN) != 0)
    def _():
        dk[slot, :] = jnp.zeros((k_tile, H), jnp.float32)
        dv[slot, :] = jnp.zeros((k_tile, H), jnp.float32)

    def compute(kind):
        p, ds = _tile_gradients(kind, tile, q, k, v, grad, statistics)
        dv[slot, :] += flash.dot(p, grad[...].reshape(G * q_tile, H), (1, 0))
        dk[slot, :] += flash.dot(ds, q[...].reshape(G * q_tile, H), (1, 0))
        dq[...] += flash.dot(ds, k[...], (0, 0))

    _for_each_kind(word, compute)

    @pl.when(ends)
    def _():
        dq_out[...] = (dq[...] * flash.LN_2).astype(dq_out.dtype).reshape(dq_out.shape)

    @pl.when((word & tiling_lib.LAST_OF_COLUMN) != 0)
    def _():
        pl.when(is_copying[0] == 1)(wait)  # for the previous key tile, started at least one step ago
        stage[0] = (dk[slot, :] * flash.LN_2).astype(stage.dtype)
        stage[1] = dv[slot, :].astype(stage.dtype)
        for copy in copies:
            copy.start()
        is_copying[0] = 1

    pl.when(is_end)(wait)  # the last word closes its column, so a copy is in flight


def _query_gradient(operands, work, tiling):
    q, k = operands[:2]
    call = _Call(q, k, work, tiling)
    return call("tree_attention_query_gradient", _query_kernel, operands,
                [call.query, call.key, call.key, call.query, call.statistics],
                [jax.ShapeDtypeStruct(q.shape, q.dtype)], [call.query],
                [pltpu.VMEM((call.G * tiling.query_tile, call.H), jnp.float32)], products=3)[0]


def _query_kernel(words, first, q, k, v, grad, statistics, query_group, keys, dq_out, dq, *, tiling):
    n = pl.program_id(1)
    word = words[n]
    starts, ends = _borders(words, n)
    tile = _Tile(word, first, query_group, keys, tiling_lib.row_of, tiling_lib.column_of, tiling)

    @pl.when(starts)
    def _():
        dq[...] = jnp.zeros_like(dq)

    def compute(kind):
        _, ds = _tile_gradients(kind, tile, q, k, v, grad, statistics)
        dq[...] += flash.dot(ds, k[...], (0, 0))

    _for_each_kind(word, compute)

    @pl.when(ends)
    def _():
        dq_out[...] = (dq[...] * flash.LN_2).astype(dq_out.dtype).reshape(dq_out.shape)


def _key_gradients(operands, work, tiling):
    q, k = operands[:2]
    call = _Call(q, k, work, tiling, key_major=True)
    of_key = jax.ShapeDtypeStruct(k.shape, k.dtype)
    sums = pltpu.VMEM((tiling.key_tile, call.H), jnp.float32)
    return call("tree_attention_key_gradients", _key_kernel, operands,
                [call.query, call.key, call.key, call.query, call.statistics],
                [of_key, of_key], [call.key, call.key], [sums, sums], products=4)


def _key_kernel(words, first, q, k, v, grad, statistics, query_group, keys, dk_out, dv_out, dk, dv, *,
                tiling):
    n = pl.program_id(1)
    word = words[n]
    starts, ends = _borders(words, n)
    tile = _Tile(word, first, query_group, keys, tiling_lib.column_of, tiling_lib.row_of, tiling)
    G, q_tile, H = q.shape

    @pl.when(starts)
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def compute(kind):
        p, ds = _tile_gradients(kind, tile, q, k, v, grad, statistics)
        dv[...] += flash.dot(p, grad[...].reshape(G * q_tile, H), (1, 0))
        dk[...] += flash.dot(ds, q[...].reshape(G * q_tile, H), (1, 0))

    _for_each_kind(word, compute)

    @pl.when(ends)
    def _():
        dk_out[...] = (dk[...] * flash.LN_2).astype(dk_out.dtype)
        dv_out[...] = dv[...].astype(dv_out.dtype)


attend = functools.partial(flash.attend, flash.Kernels(forward, backward))
