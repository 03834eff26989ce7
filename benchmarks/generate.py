"""Prefill and decoding against transformers.generate on the same checkpoints, in one run; prints ratios.

  python -m benchmarks.generate [--size=tiny --size=small] [--threads=1] [--new_tokens=32]
  python -m benchmarks.generate --what=weights --what=roofline
  XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m benchmarks.generate --what=mesh --size=tiny

All answers are greedy and cannot stop early; the tables say whether they are equal. Prefill is from media and
prompt to the first token; decoding is the rest. With one thread, CPU time is measured, which other programs
on the machine disturb little; with more threads, wall time. The fastest of --repeats interleaved runs counts.
Needs torch and transformers.

--what=transformers: both sides in float32. weights: ours in float32, bfloat16 and 8 bits. roofline: a step of
decoding against reading the matrices that it reads, and against their products with a vector, all in turn.
mesh: pretend devices, which share the processor: the tokens count, not the times.
"""

import math
import os
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from absl import app
from absl import flags

from benchmarks import peer
from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax import types
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.model import molmo2
from tests import packs

SIZES = {"tiny": config_lib.nano, "small": peer.small}
_SIZES = flags.DEFINE_multi_enum("size", list(SIZES), list(SIZES), "Model; may be repeated.")
_WHAT = flags.DEFINE_multi_enum("what", ["transformers"], ["transformers", "weights", "roofline", "mesh"],
                                "Table; may be repeated.")
_THREADS = flags.DEFINE_integer("threads", 1, "Processor cores and threads of each side.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 32, "Length of the answers.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 4, "Timed runs of each side.", lower_bound=1)
_CASES = flags.DEFINE_multi_string("case", [], "Prompts, such as text; may be repeated. Default: all.")
FRAMES, WORDS = 8, 20  # of a video prompt
NEVER = -1             # no token ends an answer
Run = Callable[[], tuple[float, float, np.ndarray]]  # seconds of prefill, seconds of decoding, tokens


def cases(config: config_lib.Molmo2Config) -> dict[str, tuple[types.Batch, list, list[types.Sequence]]]:
    """Returns by name: our batch, the last tokens of its questions, and the same questions one by one."""
    clips = [peer.video(config, FRAMES, seed) for seed in range(4)]
    asked = [WORDS + 3 * number for number in range(4)]
    alone = {"text": [peer.question(config, None, 150)], "video": [peer.question(config, clips[0], WORDS)],
             "4 videos": [peer.question(config, clip, words) for clip, words in zip(clips, asked)]}
    rows = {name: (peer.batch_of(prompts, config), [[len(one.tokens) - 1] for one in prompts], prompts)
            for name, prompts in alone.items()}
    tree, last = sequences.ask(clips[0], [(" red" * words,) for words in asked], peer.tokenizer_of(config))
    shared = [peer.question(config, clips[0], words) for words in asked]
    rows |= {"4 questions, 1 video": (peer.batch_of([tree], config), [last], shared)}
    return {name: row for name, row in rows.items() if name in (_CASES.value or rows)}


def ours(model: molmo2.Molmo2, params, batch: types.Batch, last) -> Run:
    last = np.array(last, np.int32)
    wanted = decode.Questions(last, np.full_like(last, _NEW.value), last)

    def run():
        start = clock()
        state = jax.block_until_ready(decode.begin(
            model, params, batch, wanted, 0, NEVER, None, num_new=_NEW.value, sampling=decode.GREEDY,
            cache_dtype=None))
        middle = clock()
        state = jax.block_until_ready(decode.advance(
            model, params, state, _NEW.value, NEVER, None, sampling=decode.GREEDY))
        return middle - start, clock() - middle, np.asarray(state.answers.tokens).reshape(-1, _NEW.value)
    return run


def theirs(model, prompts: list[types.Sequence], config: config_lib.Molmo2Config) -> Run:
    arguments = peer.prompt_arguments(prompts, config)
    length = arguments["input_ids"].shape[1]

    def write(count: int):
        start = clock()
        ids = model.generate(**arguments, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                             eos_token_id=None, pad_token_id=0)
        return clock() - start, ids[:, length:].numpy()

    def run():
        first, _ = write(1)
        whole, tokens = write(_NEW.value)
        return first, whole - first, tokens
    return run


def clock() -> float:
    """Returns seconds: CPU time with one thread, wall time with more."""
    return time.process_time() if _THREADS.value == 1 else time.perf_counter()


def fastest(runs: list[Run]) -> list[tuple[float, float, np.ndarray]]:
    """Returns the least seconds of prefill and of decoding of each side, and its tokens."""
    for run in runs:
        run()  # compiles, warms up
    times: list[list] = [[] for _ in runs]
    for _ in range(_REPEATS.value):
        for held, run in zip(times, runs):
            held.append(run())
    return [(min(one[0] for one in held), min(one[1] for one in held), held[0][2]) for held in times]


def compare(size: str) -> None:
    """Prints a line per case of one model, ours against transformers."""
    config = SIZES[size]()
    params = packs.random_params(config)
    peer_model = peer.exported(params, config)
    model, params = molmo2.Molmo2(config, remat="none"), decode.ready(params, "float32")
    for case, (batch, last, prompts) in cases(config).items():
        mine, other = fastest([ours(model, params, batch, last), theirs(peer_model, prompts, config)])
        rate = [len(prompts) * (_NEW.value - 1) / side[1] for side in (mine, other)]
        row(name_of(size), case, sum(len(one.tokens) for one in prompts), f"{1e3 * mine[0]:.0f}",
            f"{1e3 * other[0]:.0f}", f"{other[0] / mine[0]:.2f}", f"{rate[0]:.0f}", f"{rate[1]:.0f}",
            f"{rate[0] / rate[1]:.2f}", f"{(mine[2] == other[2]).mean():.0%}")


