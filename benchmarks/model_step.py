"""Forward and backward pass of one model of about 50M parameters against transformers, in one run.

  python -m benchmarks.model_step [--threads=1] [--repeats=4]

Four batches, float32, weighted cross-entropy, gradients of all parameters, no optimiser:

- one sequence: a video and one conversation, the same arrays on both sides;
- packed trees: three videos with four conversations each in one row, the same row on both sides; transformers
  takes the tree mask as a dense array;
- a longer row: the same with twelve videos, still a fraction of the 16,384 tokens of a row in training;
- annotations: our packed row against the same conversations as transformers can hold them without tree masks,
  each with its video in a row of its own, padded to the longest. Here the losses are summed in
  another order, and the ratio includes the work that trees save.

With one thread, CPU time is measured; with more, wall time. The fastest of --repeats interleaved steps
counts. Needs torch and transformers.
"""

import math
import os
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import torch
from absl import app
from absl import flags

from benchmarks import peer
from molmo2_jax import config as config_lib
from molmo2_jax import loss
from molmo2_jax import types
from molmo2_jax.attention import tree_mask
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.model import molmo2
from tests import packs

_THREADS = flags.DEFINE_integer("threads", 1, "Processor cores and threads of each side.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 4, "Timed steps of each side.", lower_bound=1)
VIDEOS, LONG_ROW_VIDEOS, FRAMES, ANSWER_WORDS = 3, 12, 8, (12, 20, 30, 40)
LOSS_TOLERANCE = 1e-5  # relative; measured 2e-7


def model_config() -> config_lib.Molmo2Config:
    return peer.small(width=512, num_layers=8, vocab_size=12288, vision_layers=6)


def trees(config: config_lib.Molmo2Config, videos: int) -> tuple[list[types.Sequence], list[types.Sequence]]:
    """Returns (a message tree per video, each of its conversations as a sequence of its own)."""
    together, alone = [], []
    for seed in range(videos):
        crops = peer.video(config, FRAMES, seed)
        branches = [types.Branch(turns=(" red", " blue" * words)) for words in ANSWER_WORDS]
        together.append(sequences.build(crops, branches, peer.tokenizer_of(config)))
        alone += [sequences.build(crops, [branch], peer.tokenizer_of(config)) for branch in branches]
    return together, alone


def packed(held: Sequence[types.Sequence], config: config_lib.Molmo2Config) -> types.Batch:
    """Returns one row with the sequences and no padding."""
    T, M, R = (sum(len(getattr(one, name)) for one in held) for name in ("tokens", "patches", "pooled"))
    shape = types.RowShape(T=T, M=M, R=R, W=math.prod(config.connector.video_window))
    return rows_lib.stack([rows_lib.join(held, shape, held[0].patches.shape[1:])])


def our_step(model: molmo2.Molmo2, params, batch: types.Batch) -> Callable[[], float]:
    def objective(params):
        hidden_BTD = model.apply({"params": params}, batch, method="hidden")
        sums = loss.token_sums(model.apply({"params": params}, hidden_BTD, method="logits"),
                               batch.targets, batch.weights)
        return sums.nll / sums.weight

    step = jax.jit(jax.value_and_grad(objective))
    return lambda: float(jax.block_until_ready(step(params))[0])


def their_step(model, batch: types.Batch, held: Sequence[types.Sequence], config) -> Callable[[], float]:
    """Returns a step on a Batch whose mask is passed as a dense array."""
    seen = np.asarray(tree_mask.dense(tree_mask.from_batch(batch, config.visual_attention)))
    hidden = torch.from_numpy(np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32))[:, None]
    return _their_step(model, batch, peer.video_arguments(held, config) | {"attention_mask": hidden})


def their_rows(model, held: Sequence[types.Sequence], config) -> Callable[[], float]:
    """Returns a step on one sequence per row; transformers builds the mask from token types."""
    batch = peer.batch_of(held, config)
    arguments = {"attention_mask": peer.whole(batch.example >= 0),
                 "mm_token_type_ids": peer.whole(batch.image >= 0)}
    return _their_step(model, batch, peer.video_arguments(held, config) | arguments)


def _their_step(model, batch: types.Batch, arguments: dict) -> Callable[[], float]:
    scale = torch.from_numpy(batch.weights)
    targets = peer.whole(np.where(batch.weights > 0, batch.targets, 0))  # visual tokens are never targets
    arguments |= {"input_ids": peer.whole(batch.tokens), "position_ids": peer.whole(batch.positions)}

    def step():
        model.zero_grad()
        logits = model(**arguments, use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        value = (scale.flatten() * nll).sum() / scale.sum()
        value.backward()
        return float(value.detach())
    return step


def compare(name: str, mine: Callable[[], float], other: Callable[[], float], is_same: bool) -> None:
    """Prints a line of the table; the first call of each compiles and gives the loss."""
    values = mine(), other()
    if is_same and not math.isclose(*values, rel_tol=LOSS_TOLERANCE):
        raise ValueError(f"both sides must compute the same loss; got {values}")
    times: list[list[float]] = [[], []]
    for _ in range(_REPEATS.value):
        for held, step in zip(times, (mine, other)):
            start = clock()
            step()
            held.append(clock() - start)
    ours, theirs = map(min, times)
    print(f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} |", flush=True)


def clock() -> float:
    """Returns seconds: CPU time with one thread, wall time with more."""
    return time.process_time() if _THREADS.value == 1 else time.perf_counter()


def main(_) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-_THREADS.value:])  # before the first device call
    torch.set_num_threads(_THREADS.value)
    config = model_config()
    params = packs.random_params(config)
    theirs = peer.exported(params, config)
    model, params = molmo2.Molmo2(config, remat="none"), jax.device_put(params)
    together, alone = trees(config, VIDEOS)
    many, _ = trees(config, LONG_ROW_VIDEOS)
    row, one, long_row = (packed(held, config) for held in (together, alone[:1], many))
    print(f"{peer.num_parameters(config) / 1e6:.1f}M parameters, {_THREADS.value} thread(s), float32; "
          f"{one.tokens.size} tokens; {row.tokens.size} tokens in a row of trees, "
          f"{long_row.tokens.size} in a longer one, {sum(len(each.tokens) for each in alone)} one by one")
    print("| batch | ours, s | transformers, s | ratio |\n|---|---|---|---|")
    compare("one sequence", our_step(model, params, one), their_step(theirs, one, alone[:1], config), True)
    packed_step = our_step(model, params, row)
    compare("packed trees", packed_step, their_step(theirs, row, together, config), True)
    compare("a longer row", our_step(model, params, long_row), their_step(theirs, long_row, many, config),
            True)
    compare("annotations", packed_step, their_rows(theirs, alone, config), False)


if __name__ == "__main__":
    app.run(main)
