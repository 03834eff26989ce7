"""A run that is stopped, killed or moved has the same batches and reads every example once per epoch."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from data_pipelines import pipeline
from molmo2_jax import config
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import tokenizer as tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[3]
SIZES = {"a": 7, "b": 11, "c": 4}
BROKEN = {"b-3", "c-1"}     # their media
BROKEN_LINES = {"a-2"}
MODEL = config.Molmo2Config(
    vision=config.VisionConfig(image_size=24, patch_size=4, width=16, num_layers=2, num_heads=1, head_dim=16,
                               mlp_width=16),
    connector=config.ConnectorConfig(taps=(1,), num_heads=1, head_dim=16, mlp_width=16),
    text=dataclasses.replace(config.nano().text, vocab_size=400))
INPUTS = config.InputConfig(max_crops=2, overlap_margins=(1, 1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three data sets of texts and tiny images. Answers name their records, three of which are broken."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name, size in SIZES.items():
        (root / name).mkdir()
        lines = []
        for number in range(size):
            key = f"{name}-{number}"
            record = {"annotations": [{"type": "qa", "question": "w " * int(rng.integers(1, 40)),
                                       "answer": f"<{key}>"} for _ in range(int(rng.integers(1, 4)))]}
            if number % 2:
                path = root / name / f"{number}.png"
                Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
                if key in BROKEN:
                    path.write_bytes(path.read_bytes()[:60])
                record["images"] = [path.name]
            lines.append("{" if key in BROKEN_LINES else json.dumps(record))
        (root / name / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train_small([f"<{name}-{n}> w w" for name in SIZES for n in range(12)] * 3, 400)


RULES = (packers.Knapsack(buffer=4), packers.OldestFirst(buffer=5, max_wait=3), packers.OldestFirst(buffer=1))


@strategies.composite
def runs(draw):
    """Returns a run: its data, and for each phase the numbers of hosts, batches and lost batches."""
    same = draw(strategies.booleans())
    hosts = strategies.sampled_from((1, 2, 4) if same else (1, 2, 3, 4))
    phases = draw(strategies.lists(strategies.tuples(
        hosts, strategies.integers(0, 3), strategies.integers(0, 1)), min_size=2, max_size=3))
    return {"rates": draw(strategies.lists(strategies.floats(0.1, 3), min_size=3, max_size=3)),
            "seed": draw(strategies.integers(0, 99)),
            "row_tokens": draw(strategies.sampled_from((220, 256, 400))),
            "row_crops": draw(strategies.sampled_from((4, 9))),
            "packer": draw(strategies.sampled_from(RULES)),
            "prefetch": draw(strategies.sampled_from((0, 0, 2))), "streams": 4 if same else None,
            "phases": phases}


def data_config(folders, run, **fields):
    return pipeline.DataConfig(**{
        "train": tuple((str(folders / name), rate) for name, rate in zip(SIZES, run["rates"])),
        "seed": run["seed"], "row_tokens": run["row_tokens"], "row_crops": run["row_crops"], "batch_rows": 12,
        "packer": run["packer"], "prefetch": run["prefetch"], "streams": run["streams"], "num_workers": 0,
        **fields})


def start(data, tokenizer, hosts):
    return [pipeline.make_iterator(data, MODEL, INPUTS, tokenizer, shard_index=host, shard_count=hosts)
            for host in range(hosts)]


def close(iterators):
    for one in iterators:
        one.close()


def names_in(batch, tokenizer):
    """Returns the record name of each example in a batch."""
    names = []
    for tokens, example in zip(batch.tokens, batch.example, strict=True):
        for number in range(example.max() + 1):
            text = "".join(tokenizer.token(token) for token in tokens[example == number])
            names.append(re.search(r"assistant[^<]*<(\w-\d+)", text)[1])
    return names


def accounted_for(states, order):
    """Returns how often each good record was offered so far, and how many of these are still to be read."""
    found = {int(number): position for state in states
             for number, position in json.loads(state["positions"]).items()}
    highest = max(position["next"] for position in found.values())

    def names(numbers):
        records = (f"{'abc'[dataset]}-{index}" for dataset, index, _ in map(order, numbers))
        return collections.Counter(name for name in records if name not in BROKEN | BROKEN_LINES)

    to_come = [number for position in found.values() for number in (
        *json.loads(position["waiting"]), *json.loads(position["backlog"]),
        *range(position["next"], highest, len(found)))]
    return names(range(highest)), names(to_come)


@hypothesis.settings(max_examples=7, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(run=runs())
@pytest.mark.slow(6)
def test_every_example_comes_once_however_often_a_run_is_killed_and_moved_to_other_hosts(
        folders, tokenizer, run):
    data, states, batches = data_config(folders, run), None, []
    for hosts, count, lost in run["phases"]:
        iterators = start(data, tokenizer, hosts)
        for one in iterators if states else ():
            one.set_states(states)
        batches += [rows_lib.stack([next(one) for one in iterators]) for _ in range(count)]
        states = [json.loads(json.dumps(one.get_state())) for one in iterators]
        for _ in range(lost):  # trained on, but killed before the next save
            [next(one) for one in iterators]
        order = iterators[0]._host._batches.preparer.order
        close(iterators)
    offered, to_come = accounted_for(states, order)
    consumed = collections.Counter(name for batch in batches for name in names_in(batch, tokenizer))
    assert consumed + to_come == offered
    if run["streams"]:
        [alone] = start(data, tokenizer, 1)
        for batch in batches:
            np.testing.assert_equal(next(alone), batch)
        alone.close()


# Prints its worker processes, then the hash and the position after each batch. It has no __main__ guard: if
# workers imported it, they would start workers in turn, and fail.
KILLED = """
import hashlib, json, multiprocessing, pickle, sys
from data_pipelines import pipeline
iterator = pipeline.make_iterator(*pickle.loads(sys.stdin.buffer.read()))
for number in range(100):
    batch = next(iterator)
    if not number:
        print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in batch[:-1])).hexdigest()
    print(json.dumps([digest, iterator.get_state()]), flush=True)
