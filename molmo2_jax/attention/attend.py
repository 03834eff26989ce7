"""Grouped-query attention under a message-tree mask; one signature, several implementations.

B batch, T query positions, S key positions, N query heads, K key heads, G query heads per key head
(N = K*G; query head n uses key head n // G), H head width.

On a mesh, rows and heads are sharded without communication. Where the length is sharded too, each device
gathers the keys and values of its rows and attends for its own queries; or, if that moves fewer bytes, two
all-to-alls exchange length for heads before and after.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from molmo2_jax import sharding
from molmo2_jax.attention import blocked
from molmo2_jax.attention import gpu
from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tpu
from molmo2_jax.attention import tree_mask

TILE = 64  # positions per side of a tile of the blocked path
INTERPRETED = "_interpret"  # runs a kernel in Pallas' interpreter on any device, slowly: for tests
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}  # by platform; blocked elsewhere
IMPLEMENTATIONS = ("dense", "blocked", *KERNELS.values(), *(name + INTERPRETED for name in KERNELS.values()))
_EXECUTE: dict[str, Callable] = {
    "blocked": blocked.attend, "pallas_tpu": tpu.attend, "pallas_gpu": gpu.attend}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("mask", "work"),
                   meta_fields=("implementation", "tiling", "axes"))
@dataclasses.dataclass(frozen=True)
class Plan:
    """How attention under one mask is computed: made once per step, shared by all layers."""
    mask: tree_mask.TreeMask
    work: tiling_lib.Work | None
    implementation: str
    tiling: tiling_lib.Tiling | None
    axes: sharding.AttentionAxes | None


def platform() -> str:
    """Returns "cpu", "tpu" or "gpu": the platform of the current mesh, which may be a compile-only one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@functools.cache
def _log_once(implementation: str, platform: str) -> None:
    logging.getLogger(__name__).info("attention: %s on %s", implementation, platform)


def _check(implementation: str | None) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}")
    if implementation in KERNELS.values() and KERNELS.get(platform()) != implementation:
        needed = implementation.removeprefix("pallas_").upper()
        raise ValueError(f"implementation {implementation!r} needs a {needed}; got {platform()!r} "
                         f"('{implementation}{INTERPRETED}' runs it anywhere, slowly)")


def _tiling(implementation: str, rows: int, num_queries: int, num_keys: int, num_groups: int, head_dim: int):
    """Returns the tiling for one device's part of the attention."""
    if implementation == "pallas_tpu":
        return tpu.choose_tiling(rows, num_queries, num_keys, num_groups, head_dim)
    if implementation == "pallas_gpu":
        return gpu.choose_tiling(head_dim)
    ring = 0 if implementation.startswith("pallas_gpu") else tiling_lib.MAX_TILES
    return tiling_lib.Tiling(query_tile=TILE, key_tile=TILE, ring=ring,
                             interpret=implementation.endswith(INTERPRETED))


