"""Tree attention in blocks against a dense mask, forward and backward, in one run; prints ratios.

  python -m benchmarks.attention.blocked [--length=4096] [--repeats=5]

The row is drawn like a packed row of videos: roots with visual tokens in frames, then short branches.
"""

import statistics
import time

import jax
from absl import app
from absl import flags

from benchmarks.attention import packs as attention_packs
from molmo2_jax.attention import attend

_LENGTH = flags.DEFINE_multi_integer("length", [1024, 4096], "Tokens of the row; may be repeated.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each; the median counts.")
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def median_seconds(function, *arguments) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(_) -> None:
    print(f"{HEADS} heads of {HEAD_DIM}, {KV_HEADS} key heads, float32, tile {attend.TILE}, "
          f"{jax.default_backend()}")
    print("| tokens | density | dense fwd / fwd+bwd, ms | blocked, ms | ratio fwd / fwd+bwd |")
    print("|---|---|---|---|---|")
    for length in _LENGTH.value:
        pack = attention_packs.Pack((length // 6, length // 4), (2, 5), (10, 60))
        mask = attention_packs.row(pack, length, 0)
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (1, length, heads, HEAD_DIM))
                   for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS)))
        seconds = {}
        for name in ("dense", "blocked"):
            def forward(q, k, v, name=name):
                return attend.attend(q, k, v, mask, name)
            both = jax.grad(lambda q, k, v: forward(q, k, v).sum(), argnums=(0, 1, 2))  # noqa: B023
            seconds[name] = tuple(median_seconds(jax.jit(one), q, k, v) for one in (forward, both))
        density = attention_packs.visible_pairs(mask) / length ** 2
        shown = {name: " / ".join(f"{1e3 * value:.0f}" for value in pair) for name, pair in seconds.items()}
        ratio = " / ".join(f"{slow / fast:.1f}" for slow, fast in zip(seconds["dense"], seconds["blocked"]))
        print(f"| {length} | {density:.1%} | {shown['dense']} | {shown['blocked']} | {ratio} |")


if __name__ == "__main__":
    app.run(main)
