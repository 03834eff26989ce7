"""Packing: the recorded streams, and the properties of every rule."""

import itertools
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from molmo2_jax import types
from molmo2_jax.inputs import packers

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "goldens/packer/cases.json").read_text())
RULES = (packers.Knapsack(buffer=8), packers.OldestFirst(buffer=8, max_wait=5),
         packers.OldestFirst(buffer=8, max_wait=0), packers.OldestFirst(buffer=12, steps=7))
by_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def of_size(tokens, crops, pooled=0):
    """A sequence of a given size whose contents do not matter."""
    zeros = np.zeros(tokens, np.int32)
    return types.Sequence(
        tokens=zeros, targets=zeros, weights=np.zeros(tokens, np.float32), positions=zeros, branch=zeros,
        image=zeros, patches=np.zeros((crops, 0, 0), np.uint8), pooled=np.zeros((pooled, 1), np.int32))


@pytest.mark.parametrize("case", GOLDENS["knapsack"], ids=lambda case: f"{len(case['t'])} items")
def test_the_knapsack_takes_the_recorded_items(case):
    chosen = packers.knapsack(case["t"], case["i"], case["value"], case["max_t"], case["max_i"])
    assert chosen == case["selected"]


def test_the_knapsack_is_optimal_and_prefers_earlier_items():
    rng = np.random.default_rng(0)
    for _ in range(30):
        tokens, crops, values = rng.integers(0, 9, 7), rng.integers(0, 5, 7), rng.integers(1, 6, 7)
        fitting = [chosen for size in range(8) for chosen in itertools.combinations(range(7), size)
                   if tokens[list(chosen)].sum() <= 16 and crops[list(chosen)].sum() <= 7]
        best = max(values[list(chosen)].sum() for chosen in fitting)
        found = packers.knapsack(tokens, crops, values, 16, 7)
        assert tuple(reversed(found)) in fitting and values[found].sum() == best


@pytest.mark.parametrize("case", GOLDENS["streams"], ids=lambda case: f"buffer {case['buffer_size']}")
def test_the_packer_emits_the_recorded_packs(case):
    rule = packers.Knapsack(
        buffer=case["buffer_size"], text_weight=case["text_weight"], image_weight=case["image_weight"],
        emit_full_crops_alone=case["shortcut_max_len_images"])
    packer = packers.Packer(rule, case["max_tokens"], case["max_images"])
    for number, ((tokens, crops), expected) in enumerate(
            zip(case["examples"], case["outputs"], strict=True)):
        pack = packer.push(of_size(tokens, crops), number)
        assert (pack and [tag for _, tag in pack]) == expected
    assert packer.pending == case["buffer_at_end"]


def emitted(packer, stream, numbers):
    packs = [packer.push(stream[number], number) for number in numbers]
    return [[tag for _, tag in pack] for pack in packs if pack]


@by_rule
def test_a_packer_resumed_from_its_state_emits_the_same(rule):
    rng = np.random.default_rng(1)
    stream = [of_size(int(rng.integers(1, 60)), int(rng.integers(0, 9))) for _ in range(200)]
    whole = packers.Packer(rule, 100, 12)
    emitted(whole, stream, range(90))
    resumed = packers.Packer(rule, 100, 12)
    resumed.resume([(stream[number], number) for number in whole.pending],
                   json.loads(json.dumps(whole.state())))
    assert resumed.pending == whole.pending and resumed.state() == whole.state()
    assert emitted(resumed, stream, range(90, 200)) == emitted(whole, stream, range(90, 200))
    assert resumed.state() == whole.state()


SIZES = strategies.lists(strategies.tuples(strategies.integers(1, 110), strategies.integers(0, 12),
                                           strategies.integers(0, 40)), min_size=1, max_size=60)
BUDGETS = strategies.sampled_from([(110, 12, 40), (117, 12, 55), (1539, 12, 40)])