def plan(mask: tree_mask.TreeMask, num_heads: int, num_kv_heads: int, head_dim: int,
         implementation: str | None = None) -> Plan:
    """Returns the plan of self-attention under `mask`, for the devices of the current mesh.

    Args:
      implementation: "dense" materialises the mask (tests), "blocked" visits the tiles that the mask touches,
        "pallas_tpu" and "pallas_gpu" do so in a kernel. None picks the platform's kernel, else "blocked".

    Raises:
      ValueError: the implementation is unknown or not for this platform, query heads are no multiple of key
        heads, or the mask has more tiles than a work list holds.
    """
    _check(implementation)
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of key heads; got {num_heads} and {num_kv_heads}")
    implementation = implementation or KERNELS.get(platform(), "blocked")
    _log_once(implementation, platform())
    if implementation == "dense":
        return Plan(mask, None, implementation, None, None)
    rows, length = mask.end.shape
    axes = sharding.attention_axes(rows, num_heads, num_kv_heads, length)
    own_rows, num_queries = (rows, length) if axes is None else (
        rows // axes.num_row_parts, length if axes.exchanges_heads else length // axes.num_length_parts)
    tiling = _tiling(implementation, own_rows, num_queries, length, num_heads // num_kv_heads, head_dim)
    if axes is None:
        work = tiling_lib.prepare(mask, tree_mask.all_queries(mask), tiling)
    else:
        whole = PartitionSpec(axes.rows)
        own = whole if axes.exchanges_heads else PartitionSpec(axes.rows, axes.length)
        prepare = jax.shard_map(functools.partial(_prepare_part, axes, tiling), in_specs=(whole, whole, own),
                                out_specs=_work_spec(axes), check_vma=False)
        work = prepare(*mask, mask.group)
    return Plan(mask, work, implementation, tiling, axes)


def _work_spec(axes: sharding.AttentionAxes) -> PartitionSpec:
    """Returns the spec of every array of a Work: one piece for each part of rows and length."""
    return PartitionSpec((*axes.rows, *([axes.length] if axes.length else [])))


def _prepare_part(axes, tiling, end_BS, group_BS, own_group_BT):
    """Returns the Work of one device: its own queries over all keys of its rows."""
    rows, length = own_group_BT.shape
    part = 0 if length == end_BS.shape[1] else jax.lax.axis_index(axes.length)
    queries = tree_mask.Queries(jnp.full(rows, part * length, jnp.int32), own_group_BT)
    return tiling_lib.prepare(tree_mask.TreeMask(end_BS, group_BS), queries, tiling)


def attend(q_BTNH, k_BTKH, v_BTKH, mask: tree_mask.TreeMask | Plan, implementation: str | None = None):
    """Returns [B, T, N, H]: softmax(q k / sqrt(H)) v where `mask` allows; softmax in float32.

    Args:
      mask: a mask, or the plan made from one; a plan fixes the implementation.

    Raises:
      ValueError: as `plan`, or the shapes or dtypes of the operands disagree.
    """
    _check(implementation)
    _check_operands(q_BTNH, k_BTKH, v_BTKH)
    with jax.named_scope("tree_attention"):
        if not isinstance(mask, Plan):
            mask = plan(mask, q_BTNH.shape[2], k_BTKH.shape[2], q_BTNH.shape[3], implementation)
        if mask.implementation == "dense":
            return attend_visible(q_BTNH, k_BTKH, v_BTKH, tree_mask.dense(mask.mask))
        execute = functools.partial(_EXECUTE[mask.implementation.removesuffix(INTERPRETED)],
                                    tiling=mask.tiling)
        if mask.axes is None:
            return execute(q_BTNH, k_BTKH, v_BTKH, mask.work)
        return _attend_in_parts(execute, mask.axes, q_BTNH, k_BTKH, v_BTKH, mask.work)


def _check_operands(q_BTNH, k_BTKH, v_BTKH) -> None:
    B, T, _, H = q_BTNH.shape
    if k_BTKH.shape != v_BTKH.shape or k_BTKH.shape[:2] + k_BTKH.shape[3:] != (B, T, H):
        raise ValueError("queries, keys and values must have the same rows, positions and head width; got "
                         f"{q_BTNH.shape}, {k_BTKH.shape} and {v_BTKH.shape}")
    if {x.dtype for x in (q_BTNH, k_BTKH, v_BTKH)} not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}):
        raise ValueError("queries, keys and values must all be float32 or all bfloat16; got "
                         f"{q_BTNH.dtype}, {k_BTKH.dtype} and {v_BTKH.dtype}")


def _attend_in_parts(execute, axes, q_BTNH, k_BTKH, v_BTKH, work):
    """Returns [B, T, N, H], sharded over the mesh like the queries."""
    def part(q, k, v, work):
        if axes.exchanges_heads:
            swap = functools.partial(jax.lax.all_to_all, axis_name=axes.length, tiled=True)
            q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
            return swap(execute(q, k, v, work), split_axis=1, concat_axis=2)
        if axes.length:
            k, v = (jax.lax.all_gather(x, axes.length, axis=1, tiled=True) for x in (k, v))
        return execute(q, k, v, work)

    spec = PartitionSpec(axes.rows, axes.length, axes.heads)
    return jax.shard_map(part, in_specs=(spec, spec, spec, _work_spec(axes)), out_specs=spec,
                         check_vma=False)(q_BTNH, k_BTKH, v_BTKH, work)


def attend_visible(q_BTNH, k_BSKH, v_BSKH, visible_BTS):
    """Returns [B, T, N, H] under an explicit mask bool[B, T, S]."""
    p_BKGTS = jax.nn.softmax(_scores(q_BTNH, k_BSKH, visible_BTS), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH).reshape(q_BTNH.shape)


def _scores(q_BTNH, k_BSKH, visible_BTS):
    """Returns float32[B, K, G, T, S], masked; queries are scaled here."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * H ** -0.5).reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    return jnp.where(visible_BTS[:, None, None], s_BKGTS, blocked.MASKED)
