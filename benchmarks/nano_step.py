"""Times a training step of the quickstart's model against another source tree, and the parts of a step.

  python -m benchmarks.nano_step [--run=full] [--against=../before] [--repeats=12]

One process per tree takes the same rows through its own train step, in turn; the least processor time of a
step on one core counts. Without --against only the parts are timed: ViT, connector, decoder, attention, head
and optimiser, each forward and backward where it has a gradient.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app
from absl import flags

from data_pipelines import pipeline
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch import run
from molmo2_jax import loss
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax.attention import attend
from molmo2_jax.attention import tree_mask
from molmo2_jax.inputs import tokenizer as tokenizers

_RUN = flags.DEFINE_enum("run", "full", ["full", "quickstart"], "World and settings of the run.")
_AGAINST = flags.DEFINE_string("against", None, "Root of another source tree, such as a worktree.")
_REPEATS = flags.DEFINE_integer("repeats", 12, "Timed steps of each side.", lower_bound=1)
_SERVE = flags.DEFINE_bool("serve", False, "Used by the script itself: a step for each line of the input.")
EXAMPLES, SKIPPED = 40, 5    # of each lesson; batches before the one that is timed


def rows(name: str, folder: str):
    """Returns (RunConfig, batch) of a run whose lessons are drawn into `folder`."""
    config = run.resolve([f"gin_configs/runs/{name}.gin"], ["pipeline.DataConfig.num_workers = 0"])
    _, lessons = world_config.WORLDS[name]
    for lesson, (world, _) in lessons().items():
        world_write.write(folder, world, 4, EXAMPLES, split=lesson, has_masks=False, progress=False)
    folders = tuple((str(pathlib.Path(folder) / pathlib.Path(path).name), rates[-1])
                    for path, rates in config.data.train)
    data = dataclasses.replace(config.data, train=folders, lessons=())
    tokenizer = tokenizers.Tokenizer.from_file("assets/nano", config.model.text.vocab_size)
    batches = pipeline.make_iterator(data, config.model, config.inputs, tokenizer)
    try:
        for _ in range(SKIPPED):
            next(batches)
        return config, next(batches)
    finally:
        batches.close()


def least(work: Callable, repeats: int) -> float:
    """Returns the least processor seconds of calls after a first one, which compiles."""
    jax.block_until_ready(work())
    held = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(work())
        held.append(time.process_time() - start)
    return min(held)


def parts(config: run.RunConfig, state, batch, tx) -> dict[str, Callable]:
    """Returns what to call for each part of a step."""
    model, text = config.train.model(config.model), config.model.text
    apply = lambda params, *args, **how: model.apply({"params": params}, *args, **how)
    squares = lambda function: jax.jit(jax.grad(lambda *args: jnp.square(function(*args)).sum()))
    gradients = jax.jit(functools.partial(train.gradients, model, config.train))
    grads, update = gradients(state, batch)[1], jax.jit(tx.update)
    hidden = jax.jit(lambda params: apply(params, batch, method="hidden"))(state.params)

    def head(params):
        return loss.chunked_sums(hidden, functools.partial(apply, params, method="logits"),
                                 apply(params, method="head_kernel"), batch.targets, batch.weights,
                                 config.train.loss_chunk, config.train.dtype).nll

    plan = jax.jit(lambda: attend.plan(tree_mask.from_batch(batch, config.model.visual_attention),
                                       text.num_heads, text.num_kv_heads, text.head_dim))()
    q, k = (jax.random.normal(jax.random.key(0), (*batch.tokens.shape, heads, text.head_dim))
            for heads in (text.num_heads, text.num_kv_heads))
    attention = squares(lambda q, k, v: attend.attend(q, k, v, plan))
    vision = squares(lambda params: apply(params, batch.patches, method=lambda m, x: m.vision(x)))
    embed = squares(lambda params: apply(params, batch, method=lambda m, x: m.embed(x)[0]))
    whole = squares(lambda params: apply(params, batch, method="hidden"))
    of_head = jax.jit(jax.grad(head))
    return {"gradients": lambda: gradients(state, batch),
            "ViT": lambda: vision(state.params),
            "ViT, connector, embedding": lambda: embed(state.params),
            "the same and the decoder": lambda: whole(state.params),
            "attention of one layer of the decoder": lambda: attention(q, k, k),
            "head and loss": lambda: of_head(state.params),
            "optimiser": lambda: update(grads, state.opt_state, state.params)}


def serve() -> None:
    """Prints the processor seconds of a step for each line read."""
    for _, step in zip(sys.stdin, steps()):
        print(f"seconds {step}", flush=True)


def steps():
    """Yields the processor seconds of one step after the other; the first compiles."""
    with tempfile.TemporaryDirectory() as folder:
        config, batch = rows(_RUN.value, folder)
    mesh = sharding.make_mesh(config.mesh, rows=config.micro_batch_rows)
    tx = optim.make(config.optim, config.train.steps)
    with jax.set_mesh(mesh):
        model = config.train.model(config.model)
        state = state_lib.create(model, tx, mesh, 0)
        layout = jax.tree.map(lambda x: x.sharding, state)
        step = train.jitted_step(model, tx, config.train, layout, mesh)
        while True:
            start = time.process_time()
            state, measured = step(state, sharding.put(batch, mesh, 1), None)
            jax.block_until_ready(measured)
            yield time.process_time() - start


def compare(other: str) -> None:
    """Prints the seconds of a step of both trees and their ratio."""
    command = [sys.executable, "-m", "benchmarks.nano_step", "--serve", f"--run={_RUN.value}"]
    here = str(pathlib.Path(__file__).parents[1])
    script = pathlib.Path(__file__).read_text(encoding="utf-8")
    sides = []
    for root in (other, here):   # the other tree may lack this script
        sides.append(subprocess.Popen(
            [sys.executable, "-c", script, *command[3:]], cwd=root, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}))
    held: list[list[float]] = [[], []]
    for _ in range(_REPEATS.value + 1):
        for times, side in zip(held, sides):
            side.stdin.write("\n")
            side.stdin.flush()
            answer = next(line for line in side.stdout if line.startswith("seconds"))
            times.append(float(answer.split()[1]))
    for side in sides:
        side.stdin.close()
        side.wait()
    before, after = (min(times[1:]) for times in held)
    print(f"| {_RUN.value} | before, s | now, s | steps now / before |\n|---|---|---|---|")
    print(f"| processor time of a step | {before:.3f} | {after:.3f} | {before / after:.2f} |")


def main(_) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])   # before the first device call
    if _SERVE.value:
        serve()
    elif _AGAINST.value:
        compare(str(pathlib.Path(_AGAINST.value).absolute()))
    else:
        with tempfile.TemporaryDirectory() as folder:
            config, batch = rows(_RUN.value, folder)
        mesh = sharding.make_mesh(config.mesh, rows=config.micro_batch_rows)
        tx = optim.make(config.optim, config.train.steps)
        print("| part | ms |\n|---|---|")
        with jax.set_mesh(mesh):
            state = state_lib.create(config.train.model(config.model), tx, mesh, 0)
            placed = sharding.put(batch, mesh, 1)
            print(f"| host: put | {1e3 * least(lambda: sharding.put(batch, mesh, 1), 3):.1f} |", flush=True)
            for name, work in parts(config, state, placed, tx).items():
                print(f"| {name} | {1e3 * least(work, _REPEATS.value):.1f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
