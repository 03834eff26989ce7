"""Cycles of attention kernels on a TPU, from the compiler's schedule: by region, and for whole rows.

  python -m benchmarks.attention.schedule [--topology=v5p:2x2x1] [--length=16384]
      [--contender=ours|tokamax|tokamax-dense] [--tile=1024] [--schedules=FOLDER]

The compiler writes the instruction bundles of a kernel; a bundle takes about a cycle, without stalls. A
kernel is a loop of steps. One body of a few is the tile's (which one depends on the tile's mask); some run
once for a row of tiles (clearing sums, storing them); the rest runs always. So a row of tokens takes

    tiles of each class x body + steps x rest + rows of tiles x what they run,

but a tile no less than its products take on the matrix units. Nothing here is a time measured on a device.
One contender a process: the compiler takes the folder for schedules once. `--schedules` keeps it, and
reads what is there instead of compiling again.
"""

import functools
import glob
import os
import re
import tempfile

import jax
import numpy as np
from absl import app
from absl import flags

from benchmarks.attention import layer as attention_layer
from benchmarks.attention import packs as attention_packs
from benchmarks.attention import peers as attention_peers
from benchmarks.attention import regions as attention_regions
from molmo2_jax.attention import attend
from molmo2_jax.attention import tiling as tiling_lib

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "TPU to compile for.")
PEERS = {"tokamax": attention_peers.tokamax_causal, "tokamax-dense": attention_peers.tokamax_dense}
_CONTENDER = flags.DEFINE_enum("contender", "ours", ["ours", *PEERS], "Whose kernels.")
_LENGTH = flags.DEFINE_integer("length", 16_384, "Tokens of the rows that are counted.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows drawn of each pack.")
_TILE = flags.DEFINE_integer("tile", 1024, "Side of a peer's tiles.")
_SCHEDULES = flags.DEFINE_string("schedules", "", "Folder for schedules; none: a temporary one.")
COMPILED_LENGTH = 4096  # a body does not depend on the length


def compile_contender(topology: str, contender: str) -> None:
    """Compiles a layer, forward and backward; the compiler writes what it does into its folder."""
    function = attend.attend if contender == "ours" else functools.partial(PEERS[contender], tile=_TILE.value)
    mesh = attention_layer.mesh_of(topology)
    q, k, mask = attention_layer.arrays(mesh, COMPILED_LENGTH)
    with jax.set_mesh(mesh):
        jax.jit(functools.partial(attention_layer.both_ways, function)).lower(q, k, k, q, mask).compile()


def read_kernels(folder: str) -> dict[str, attention_regions.Regions]:
    """Returns the regions of the kernels forward and for gradients."""
    found = {}
    for path in glob.glob(f"{folder}/*-final_bundles.txt"):
        name = os.path.basename(path)
        for kind, pattern in (("forward", r"tree_attention\.|fwd"), ("gradients", r"gradients\.|dkv")):
            if re.search(pattern, name) and "schedule-analysis" not in name:
                found[kind] = attention_regions.read_regions(path)
    return dict(sorted(found.items()))


def print_regions(kernels, tile, heads) -> None:
    print("| kernel | tile | bodies of its kinds | least cycles of the products | a row of tiles | a step |")
    print("|---" * 6 + "|")
    for name, regions in kernels.items():
        least = attention_regions.least_cycles(name, tile, heads)
        print(f"| {name} | {heads} x {tile[0]} x {tile[1]} | {' / '.join(map(str, regions.kinds))} | "
              f"{' / '.join(f'{least / x:.0%}' for x in regions.kinds)} | {regions.row} | {regions.step} |")


def print_rows(kernels, tile, heads, packs) -> None:
    """Prints, of each pack, cycles of a row of tokens, and the share of the peak that visible pairs take."""
    classify = jax.jit(tiling_lib.tile_classes, static_argnums=(1, 2))
    groups = attention_layer.HEADS // heads
    print("| pack | million cycles of a core, forward / both ways | share of the peak on visible pairs |")
    print("|---|---|---|")
    for name in packs:
        masks = [attention_packs.row(attention_packs.PACKS[name], _LENGTH.value, seed)
                 for seed in range(_ROWS.value if name != "causal" else 1)]
        pairs = np.mean([attention_packs.visible_pairs(mask) for mask in masks])
        classes = [np.asarray(classify(mask, *tile))[0] for mask in masks]
        spent = {kernel: groups * np.mean([attention_regions.cycles(kernel, regions, one, tile, heads)
                                           for one in classes]) for kernel, regions in kernels.items()}
        forward, both = spent["forward"], sum(spent.values())
        flops = 2 * attention_layer.HEAD_DIM * attention_layer.HEADS * pairs  # of one product
        product = flops / attention_regions.FLOPS_PER_CYCLE
        print(f"| {name} | {forward / 1e6:.2f} / {both / 1e6:.2f} | "
              f"{2 * product / forward:.0%} / {7 * product / both:.0%} |", flush=True)


def main(_) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = _SCHEDULES.value or temporary
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        if not glob.glob(f"{folder}/*-final_bundles.txt"):
            compile_contender(_TOPOLOGY.value, _CONTENDER.value)
        kernels = read_kernels(folder)
    tile, heads = (_TILE.value, _TILE.value), 1
    if _CONTENDER.value == "ours":
        tiling = attention_layer.tiling_on(attention_layer.mesh_of(_TOPOLOGY.value), _LENGTH.value)
        tile, heads = (tiling.query_tile, tiling.key_tile), attention_layer.HEADS // attention_layer.KV_HEADS
    print(f"{_CONTENDER.value}, {_TOPOLOGY.value}, rows of {_LENGTH.value} tokens")
    print_regions(kernels, tile, heads)
    is_exact = _CONTENDER.value in ("ours", "tokamax-dense")
    print_rows(kernels, tile, heads, attention_packs.PACKS if is_exact else ["causal"])


if __name__ == "__main__":
    app.run(main)