def name_of(size: str) -> str:
    return f"{size}, {peer.num_parameters(SIZES[size]()) / 1e6:.1f}M"


def row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def compare_weights(size: str) -> None:
    """Prints a line per dtype and case of one model; tokens are compared with those of float32."""
    config = SIZES[size]()
    params = packs.random_params(config)
    kinds = [(dtype, weights) for dtype in ("float32", "bfloat16") for weights in (None, "int8")]
    held = [decode.ready(params, dtype, weights=weights) for dtype, weights in kinds]
    for case, (batch, last, _) in cases(config).items():
        made = fastest([ours(molmo2.Molmo2(config, dtype=dtype, remat="none"), one, batch, last)
                        for (dtype, _), one in zip(kinds, held)])
        for (dtype, weights), one, (prefill, seconds, tokens) in zip(kinds, held, made):
            size_of = sum(leaf.nbytes for leaf in jax.tree.leaves(one))
            row(name_of(size), case, " + ".join(filter(None, (dtype, weights))), f"{size_of / 1e6:.0f}",
                f"{1e3 * prefill:.0f}", f"{len(tokens) * (_NEW.value - 1) / seconds:.0f}",
                f"{(tokens == made[0][2]).mean():.0%}")


def roofline(size: str) -> None:
    """Prints the bytes per second of a step of one row, and of what the machine can do with its matrices."""
    config = SIZES[size]()
    params = decode.ready(packs.random_params(config), "float32")
    kernels = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
               for path, leaf in jax.tree_util.tree_leaves_with_path({"text": params["text"]})
               if path[-1].key == "kernel"}
    inputs = [math.prod(one.shape[axis] for axis in range(1 + name.endswith("o/kernel")))
              for name, one in kernels.items()]
    matrices = [one.reshape(count, -1) for one, count in zip(kernels.values(), inputs)]
    matrices.append(params["base_embedding"].T if config.text.tied_head else params["head"])
    vectors = {one.shape[0]: jax.numpy.ones((1, one.shape[0])) for one in matrices}
    total = jax.jit(lambda matrices: sum(one.sum() for one in matrices))
    products = jax.jit(lambda matrices, vectors: sum((vectors[one.shape[0]] @ one).max() for one in matrices))
    prompts = [peer.question(config, None, 150)]
    batch, last = peer.batch_of(prompts, config), [[len(prompts[0].tokens) - 1]]
    decoding = ours(molmo2.Molmo2(config, remat="none"), params, batch, last)

    def timed(function, *given) -> Run:
        def run():
            start = clock()
            jax.block_until_ready(function(*given))
            return 0.0, clock() - start, np.zeros(0)
        return run

    sums, multiplied, whole = fastest([timed(total, matrices), timed(products, matrices, vectors), decoding])
    size_of = sum(one.nbytes for one in matrices)
    for what, seconds in (("sums of the matrices", sums[1]), ("products with a vector", multiplied[1]),
                          ("a step of decoding", whole[1] / (_NEW.value - 1))):
        row(name_of(size), what, f"{size_of / 1e6:.0f}", f"{1e3 * seconds:.2f}",
            f"{size_of / seconds / 1e9:.1f}", f"{sums[1] / seconds:.0%}")


def compare_meshes(size: str) -> None:
    """Prints a line per mesh and case of one model; tokens are compared with those of one device."""
    config = SIZES[size]()
    params, model, first = packs.random_params(config), molmo2.Molmo2(config, remat="none"), {}
    sizes = ({}, {"tensor": 2}, {"data": 2}, {"fsdp": 2}, {"context": 2}, {"tensor": 4},
             {"data": 2, "tensor": 2})
    for one in sizes:
        if math.prod(one.values()) > jax.device_count():
            raise app.UsageError("set XLA_FLAGS=--xla_force_host_platform_device_count=4")
        mesh = sharding.mesh_of_first(sharding.MeshConfig(**{"fsdp": 1} | one))
        layout = jax.tree.map(lambda leaf: leaf.sharding, state.abstract_params(model, mesh))
        held = decode.ready(params, "float32", shardings=layout)
        for case, (batch, last, _) in cases(config).items():
            if len(batch.tokens) % (mesh.shape["data"] * mesh.shape["fsdp"]):
                continue  # fewer rows than devices that share them
            batch = jax.tree.map(sharding.distribute, batch, sharding.of_batch(mesh, batch))
            with sharding.using(mesh):
                _, seconds, tokens = ours(model, held, batch, last)()
            first.setdefault(case, tokens)
            row(name_of(size), " x ".join(f"{axis} {count}" for axis, count in one.items()) or "one device",
                case, f"{(tokens == first[case]).mean():.0%}")


TABLES = {
    "transformers": (compare, ("model", "prompts", "tokens", "prefill, ms", "theirs", "ratio",
                               "decode, tokens/s", "theirs", "ratio", "same tokens")),
    "weights": (compare_weights, ("model", "prompts", "computation + weights", "parameters, MB",
                                  "prefill, ms", "decode, tokens/s", "same tokens")),
    "roofline": (roofline, ("model", "what", "MB read", "ms", "GB/s", "of the sums")),
    "mesh": (compare_meshes, ("model", "mesh", "prompts", "same tokens")),
}


def main(_) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-_THREADS.value:])  # before the first device call
    torch.set_num_threads(_THREADS.value)
    print(f"{_NEW.value} new tokens, {_THREADS.value} thread(s), {jax.default_backend()}")
    for what in _WHAT.value:
        table, columns = TABLES[what]
        print()
        row(*columns)
        print("|" + "---|" * len(columns))
        for size in _SIZES.value:
            table(size)


if __name__ == "__main__":
    app.run(main)
