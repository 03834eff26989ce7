"""Answers token by token: prefill a message tree once, then extend all of its branches together.

A row is the prompt tree of one visual input: the root (BOS and all visual tokens) and one branch per
question. The root is read once, whatever the number of questions, and its keys and values are kept once.
Each question has its own slots for the tokens of its answer; a new token sees what the last token of its
question sees, and its own answer:

    prompt   root aaa bbb .        answers   a a a . .       two questions a, b; . is not seen
                                             b b b . .

B rows, T prompt tokens, Q questions per row, N slots for the tokens of an answer, V base vocabulary.

Source: reference, olmo/models/molmo2/molmo2.py (generate), which handles one question at a time with a
growing cache.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from molmo2_jax import types
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import molmo2
from molmo2_jax.model import text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits.

    temperature 0 takes the most likely one. Otherwise: logits / temperature, then the `top_k` most likely
    (0: all), then the fewest that together reach probability `top_p`, then a draw.
    """
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0; got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens); got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")


GREEDY = Sampling()


class Questions(NamedTuple):
    """Which answers are wanted of the prompt trees of a Batch."""
    last: Any    # int32[B, Q], position in the row of a question's last token; -1 where there is none
    limit: Any   # int32[B, Q], most new tokens of its answer, EOS included
    draw: Any    # int32[B, Q], number of the question: with the seed, decides what is sampled


class Answers(NamedTuple):
    """`tokens` are padded with EOS behind `length`."""
    tokens: jax.Array    # int32[B, Q, N], EOS included where the answer ended by itself
    length: jax.Array    # int32[B, Q]
    ended: jax.Array     # bool[B, Q], whether EOS was reached within the limit
    logprob: jax.Array   # float32[B, Q], sum of the log-probabilities of the tokens


def choose(logits_nV, sampling: Sampling, keys_n):
    """Returns int32[n]: the next token of each row; `keys_n` are not read when temperature is 0."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_nV, axis=-1).astype(jnp.int32)
    logits_nV = keep_likely(logits_nV / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys_n, logits_nV).astype(jnp.int32)


def keep_likely(logits_nV, top_k: int, top_p: float):
    """Returns the logits with -inf at all but the `top_k` most likely and, of these, the top_p nucleus.

    Ties with the last one kept stay in. The most likely token always stays.
    """
    num_tokens = logits_nV.shape[-1]
    if 0 < top_k < num_tokens:
        least = jax.lax.top_k(logits_nV, top_k)[0][:, -1:]
        logits_nV = jnp.where(logits_nV < least, -jnp.inf, logits_nV)
    if top_p < 1:
        falling = -jnp.sort(-logits_nV, axis=-1)
        share = jax.nn.softmax(falling, axis=-1)
        is_kept = jnp.cumsum(share, axis=-1) - share < top_p
        least = jnp.min(jnp.where(is_kept, falling, jnp.inf), axis=-1, keepdims=True)
        logits_nV = jnp.where(logits_nV < least, -jnp.inf, logits_nV)
    return logits_nV


def at_last(x_BT, last_BQ):
    """Returns x[b, last[b, q]], shape [B, Q, ...]."""
    return jax.vmap(lambda x, index: x[index])(x_BT, jnp.maximum(last_BQ, 0))


def prefill(model: molmo2.Molmo2, params, batch: types.Batch, last_BQ):
    """Returns (float32[B, Q, V] logits behind each question, text.Cache of the prompt)."""
    mask = tree_mask.from_batch(batch, model.config.visual_attention)
    x_BTD = model.apply({"params": params}, batch.tokens, batch.patches, batch.pooled, method="embed")
    hidden_BTD, cache = model.apply({"params": params}, x_BTD, batch.positions, mask, method="decode")
    logits_BQV = model.apply({"params": params}, at_last(hidden_BTD, last_BQ), method="logits")
    return logits_BQV, cache


def step(model: molmo2.Molmo2, params, tokens_BQ, positions_BQ, where: text.Step, memory: text.Memory):
    """Returns (float32[B, Q, V] logits behind one new token per question, the memory with it)."""
    x_BQD = model.apply({"params": params}, tokens_BQ, method="embed_tokens")
    hidden_BQD, memory = model.apply({"params": params}, x_BQD, positions_BQ, where, memory, method="decode")
    return model.apply({"params": params}, hidden_BQD, method="logits"), memory


def remember(prompt: text.Cache, num_questions: int, num_new: int, dtype: str | None = None) -> text.Memory:
    """Returns the memory of prompts that were read, with room for answers of `num_new` tokens."""
    prompt = jax.tree.map(lambda x: x.astype(dtype or x.dtype), prompt)
    L, B, _, K, H = prompt.k.shape
    room = jnp.zeros((L, B, num_questions, num_new, K, H), prompt.k.dtype)
    return text.Memory(prompt, text.Cache(room, room))


def seen_of_prompt(end_BT, last_BQ):
    """Returns bool[B, Q, T]: the prompt tokens that each question's last token sees, itself included."""
    position = jnp.arange(end_BT.shape[1])
    last = last_BQ[..., None]
    return (position <= last) & (last < end_BT[:, None])


