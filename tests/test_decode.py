"""Decoding with a cache: the same answers as full forward passes, with shared roots and in batches."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import types
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.model import molmo2

LOGITS_TOLERANCE = 1e-5   # float32; measured 3e-6 on logits of size 6
LOGPROB_TOLERANCE = 1e-4  # sums of 10 log-probabilities, size 18; measured 2e-5
EOS = 7
NO_EOS = -1  # greedy answers then run to their limit


def tiny(**text) -> config_lib.Molmo2Config:
    nano = config_lib.nano()
    return dataclasses.replace(
        nano, vision=dataclasses.replace(nano.vision, image_size=36, patch_size=6, num_layers=2, width=32,
                                         mlp_width=64),
        connector=dataclasses.replace(nano.connector, taps=(1, 0), num_heads=2, mlp_width=64),
        text=dataclasses.replace(nano.text, vocab_size=64, width=32, num_layers=3, head_dim=8,
                                 mlp_width=64, **text))


QWEN = tiny()
OLMO = tiny(qk_norm="olmo", norm_after=True, num_kv_heads=4,
            yarn=config_lib.YarnConfig(original_length=16, layers=(1,)))
CAUSAL = dataclasses.replace(QWEN, visual_attention="causal")
WITHIN = dataclasses.replace(QWEN, visual_attention="within_image")


def prompt_tree(config, seed: int, num_frames: int, questions: tuple[int, ...]) -> types.Sequence:
    """Returns frames of 4 visual tokens with text between them, then questions of the given lengths."""
    rng = np.random.default_rng(seed)
    root, image = [EOS], [-1]
    for frame in range(num_frames):
        root += [*rng.integers(8, 64, 2), *[config.special_id("<im_patch>")] * 4]
        image += [-1, -1, *[frame] * 4]
    tokens, branch = [root], [np.full(len(root), -1)]
    positions = [np.arange(len(root))]
    for number, length in enumerate(questions):
        tokens.append(rng.integers(8, 64, length))
        branch.append(np.full(length, number))
        positions.append(len(root) + np.arange(length))
    tokens = np.concatenate(tokens).astype(np.int32)
    padded = np.full(len(tokens), -1, np.int32)
    padded[:len(image)] = image
    P, C = config.vision.num_patches, config.vision.patch_values
    return types.Sequence(
        tokens=tokens, targets=np.zeros_like(tokens), weights=np.zeros(len(tokens), np.float32),
        positions=np.concatenate(positions).astype(np.int32),
        branch=np.concatenate(branch).astype(np.int32), image=padded,
        patches=rng.integers(0, 256, (num_frames, P, C)).astype(np.uint8),
        pooled=rng.permutation(num_frames * P)[:num_frames * 36].reshape(-1, 9).astype(np.int32))


def row(config, sequence: types.Sequence, T=64) -> types.Batch:
    return rows_lib.join([sequence], types.RowShape(T=T, M=4, R=20, W=9), config.vision.patch_shape)


def ends_of(sequence: types.Sequence, num_questions: int) -> list[int]:
    """Returns the last position of each question, -1 for absent questions."""
    found = [int(np.flatnonzero(sequence.branch == q)[-1]) for q in range(sequence.branch.max() + 1)]
    return found + [-1] * (num_questions - len(found))


def questions(sequences, num_questions, limit=10, first=0) -> decode.Questions:
    last = np.array([ends_of(one, num_questions) for one in sequences], np.int32)
    draw = first + np.arange(last.size, dtype=np.int32).reshape(last.shape)
    return decode.Questions(last, np.broadcast_to(limit, last.shape).astype(np.int32), draw)


@functools.lru_cache
def params_of(config):
    """Returns random parameters, drawn by numpy because compiling the initialisation takes seconds."""
    one = row(config, prompt_tree(config, 0, 1, (3,)))
    shapes = nn.meta.unbox(jax.eval_shape(molmo2.Molmo2(config).init, jax.random.key(0), one))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        is_scale = path[-1].key == "scale"
        return (1 + 0.1 * rng.normal(size=leaf.shape) if is_scale else
                0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def answers_of(sequences, num_new=10, eos=NO_EOS, limit=10, first=0, **options):
    """Returns the greedy answers to trees of up to 3 questions; up to 3 trees share one program."""
    padded = list(sequences) + [sequences[0]] * (3 - len(sequences))
    wanted = questions(padded, 3, limit, first)
    wanted.last[len(sequences):] = -1
    batch = rows_lib.stack([row(QWEN, one) for one in padded])
    return decode.generate(molmo2.Molmo2(QWEN), params_of(QWEN), batch, wanted, eos=eos, num_new=num_new,
                           **options)


def with_answers(sequence: types.Sequence, answers) -> types.Sequence:
    """Returns the tree with each question followed by its answer."""
    keep = ["tokens", "positions", "branch", "image"]
    parts = {name: [getattr(sequence, name)[sequence.branch < 0]] for name in keep}
    for number, answer in enumerate(answers):
        for name in keep:
            parts[name].append(getattr(sequence, name)[sequence.branch == number])
        first = parts["positions"][-1][-1] + 1
        parts["tokens"].append(answer)
        parts["positions"].append(first + np.arange(len(answer)))
        parts["branch"].append(np.full(len(answer), number))
        parts["image"].append(np.full(len(answer), -1))
    joined = {name: np.concatenate(values).astype(np.int32) for name, values in parts.items()}
    length = len(joined["tokens"])
    return dataclasses.replace(sequence, **joined, targets=np.zeros(length, np.int32),
                               weights=np.zeros(length, np.float32))


@pytest.mark.parametrize("config", [QWEN, OLMO, CAUSAL, WITHIN], ids=["qwen", "olmo", "causal", "within"])
@pytest.mark.slow(6)
def test_prefill_and_decode_equal_one_forward_pass_token_by_token(config):
    tree = prompt_tree(config, 1, 3, (5, 2))
    rng = np.random.default_rng(2)
    forced = rng.integers(8, 64, (2, 6)).astype(np.int32)  # Q questions, 6 tokens each
    model, params = molmo2.Molmo2(config), params_of(config)
    whole = with_answers(tree, forced)
    expected = jax.jit(model.apply)({"params": params}, row(config, whole))[0]
    starts = np.array(ends_of(tree, 2)) + [0, len(forced[0])]

    batch, last = row(config, tree), np.array([ends_of(tree, 2)])
    logits, cache = jax.jit(decode.prefill, static_argnums=0)(model, params, batch, last)
    np.testing.assert_allclose(logits[0], expected[starts], atol=LOGITS_TOLERANCE)
    memory = decode.remember(cache, 2, 6)
    step = jax.jit(decode.step, static_argnums=0)
    positions = batch.positions[0, last]
    seen = decode.seen_of_prompt(batch.end, last)
    for count in range(1, 7):
        where = decode.text.Step(seen, jnp.int32(count - 1))
        logits, memory = step(model, params, forced[None, :, count - 1], positions + count, where, memory)
        np.testing.assert_allclose(logits[0], expected[starts + count], atol=LOGITS_TOLERANCE)


@pytest.mark.slow(9)
def test_the_decode_loop_takes_the_most_likely_token_of_the_forward_pass_at_every_step():
    tree = prompt_tree(QWEN, 3, 2, (4, 6, 1))
    answers = answers_of([tree])
    whole = with_answers(tree, answers.tokens[0])
    logits = molmo2.Molmo2(QWEN).apply({"params": params_of(QWEN)}, row(QWEN, whole))[0]
    logprob = np.asarray(jax.nn.log_softmax(logits))
    starts = np.array(ends_of(tree, 3)) + 10 * np.arange(3)
    for question, start in enumerate(starts):
        at = start + np.arange(10)
        np.testing.assert_array_equal(logprob[at].argmax(-1), answers.tokens[0, question])
        total = logprob[at, answers.tokens[0, question]].sum()
        np.testing.assert_allclose(answers.logprob[0, question], total, atol=LOGPROB_TOLERANCE)


def alone(sequence: types.Sequence, question: int) -> types.Sequence:
    """Returns the tree with one of its questions only."""
    keep = (sequence.branch < 0) | (sequence.branch == question)
    fields = {name: getattr(sequence, name)[keep]
              for name in ("tokens", "targets", "weights", "positions", "branch", "image")}
    fields["branch"] = np.where(fields["branch"] < 0, -1, 0).astype(np.int32)
    return dataclasses.replace(sequence, **fields)


def test_questions_that_share_a_root_have_the_same_answers_as_alone():
    tree = prompt_tree(QWEN, 4, 3, (5, 2, 9))
    together = answers_of([tree])
    for question in range(3):
        single = answers_of([alone(tree, question)])
        np.testing.assert_array_equal(together.tokens[0, question], single.tokens[0, 0])
        np.testing.assert_allclose(together.logprob[0, question], single.logprob[0, 0],
                                   atol=LOGPROB_TOLERANCE)


def test_rows_of_different_lengths_have_the_same_answers_as_alone():
    trees = [prompt_tree(QWEN, 5, 4, (8, 7)), prompt_tree(QWEN, 6, 0, (1,)), prompt_tree(QWEN, 7, 1, (3, 1))]
    batch = answers_of(trees)
    for number, tree in enumerate(trees):
        np.testing.assert_array_equal(batch.tokens[number], answers_of([tree]).tokens[0])
    short = decode.generate(molmo2.Molmo2(QWEN), params_of(QWEN), row(QWEN, trees[2], T=16),
                            questions(trees[2:], 2), eos=NO_EOS, num_new=10)
    np.testing.assert_array_equal(batch.tokens[2, :2], short.tokens[0])
    assert len({tuple(row) for row in np.asarray(batch.tokens).reshape(-1, 10)}) > 1


def test_an_answer_stops_at_eos_and_is_padded_with_it():
    tree = prompt_tree(QWEN, 8, 2, (4, 6))
    free = np.asarray(answers_of([tree]).tokens[0])
    eos = int(free[0, 3])
    answers = answers_of([tree], eos=eos)
    for question in range(2):
        hits = np.flatnonzero(free[question] == eos)
        length = int(hits[0]) + 1 if len(hits) else 10
        assert answers.length[0, question] == length
        assert bool(answers.ended[0, question]) == bool(len(hits))
        np.testing.assert_array_equal(answers.tokens[0, question, :length], free[question, :length])
        assert (answers.tokens[0, question, length:] == eos).all()


def test_a_stop_table_ends_an_answer_with_the_token_that_reaches_minus_one():
    tree = prompt_tree(QWEN, 8, 2, (4, 6))
    free = np.asarray(answers_of([tree]).tokens[0])
    first, second = (int(token) for token in free[0, 2:4])
    stops = np.zeros((16, QWEN.text.vocab_size), np.int32)
    stops[0, first] = stops[1, first] = 1
    stops[1, second] = -1  # `first` and then `second`
    answers = answers_of([tree], stops=stops)
    for question in range(2):
        pairs = zip(free[question], free[question, 1:])
        length = next((at + 2 for at, pair in enumerate(pairs) if pair == (first, second)), 10)
        assert answers.length[0, question] == length and answers.ended[0, question] == (length < 10)
        np.testing.assert_array_equal(answers.tokens[0, question, :length], free[question, :length])
    assert answers.ended[0, 0]


def test_a_stream_grows_to_the_complete_answers():
    trees = [prompt_tree(QWEN, 9, 1, (2, 3)), prompt_tree(QWEN, 10, 1, (4,))]
    expected = answers_of(trees)
    last = np.full((3, 3), -1, np.int32)
    last[:2] = questions(trees, 3).last
    wanted = questions([*trees, trees[0]], 3)._replace(last=last)
    batch = rows_lib.stack([row(QWEN, one) for one in [*trees, trees[0]]])
    parts = list(decode.stream(molmo2.Molmo2(QWEN), params_of(QWEN), batch, wanted, eos=NO_EOS, num_new=10,
                               every=4))
    assert [int(part.length.max()) for part in parts] == [1, 5, 9, 10]
    for part in parts:
        count = int(part.length.max())
        np.testing.assert_array_equal(part.tokens[..., :count], expected.tokens[..., :count])
    jax.tree.map(np.testing.assert_array_equal, parts[-1], jax.device_get(expected))


@pytest.mark.slow(6)
@pytest.mark.parametrize("config", [QWEN, OLMO], ids=["qwen", "olmo"])
def test_a_list_of_layers_gives_the_same_answers_as_stacked_ones(config):
    tree, model = prompt_tree(config, 14, 2, (3, 5)), molmo2.Molmo2(config)
    answers = [decode.generate(model, decode.ready(params_of(config), "float32", unroll), row(config, tree),
                               questions([tree], 2), eos=NO_EOS, num_new=10) for unroll in (False, True)]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
    np.testing.assert_allclose(answers[0].logprob, answers[1].logprob, atol=LOGPROB_TOLERANCE)


def test_each_question_has_its_own_limit_and_absent_ones_have_no_answer():
    trees = [prompt_tree(QWEN, 9, 1, (2, 3)), prompt_tree(QWEN, 10, 1, (4,))]
    free = answers_of(trees)
    answers = answers_of(trees, limit=np.array([[3, 1, 9], [99, 5, 5], [0, 0, 0]]))
    np.testing.assert_array_equal(answers.length[:2], [[3, 1, 0], [10, 0, 0]])
    assert not answers.ended.any()
    for b, q in [(0, 0), (0, 1), (1, 0)]:
        n = int(answers.length[b, q])
        np.testing.assert_array_equal(answers.tokens[b, q, :n], free.tokens[b, q, :n])
    assert (answers.tokens[1, 1] == NO_EOS).all() and answers.logprob[1, 1] == 0


def test_the_loop_ends_with_the_last_answer(monkeypatch):
    steps = []
    step = decode.step

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return step(*args)

    monkeypatch.setattr(decode, "step", counted)
    tree = prompt_tree(QWEN, 11, 1, (2,))
    answers = answers_of([tree], num_new=37, limit=5)
    jax.effects_barrier()
    assert answers.length[0, 0] == 5 and len(steps) == 4  # prefill gives the first token


def test_sampling_depends_on_the_seed_and_the_question_but_not_on_its_neighbours():
    tree = prompt_tree(QWEN, 12, 1, (3, 4))
    sampling = decode.Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=3)
    both = answers_of([tree], sampling=sampling)
    again = answers_of([tree], sampling=sampling)
    np.testing.assert_array_equal(both.tokens, again.tokens)
    second = answers_of([alone(tree, 1)], sampling=sampling, first=1)
    np.testing.assert_array_equal(both.tokens[0, 1], second.tokens[0, 0])
    other = answers_of([tree], sampling=dataclasses.replace(sampling, seed=4))
    assert (both.tokens != other.tokens).any()


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    shares = np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]], np.float32)
    logits = jnp.log(shares)

    def kept(**options):
        return np.isfinite(decode.keep_likely(logits, **options)).astype(int).tolist()

    assert kept(top_k=0, top_p=1.0) == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert kept(top_k=2, top_p=1.0)[0] == [0, 1, 0, 1]
    assert kept(top_k=0, top_p=0.5)[0] == [0, 1, 0, 1]
    assert kept(top_k=0, top_p=0.75)[0] == [0, 1, 1, 1]
    assert kept(top_k=0, top_p=1e-6)[0] == [0, 1, 0, 0]
    assert kept(top_k=3, top_p=0.5)[0] == [0, 1, 0, 1]  # the nucleus of what top_k left: 0.4/0.9, 0.3/0.9


def test_a_nearly_cold_draw_is_the_greedy_choice():
    logits = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 5)
    for sampling in (decode.Sampling(temperature=1e-3), decode.Sampling(temperature=1.0, top_k=1)):
        np.testing.assert_array_equal(decode.choose(logits, sampling, keys), logits.argmax(-1))


def test_samples_follow_the_probabilities():
    shares = np.array([0.5, 0.3, 0.2], np.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = decode.choose(jnp.tile(jnp.log(shares), (4000, 1)), decode.Sampling(temperature=1.0), keys)
    found = np.bincount(np.asarray(drawn), minlength=3) / 4000
    np.testing.assert_allclose(found, shares, atol=0.03)  # four standard deviations


def test_shapes_compile_once():
    trees = [prompt_tree(QWEN, seed, 1, (2, 3)) for seed in (20, 21)]
    answers_of(trees)
    before = (decode.begin._cache_size(), decode.advance._cache_size())
    answers_of([prompt_tree(QWEN, seed, 3, (9,)) for seed in (22, 23)], limit=4, eos=3)
    assert (decode.begin._cache_size(), decode.advance._cache_size()) == before


def test_a_bfloat16_cache_gives_nearly_the_same_probabilities():
    tree = prompt_tree(QWEN, 13, 2, (4,))
    exact = answers_of([tree], limit=2)
    rounded = answers_of([tree], limit=2, cache_dtype="bfloat16")
    assert abs(exact.logprob - rounded.logprob).max() < 0.05  # measured 0.004


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        decode.Sampling(**values)
