"""Prefill and decoding against transformers.generate on the same checkpoints, in one run; prints ratios.

  python -m benchmarks.generate [--size=tiny --size=small] [--threads=1] [--new_tokens=32]

Both sides answer greedily in float32 and may not stop early; whether they say the same is part of the table.
Prefill is media and prompt to first token; decoding the rest. With one thread, processor time is measured:
other programs on the machine disturb it little. With more threads it is wall time. The fastest of
--repeats interleaved runs counts. Needs torch and transformers.
"""

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
from molmo2_jax import types
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.model import molmo2
from tests import packs

SIZES = {"tiny": config_lib.nano, "small": peer.small}
_SIZES = flags.DEFINE_multi_enum("size", list(SIZES), list(SIZES), "Model; may be repeated.")
_THREADS = flags.DEFINE_integer("threads", 1, "Processor cores and threads of each side.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 32, "Length of the answers.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 4, "Timed runs of each side.", lower_bound=1)
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
    return rows | {"4 questions, 1 video": (peer.batch_of([tree], config), [last], shared)}


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
    """Returns seconds: of the processor with one thread, of the wall with more."""
    return time.process_time() if _THREADS.value == 1 else time.perf_counter()


def fastest(runs: list[Run]) -> list[tuple[float, float, np.ndarray]]:
    """Returns for each side its least seconds of prefill and of decoding, and its tokens."""
    for run in runs:
        run()  # compiles, warms up
    times: list[list] = [[] for _ in runs]
    for _ in range(_REPEATS.value):
        for held, run in zip(times, runs):
            held.append(run())
    return [(min(one[0] for one in held), min(one[1] for one in held), held[0][2]) for held in times]


def compare(size: str) -> None:
    """Prints a line per case of one model."""
    config = SIZES[size]()
    params = packs.random_params(config)
    peer_model = peer.exported(params, config)
    model, params = molmo2.Molmo2(config, remat="none"), decode.ready(params, "float32")
    name = f"{size}, {peer.num_parameters(config) / 1e6:.1f}M"
    for case, (batch, last, prompts) in cases(config).items():
        mine, other = fastest([ours(model, params, batch, last), theirs(peer_model, prompts, config)])
        rate = [len(prompts) * (_NEW.value - 1) / side[1] for side in (mine, other)]
        same = (mine[2] == other[2]).mean()
        print(f"| {name} | {case} | {sum(len(one.tokens) for one in prompts)} | {1e3 * mine[0]:.0f} | "
              f"{1e3 * other[0]:.0f} | {other[0] / mine[0]:.2f} | {rate[0]:.0f} | {rate[1]:.0f} | "
              f"{rate[0] / rate[1]:.2f} | {same:.0%} |", flush=True)


def main(_) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-_THREADS.value:])  # before the first device call
    torch.set_num_threads(_THREADS.value)
    print(f"{_NEW.value} new tokens, {_THREADS.value} thread(s), float32, {jax.default_backend()}")
    print("| model | prompts | tokens | prefill, ms | theirs | ratio | decode, tokens/s | theirs | "
          "ratio | same tokens |\n|" + "---|" * 10)
    for size in _SIZES.value:
        compare(size)


if __name__ == "__main__":
    app.run(main)
