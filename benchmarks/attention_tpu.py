"""The attention kernel for TPUs without a TPU: tiles computed, memory, and the compiler's own schedule.

  python -m benchmarks.attention_tpu --table=tiles
  python -m benchmarks.attention_tpu --table=compile [--topology=v5p:2x2x1] [--length=16384]
  python -m benchmarks.attention_tpu --table=peers
  python -m benchmarks.attention_tpu --table=schedule

`tiles` counts, on the packs of attention_packs, what is computed against what is visible. `compile` compiles
one layer, forward and backward, and prints its temporary memory. `peers` does so for other ways to attend.
`schedule` counts the instruction bundles of each region of the kernels, which is about their cycles. Nothing
here is a time measured on a device.
"""

import functools
import glob
import os
import re
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl import flags
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from benchmarks import attention_packs
from molmo2_jax import sharding
from molmo2_jax.attention import attend
from molmo2_jax.attention import pallas_tpu
from molmo2_jax.attention import tiling as tiling_lib
from molmo2_jax.attention import tree_mask

_TABLE = flags.DEFINE_enum("table", "tiles", ["tiles", "compile", "peers", "schedule"], "What to print.")
_TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"],
                                      "TPUs to compile for.")
_LENGTH = flags.DEFINE_multi_integer("length", [2560, 16_384, 36_864, 65_536], "Tokens of the row.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows drawn of each pack.")
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TILES = ((128, 128), (128, 512), (256, 512), (512, 512))
MIB = 2**20


def print_tiles() -> None:
    """Prints pairs computed per visible pair, by tile."""
    length = 16_384
    classify = jax.jit(tree_mask.tile_classes, static_argnums=(1, 2))
    print(f"{length} tokens, {_ROWS.value} rows each")
    tiles = " | ".join(f"{q} x {k}" for q, k in TILES)
    print(f"| pack | density | {tiles} | full / interval / visual |")
    print("|---" * (len(TILES) + 3) + "|")
    for name, pack in attention_packs.PACKS.items():
        masks = [attention_packs.row(pack, length, seed) for seed in range(_ROWS.value)]
        pairs = sum(map(attention_packs.visible_pairs, masks))
        cells = []
        for q, k in TILES:
            classes = np.stack([classify(mask, q, k) for mask in masks])
            cells.append(f"{(classes > 0).sum() * q * k / pairs:.2f}")
            if (q, k) == (128, 512):
                shares = [f"{(classes == kind).sum() / (classes > 0).sum():.0%}" for kind in (1, 2, 3)]
        density = pairs / len(masks) / length ** 2
        print(f"| {name} | {density:.1%} | {' | '.join(cells)} | {' / '.join(shares)} |", flush=True)


def mesh_of(topology: str):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sharding.make_mesh(sharding.MeshConfig(), devices[:1])


def arrays(mesh, length: int):
    """Returns the shapes of queries, keys and a mask of one row, on the mesh's device."""
    place = NamedSharding(mesh, PartitionSpec())
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    integers = array(1, length, dtype=jnp.int32)
    return (array(1, length, HEADS, HEAD_DIM), array(1, length, KV_HEADS, HEAD_DIM),
            tree_mask.TreeMask(integers, integers))


def both_ways(function, q, k, v, grad, mask):
    out, pull = jax.vjp(lambda *x: function(*x, mask), q, k, v)
    return out, *pull(grad)


def temporary(mesh, function, length: int) -> float:
    """Returns MiB of temporary memory of one layer, forward and backward."""
    q, k, mask = arrays(mesh, length)
    with jax.set_mesh(mesh):
        lowered = jax.jit(functools.partial(both_ways, function)).lower(q, k, k, q, mask)
        return lowered.compile().memory_analysis().temp_size_in_bytes / MIB


