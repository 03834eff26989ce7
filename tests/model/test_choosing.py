"""Choices while answers are written: 10,000 random answers, and decoding against the whole forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import types
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.model import choosing
from molmo2_jax.model import molmo2
from molmo2_jax.model import pointer
from tests import test_decode
from tests.model import test_pointer

CONFIG = dataclasses.replace(test_decode.QWEN, pointer=config_lib.PointerConfig(width=16, theta=50.0),
                             connector=dataclasses.replace(test_decode.QWEN.connector, has_output=False))
TOKEN, SLOT, CELL = map(CONFIG.special_id, ("<|token_index|>", "<|vit_index|>", "<|vit_loc|>"))


def is_valid(tokens, choices, selectable, pooled) -> int:
    """Asserts that an answer obeys the rules; returns its number of points."""
    assert tokens[0] < CONFIG.text.vocab_size
    last, is_closed, points, t = (-1, -1), False, 0, 0
    while t < len(tokens):
        if tokens[t] != TOKEN:
            assert tokens[t] < CONFIG.text.vocab_size and choices[t] == -1
            t += 1
            continue
        assert not is_closed
        if choices[t] == types.NO_MORE:
            assert points or not selectable.any()
            is_closed, t = True, t + 1
            continue
        row = choices[t]
        assert selectable[row] and row >= last[0]
        if t + 1 == len(tokens):
            break
        assert tokens[t + 1] == SLOT
        here = row, types.inner(choices[t + 1])
        assert here > last and pooled[here] >= 0
        if t + 2 == len(tokens):
            break
        assert tokens[t + 2] == CELL and 0 <= types.inner(choices[t + 2]) < pointer.CELLS
        last, points, t = here, points + 1, t + 3
    return points


@pytest.mark.slow(12)
def test_10000_answers_of_random_scores_are_possible_ones():
    B, Q, N, R, W, E = 100, 100, 24, 5, 3, CONFIG.pointer.width
    rng = np.random.default_rng(0)
    pooled = rng.integers(0, 40, (B, R, W)).astype(np.int32)
    filled = rng.integers(1, W + 1, (B, R))
    pooled[np.arange(W) >= filled[..., None]] = -1
    selectable = rng.random((B, R)) < 0.7
    selectable[0] = False
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    places = jnp.asarray(np.cumsum(selectable, 1) - 1)
    prompt = choosing.Prompt(normal(B, R, E), jnp.asarray(selectable), places, normal(B, R, 4),
                             normal(B, 40, E), jnp.asarray(pooled))
    bias = np.zeros(CONFIG.num_logits, np.float32)
    bias[TOKEN], bias[[SLOT, CELL]] = 4, 2

    def write(carry, key):
        progress, count = carry
        keys = jax.random.split(key, 5)
        draw = lambda key, *shape: jax.random.normal(key, (B, Q, *shape))
        logits = draw(keys[0], CONFIG.num_logits) * 2 + bias
        logits = jnp.where(jnp.where(count == 0, choosing.allowed(progress, True, CONFIG),
                                     choosing.allowed(progress, False, CONFIG)), logits, -jnp.inf)
        tokens = jnp.argmax(logits, axis=-1)
        heads = pointer.Heads(draw(keys[1], E), None, draw(keys[2], E), draw(keys[3], pointer.CELLS))
        # The pull of "no more points" is weak, so that groups become long.
        progress = choosing.choose(prompt, progress, heads, tokens, jnp.zeros(E), lambda f: f, CONFIG, count)
        return (progress, count + 1), tokens

    start = choosing.start(B, Q, N)
    keys = jax.random.split(jax.random.key(0), N)
    (progress, _), tokens = jax.jit(lambda: jax.lax.scan(write, (start, 0), keys))()
    tokens, choices = np.moveaxis(np.asarray(tokens), 0, -1), np.asarray(progress.choice)
    points = [is_valid(tokens[b, q], choices[b, q], selectable[b], pooled[b])
              for b in range(B) for q in range(Q)]
    assert len(points) == 10_000 and max(points) >= 5 and points.count(0) < 3_000
    ended = (choices == types.NO_MORE).any(-1)
    assert ended.mean() > 0.5 and not ended.all()


def answered(num_new=24):
    """Returns prompt trees, parameters of a model that points often, and its greedy answers."""
    trees = [test_decode.prompt_tree(CONFIG, seed, frames, (3, 5)) for seed, frames in ((1, 2), (2, 3))]
    shape = types.RowShape(T=64, M=4, R=20, W=9)
    batch = rows_lib.stack([rows_lib.join([one], shape, CONFIG.vision.patch_shape, has_choices=True)
                            for one in trees])
    asked = test_decode.questions(trees, 2, num_new)
    params = test_pointer.params_of(CONFIG)
    params["new_head"][:, TOKEN - CONFIG.text.vocab_size] *= 5   # often the highest logit
    params["pointer"]["no_more"] *= 0.1
    answers = decode.generate(molmo2.Molmo2(CONFIG), params, batch, asked, eos=test_decode.NO_EOS,
                              num_new=num_new)
    return trees, params, jax.device_get(answers)


def with_choices(tree, answers, choices):
    """Returns the tree with each question followed by its answer."""
    whole = test_decode.with_answers(tree, answers)
    choice = np.full(len(whole.tokens), -1, np.int32)
    for number, values in enumerate(choices):
        places = np.flatnonzero(whole.branch == number)[-len(values):]
        choice[places] = values
    return dataclasses.replace(whole, choice=choice)


@pytest.mark.slow(20)
def test_choices_with_a_cache_are_those_of_the_whole_forward_pass():
    trees, params, answers = answered()
    apply = functools.partial(molmo2.Molmo2(CONFIG, remat="none").apply, {"params": params})
    seen = 0
    for b, tree in enumerate(trees):
        whole = with_choices(tree, answers.tokens[b], answers.choice[b])
        batch = rows_lib.join([whole], types.RowShape(T=len(whole.tokens), M=4, R=20, W=9),
                              CONFIG.vision.patch_shape, has_choices=True)
        last = CONFIG.text.num_layers - 1
        _, inside = apply(batch, taps=(last,), method="hidden")
        scored = apply(inside, method="choices")
        visual = pointer.visual_of(batch, CONFIG)
        key = pointer.rotate(pointer.take(scored.heads.patch_k, visual.position), visual.place, 50.0)[0]
        selectable, pooled = np.asarray(visual.selectable[0]), batch.pooled[0]
        sub_key = np.asarray(scored.sub_key[0]).reshape(-1, 16)
        for q in range(2):
            tokens, choices = answers.tokens[b, q], answers.choice[b, q]
            seen += is_valid(tokens, choices, selectable, pooled)
            at, previous = np.flatnonzero(whole.branch == q)[-len(tokens):], (-1, -1)
            for t, (token, choice) in enumerate(zip(tokens, choices)):
                before = at[t] - 1
                if token == TOKEN:
                    place = visual.place[0, previous[0]] if previous[0] >= 0 else 0
                    query = pointer.rotate(scored.heads.patch_q[:, before:before + 1],
                                           jnp.full((1, 1), place), 50.0)[0, 0]
                    has_more = previous[0] >= 0 and (pooled[previous[0], previous[1] + 1:] >= 0).any()
                    scores = {r: float(query @ key[r]) for r in range(len(pooled))
                              if selectable[r] and (r > previous[0] or r == previous[0] and has_more)}
                    if previous[0] >= 0 or not scores:
                        scores[types.NO_MORE] = float(query @ scored.no_more)
                    assert choice == max(scores, key=scores.get)
                    row = choice
                elif token == SLOT:
                    free = [j for j in range(9) if pooled[row, j] >= 0 and (row, j) > previous]
                    query = scored.heads.sub_q[0, before]
                    slot = max(free, key=lambda j: float(query @ sub_key[pooled[row, j]]))
                    assert types.inner(choice) == slot
                elif token == CELL:
                    assert types.inner(choice) == int(jnp.argmax(scored.heads.location[0, before]))
                    previous = row, slot
    assert seen >= 5