@by_rule
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(sizes=SIZES, budgets=BUDGETS)
def test_every_sequence_is_emitted_once_and_rows_keep_all_three_budgets(rule, sizes, budgets):
    packer = packers.Packer(rule, *budgets)
    packs = []
    for number, size in enumerate(sizes):
        pack = packer.push(of_size(*size), number)
        packs += [pack] if pack else []
        waiting = np.sum([sizes[tag] for tag in packer.pending[:-1]] or [(0, 0, 0)], axis=0)
        assert len(packer.pending) <= rule.buffer or (waiting <= budgets).all()
    packs += packer.flush()
    assert sorted(tag for pack in packs for _, tag in pack) == list(range(len(sizes)))
    assert packer.pending == [] and packer.flush() == []
    for pack in packs:
        used = np.sum([(len(one.tokens), len(one.patches), len(one.pooled)) for one, _ in pack], axis=0)
        assert pack and (used <= budgets).all()


def test_rows_stay_within_tokens_that_the_steps_do_not_divide():
    packer = packers.Packer(packers.Knapsack(buffer=4), 1537, 0)  # 3 tokens a step: 513 steps are 1539
    for tokens in (513, 513, 513, 1):
        packer.push(of_size(tokens, 0))
    assert [len(pack) for pack in packer.flush()] == [2, 2]


@pytest.mark.parametrize("max_crops", [0, 4])
def test_rows_of_text_alone_are_filled(max_crops):
    rng = np.random.default_rng(0)
    packer = packers.Packer(packers.OldestFirst(buffer=16), 1000, max_crops)
    stream = [of_size(int(tokens), 0) for tokens in rng.integers(20, 400, 300)]
    packs = emitted(packer, stream, range(300))
    fill = [sum(len(stream[number].tokens) for number in pack) for pack in packs]
    assert len(packs) > 40 and np.mean(fill) > 970


def test_short_texts_wait_until_they_fill_a_row():
    packer, rng = packers.Packer(packers.OldestFirst(buffer=8), 1000, 4), np.random.default_rng(0)
    stream = [of_size(int(tokens), 0) for tokens in rng.integers(5, 40, 900)]
    packs = emitted(packer, stream, range(900))
    fill = [sum(len(stream[number].tokens) for number in pack) for pack in packs]
    assert len(packs) > 15 and min(fill) > 960 and len(packer.pending) > 8


def test_no_sequence_waits_longer_than_the_bound():
    """Videos that fill the crop budget wait for text that never arrives; wide ones would wait forever."""
    rule = packers.OldestFirst(buffer=10, max_wait=6)
    packer, rows, born, longest = packers.Packer(rule, 256, 16), 0, {}, 0
    for number in range(400):
        size = of_size(200, 16) if number % 3 == 0 else of_size(60, 4)
        born[number] = rows
        pack = packer.push(size, number)
        if pack:
            longest = max([longest, *(rows - born[tag] for _, tag in pack)])
            rows += 1
    assert longest == packer.state()["longest_wait"] and 6 <= longest <= 16
    assert max(packer.state()["waits"]) <= 16


def test_the_fullest_row_of_few_texts_is_found():
    rng = np.random.default_rng(3)
    rule = packers.OldestFirst(buffer=7, waste=1e-9, slack=0.0, steps=50)
    for _ in range(60):
        tokens = rng.integers(1, 30, 7).tolist()
        chosen = rule.choose(tokens, [0] * 7, [0] * 7, 50, 3)
        best = max(sum(some) for size in range(8) for some in itertools.combinations(tokens, size)
                   if sum(some) <= 50)
        assert sum(tokens[item] for item in chosen) == best and len(set(chosen)) == len(chosen)


def test_a_sequence_that_fits_no_row_is_refused():
    packer = packers.Packer(packers.OldestFirst(), 100, 12, 40)
    with pytest.raises(ValueError, match="12 crops and 40 pooled rows; got 13 and 0 \\('clip'\\)"):
        packer.push(of_size(10, 13), "clip")
    with pytest.raises(ValueError, match="got 1 and 41"):
        packer.push(of_size(50, 1, 41))


@pytest.mark.parametrize("make, rule", [
    (lambda: packers.Knapsack(buffer=0), "buffer must be"), (lambda: packers.OldestFirst(buffer=0), "buffer"),
    (lambda: packers.OldestFirst(max_wait=-1), "max_wait"), (lambda: packers.OldestFirst(waste=0.0), "waste"),
    (lambda: packers.OldestFirst(steps=0), "steps"),
    (lambda: packers.Packer(packers.Knapsack(), 0, 4), "max_tokens must be")])
def test_rules_that_make_no_sense_are_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()