def print_compiled() -> None:
    print("| chip | tokens | tile | key tiles in the ring / needed at most | temporary, MiB |")
    print("|---|---|---|---|---|")
    for topology in _TOPOLOGY.value:
        mesh = mesh_of(topology)
        for length in _LENGTH.value:
            with jax.set_mesh(mesh):
                tiling = pallas_tpu.choose_tiling(1, length, length, HEADS // KV_HEADS, HEAD_DIM)
            tile = f"{tiling.query_tile} x {tiling.key_tile}"
            print(f"| {topology} | {length} | {tile} | {tiling.ring} / {-(-length // tiling.key_tile)} | "
                  f"{temporary(mesh, attend.attend, length):.0f} |", flush=True)


def splash(q, k, v, mask):
    """Returns causal attention by the kernel that comes with JAX; `mask` is not looked at."""
    del mask
    length = q.shape[1]
    causal = splash_attention_mask.CausalMask((length, length))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * HEADS), head_shards=1, q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=512, block_kv=512, block_kv_compute=512, block_q_dkv=512, block_kv_dkv=512,
            block_kv_dkv_compute=512, block_q_dq=512, block_kv_dq=512))
    repeat = lambda x: jnp.repeat(x, HEADS // KV_HEADS, axis=2)
    out = jax.vmap(kernel)(*(x.transpose(0, 2, 1, 3) for x in (q * HEAD_DIM ** -0.5, repeat(k), repeat(v))))
    return out.transpose(0, 2, 1, 3)


def print_peers() -> None:
    peers = {"this kernel": attend.attend, "splash, causal only": splash,
             **{name: functools.partial(attend.attend, implementation=name) for name in ("blocked", "dense")}}
    print("| way to attend | " + " | ".join(f"{length} tokens, MiB" for length in _LENGTH.value) + " |")
    print("|---" * (len(_LENGTH.value) + 1) + "|")
    mesh = mesh_of(_TOPOLOGY.value[0])
    for name, function in peers.items():
        cells = [f"{temporary(mesh, function, length):.0f}" for length in _LENGTH.value]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_schedule() -> None:
    """Compiles both kernels in a process that dumps the schedule, and counts bundles by region."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        print_regions(folder)


def print_regions(folder: str) -> None:
    """Prints the regions of each chip; the minimum is that of four units of 128 x 128, or two of 256 x 256.

    On the larger units it does not count that heads of 128 fill them by half.
    """
    print("| chip | kernel | full / interval / visual tile, bundles | share of the matrix unit's minimum |")
    print("|---|---|---|---|")
    for topology in _TOPOLOGY.value:
        mesh = mesh_of(topology)
        q, k, mask = arrays(mesh, 2560)
        place = NamedSharding(mesh, PartitionSpec())
        with jax.set_mesh(mesh):
            tiling = pallas_tpu.choose_tiling(1, 2560, 2560, HEADS // KV_HEADS, HEAD_DIM)
            work = jax.eval_shape(lambda m: tiling_lib.prepare(m, tree_mask.all_queries(m), tiling), mask)
            work = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), work)
            run = functools.partial(both_ways, functools.partial(pallas_tpu.attend, tiling=tiling))
            jax.jit(run).lower(q, k, k, q, work).compile()
        for name, products in (("tree_attention_.", 2), ("tree_attention_gradients", 5)):
            path = max(glob.glob(f"{folder}/*{name}*[0-9]-final_bundles.txt"), key=os.path.getmtime)
            regions = longest_regions(path, 3)
            flops = 2 * products * tiling.query_tile * tiling.key_tile * HEADS // KV_HEADS * HEAD_DIM
            minimum = flops / (2 * 4 * 128 * 128)
            print(f"| {topology} | {name.strip('_.')} | {' / '.join(map(str, regions))} | "
                  f"{' / '.join(f'{minimum / region:.0%}' for region in regions)} |", flush=True)


def longest_regions(path: str, count: int) -> list[int]:
    """Returns the lengths of the `count` longest stretches between predicated jumps, in program order.

    These are the bodies for the three classes of tile.
    """
    with open(path, encoding="utf-8") as lines:
        starts = [int(found[1], 16) for line in lines if (found := re.match(r"\s*(0x[0-9a-f]+)\s+PF:", line))]
    lengths = [after - before for before, after in zip(starts, starts[1:])]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-count:]
    return [lengths[index] for index in sorted(longest)]


def main(_) -> None:
    {"tiles": print_tiles, "compile": print_compiled, "peers": print_peers,
     "schedule": print_schedule}[_TABLE.value]()


if __name__ == "__main__":
    app.run(main)