"""


def _children(pid):
    """Returns the child processes of `pid`, except multiprocessing's own."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
    return found


def _wait_until_ended(pid):
    while pathlib.Path(f"/proc/{pid}").exists():
        time.sleep(0.05)


def _successor(pid, killed):
    """Returns the one child of `pid` that replaced `killed`; waits until it has started."""
    while True:
        if found := [child for child in _children(pid) if child != killed]:
            [successor] = found
            return successor
        time.sleep(0.1)


@pytest.mark.slow(17)
def test_workers_and_the_whole_process_may_be_killed(folders, tokenizer, tmp_path):
    run = {"rates": (1, 2, 1), "seed": 7, "row_tokens": 256, "row_crops": 9, "prefetch": 1, "streams": None,
           "packer": RULES[1]}
    arguments = data_config(folders, run, num_workers=1, worker_prefetch=1), MODEL, INPUTS, tokenizer
    [alone] = start(data_config(folders, run), tokenizer, 1)

    def digest():
        return hashlib.sha256(b"".join(array.tobytes() for array in next(alone)[:-1])).hexdigest()

    (tmp_path / "main.py").write_text(KILLED)
    with subprocess.Popen([sys.executable, tmp_path / "main.py"], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        process.stdin.write(pickle.dumps(arguments))
        process.stdin.close()
        [worker] = json.loads(process.stdout.readline())
        for number in range(5):
            found, state = json.loads(process.stdout.readline())
            assert found == digest()
            if number == 2:
                os.kill(worker, signal.SIGKILL)
        worker = _successor(process.pid, worker)
        process.kill()
    _wait_until_ended(worker)
    [resumed] = start(data_config(folders, run), tokenizer, 1)
    resumed.set_state(state)
    for _ in range(3):
        batch = next(resumed)
        assert hashlib.sha256(b"".join(array.tobytes() for array in batch[:-1])).hexdigest() == digest()
    broken = resumed.counters()["broken"]
    assert {key for records in broken.values() for key in records} <= {
        "annotations.jsonl:4", "annotations.jsonl:2", "annotations.jsonl:3"} and broken
    close([alone, resumed])
