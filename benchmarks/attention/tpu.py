"""The attention kernel for TPUs without a TPU: tiles computed, and memory. attention_schedule has the cycles.

  python -m benchmarks.attention.tpu --table=tiles
  python -m benchmarks.attention.tpu --table=compile [--topology=v5p:2x2x1] [--length=16384]
  python -m benchmarks.attention.tpu --table=peers

`tiles` counts, on the packs of attention_packs, what is computed against what is visible. `compile` compiles
one layer, forward and backward, and prints its temporary memory. `peers` does so for other ways to attend.
"""

import functools

import jax
import numpy as np
from absl import app
from absl import flags

from benchmarks.attention import layer as attention_layer
from benchmarks.attention import packs as attention_packs
from benchmarks.attention import peers as attention_peers
from molmo2_jax.attention import attend
from molmo2_jax.attention import tiling as tiling_lib

_TABLE = flags.DEFINE_enum("table", "tiles", ["tiles", "compile", "peers"], "What to print.")
_TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"],
                                      "TPUs to compile for.")
_LENGTH = flags.DEFINE_multi_integer("length", [2560, 16_384, 36_864, 65_536], "Tokens of the row.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows drawn of each pack.")
TILES = ((128, 128), (128, 512), (256, 512), (512, 512))
MIB = 2**20


def print_tiles() -> None:
    """Prints pairs computed per visible pair, by tile."""
    length = 16_384
    classify = jax.jit(tiling_lib.tile_classes, static_argnums=(1, 2))
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
            if (q, k) == (256, 512):
                shares = [f"{(classes == kind).sum() / (classes > 0).sum():.0%}" for kind in (1, 2, 3)]
        density = pairs / len(masks) / length ** 2
        print(f"| {name} | {density:.1%} | {' | '.join(cells)} | {' / '.join(shares)} |", flush=True)


def temporary(mesh, function, length: int) -> float:
    """Returns MiB of temporary memory of one layer, forward and backward."""
    q, k, mask = attention_layer.arrays(mesh, length)
    with jax.set_mesh(mesh):
        lowered = jax.jit(functools.partial(attention_layer.both_ways, function)).lower(q, k, k, q, mask)
        return lowered.compile().memory_analysis().temp_size_in_bytes / MIB


def print_compiled() -> None:
    print("| chip | tokens | tile | key tiles in the ring / needed at most | temporary, MiB |")
    print("|---|---|---|---|---|")
    for topology in _TOPOLOGY.value:
        mesh = attention_layer.mesh_of(topology)
        for length in _LENGTH.value:
            tiling = attention_layer.tiling_on(mesh, length)
            tile = f"{tiling.query_tile} x {tiling.key_tile}"
            print(f"| {topology} | {length} | {tile} | {tiling.ring} / {-(-length // tiling.key_tile)} | "
                  f"{temporary(mesh, attend.attend, length):.0f} |", flush=True)


def print_peers() -> None:
    peers = {"this kernel": attend.attend, **attention_peers.PEERS,
             **{name: functools.partial(attend.attend, implementation=name) for name in ("blocked", "dense")}}
    print("| way to attend | " + " | ".join(f"{length} tokens, MiB" for length in _LENGTH.value) + " |")
    print("|---" * (len(_LENGTH.value) + 1) + "|")
    mesh = attention_layer.mesh_of(_TOPOLOGY.value[0])
    for name, function in peers.items():
        cells = []
        for length in _LENGTH.value:
            try:
                cells.append(f"{temporary(mesh, function, length):.0f}")
            except Exception as error:  # a peer that is missing or cannot do this: its reason
                cells.append(str(error).strip().splitlines()[0])
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(_) -> None:
    {"tiles": print_tiles, "compile": print_compiled, "peers": print_peers}[_TABLE.value]()


if __name__ == "__main__":
    app.run(main)