class _State(NamedTuple):
    count: jax.Array     # int32[], new tokens per question so far
    answers: Answers
    is_over: jax.Array   # bool[B, Q]
    memory: text.Memory


def _append(answers: Answers, is_over_BQ, count, logits_BQV, chosen_BQ, questions: Questions, eos):
    """Returns (the answers with the tokens chosen, bool[B, Q] which of them are now complete)."""
    logprob = jax.nn.log_softmax(logits_BQV, axis=-1)
    logprob = jnp.take_along_axis(logprob, chosen_BQ[..., None], axis=-1)[..., 0]
    tokens = jnp.where(is_over_BQ, eos, chosen_BQ)
    ended = answers.ended | (~is_over_BQ & (tokens == eos))
    answers = Answers(tokens=jax.lax.dynamic_update_index_in_dim(answers.tokens, tokens, count, 2),
                      length=answers.length + ~is_over_BQ, ended=ended,
                      logprob=answers.logprob + jnp.where(is_over_BQ, 0.0, logprob))
    return answers, is_over_BQ | ended | (count + 1 >= questions.limit)


def generate(model: molmo2.Molmo2, params, batch: types.Batch, questions: Questions, *, eos: int,
             num_new: int, sampling: Sampling = GREEDY, cache_dtype: str | None = None) -> Answers:
    """Returns the answers to all questions of a batch of prompt trees.

    Compiled once per model, shapes, `num_new` (N, the room for new tokens) and way of sampling, whatever
    the seed. The loop ends when every answer has ended or reached its limit; limits beyond N count as N.

    Args:
      cache_dtype: of the kept keys and values; None keeps that of the computation.
    """
    seedless = dataclasses.replace(sampling, seed=0)
    return compiled(model, params, batch, questions, sampling.seed, eos, num_new=num_new,
                    sampling=seedless, cache_dtype=cache_dtype)


@functools.partial(jax.jit, static_argnames=("model", "num_new", "sampling", "cache_dtype"))
def compiled(model, params, batch, questions, seed, eos, *, num_new, sampling, cache_dtype) -> Answers:
    """The whole of `generate` as one program: prefill, then one while_loop."""
    num_rows, num_questions = questions.last.shape
    key = jax.random.key(seed)
    keys_BQ = jax.vmap(jax.vmap(lambda draw: jax.random.fold_in(key, draw)))(questions.draw)
    position_BQ = at_last(batch.positions, questions.last)
    seen_BQT = seen_of_prompt(batch.end, questions.last)

    def pick(logits_BQV, count):
        keys = jax.vmap(lambda k: jax.random.fold_in(k, count))(keys_BQ.reshape(-1))
        flat = logits_BQV.reshape(-1, logits_BQV.shape[-1])
        return choose(flat, sampling, keys).reshape(num_rows, num_questions)

    def extend(state: _State) -> _State:
        tokens = jax.lax.dynamic_index_in_dim(state.answers.tokens, state.count - 1, 2, keepdims=False)
        where = text.Step(seen_BQT, state.count - 1)
        logits, memory = step(model, params, tokens, position_BQ + state.count, where, state.memory)
        answers, is_over = _append(state.answers, state.is_over, state.count, logits,
                                   pick(logits, state.count), questions, eos)
        return _State(state.count + 1, answers, is_over, memory)

    with jax.named_scope("prefill"):
        logits, prompt = prefill(model, params, batch, questions.last)
    zeros = jnp.zeros((num_rows, num_questions), jnp.int32)
    answers = Answers(jnp.full((num_rows, num_questions, num_new), eos, jnp.int32), zeros, zeros > 0,
                      zeros.astype(jnp.float32))
    is_over = (questions.last < 0) | (questions.limit < 1)
    answers, is_over = _append(answers, is_over, 0, logits, pick(logits, 0), questions, eos)
    start = _State(jnp.int32(1), answers, is_over, remember(prompt, num_questions, num_new, cache_dtype))
    with jax.named_scope("decode"):
        return jax.lax.while_loop(
            lambda s: (s.count < num_new) & ~s.is_over.all(), extend, start).answers
