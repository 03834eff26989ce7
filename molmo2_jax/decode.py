"""Answers token by token: prefill a message tree once, then extend all of its branches together.

A row is the prompt tree of one visual input: the root (BOS and all visual tokens) and one branch per
question. The root is read once, whatever the number of questions, and its keys and values are kept once.
Each question has its own slots for the tokens of its answer; a new token sees what the last token of its
question sees, and its own answer:

    prompt   root aaa bbb .        answers   a a a . .       two questions a, b; . is not seen
                                             b b b . .

Two programs per shape: `begin` reads the prompts and chooses the first tokens, `advance` is one while_loop
that goes on to a given number of tokens. Called once it writes whole answers; called again and again it lets
them be read while they are written.

B rows, T prompt tokens, Q questions per row, n rows or questions of any number, N slots for the tokens of an
answer, V base vocabulary, S states of reading stop strings, D width, L layers, K key heads, H head width.

Source: reference, olmo/models/molmo2/molmo2.py (generate), which handles one question at a time with a
growing cache.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from molmo2_jax import types
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import layers
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
    tokens: jax.Array    # int32[B, Q, N], with the EOS or the end of the stop string that ended it
    length: jax.Array    # int32[B, Q]
    ended: jax.Array     # bool[B, Q], whether EOS or a stop string was reached within the limit
    logprob: jax.Array   # float32[B, Q], sum of the log-probabilities of the tokens


class State(NamedTuple):
    """Answers on their way, with all that is needed to go on."""
    answers: Answers
    count: jax.Array     # type: ignore[assignment]  # int32[], new tokens per question so far
    is_over: jax.Array   # bool[B, Q]
    stop: jax.Array      # int32[B, Q], how far into a stop string the answer is; see `advance`
    memory: Any          # text.Memory, or a list with one per layer
    seen: jax.Array      # bool[B, Q, T], prompt tokens that the answer sees
    position: jax.Array  # int32[B, Q], of the last prompt token
    limit: jax.Array     # int32[B, Q]
    key: jax.Array       # [B, Q], of what is drawn for the question


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


def ready(params, dtype: str, unroll: bool | None = None):
    """Returns the parameters on the devices, as reading and writing answers wants them.

    Matrices and tables have the dtype of the computation, in which they would be rounded anyway. With
    `unroll` the layers are a list: XLA's CPU backend copies a layer's part of the stack whenever a loop
    comes to it, for every token that is written. None unrolls on CPU; elsewhere a loop compiles faster.
    """
    def cast(path, leaf):
        is_rounded = path[-1].key in ("kernel", "base_embedding", "new_embedding", "head")
        return leaf.astype(dtype) if is_rounded else leaf

    params = jax.tree_util.tree_map_with_path(cast, params)
    if unroll or (unroll is None and jax.default_backend() == "cpu"):
        for tower in ("vision", "text"):
            stack = layers.Stack(params[tower]["layers"])
            params = params | {tower: params[tower] | {"layers": stack.unrolled()}}
    return jax.device_put(params)


def prefill(model: molmo2.Molmo2, params, batch: types.Batch, last_BQ):
    """Returns (float32[B, Q, V] logits behind each question, text.Cache of the prompt, per layer or one)."""
    mask = tree_mask.from_batch(batch, model.config.visual_attention)
    x_BTD = model.apply({"params": params}, batch.tokens, batch.patches, batch.pooled, method="embed")
    hidden_BTD, cache = model.apply({"params": params}, x_BTD, batch.positions, mask, method="decode")
    logits_BQV = model.apply({"params": params}, at_last(hidden_BTD, last_BQ), method="logits")
    return logits_BQV, cache


def step(model: molmo2.Molmo2, params, tokens_BQ, positions_BQ, where: text.Step, memory):
    """Returns (float32[B, Q, V] logits behind one new token per question, the memory with it)."""
    x_BQD = model.apply({"params": params}, tokens_BQ, method="embed_tokens")
    hidden_BQD, memory = model.apply({"params": params}, x_BQD, positions_BQ, where, memory, method="decode")
    return model.apply({"params": params}, hidden_BQD, method="logits"), memory


def remember(prompt, num_questions: int, num_new: int, dtype: str | None = None):
    """Returns the memory of prompts that were read, with room for answers of `num_new` tokens.

    Args:
      prompt: text.Cache, or a list with one per layer; the result is a text.Memory or a list likewise.
      dtype: of what is kept; None keeps that of the computation.
    """
    def one(prompt: text.Cache) -> text.Memory:
        k, v = (x.astype(dtype or x.dtype) for x in prompt)
        *stack, B, _, K, H = k.shape  # one layer of a list has no L
        room = jnp.zeros((*(stack or [1]), B, num_questions, K, num_new, H), k.dtype)
        return text.Memory(text.Cache(jnp.moveaxis(k, -3, -1), v.swapaxes(-3, -2)),
                           text.Cache(room.swapaxes(-2, -1), room))

    return layers.Stack.map_kept(one, prompt)


def seen_of_prompt(end_BT, last_BQ):
    """Returns bool[B, Q, T]: the prompt tokens that each question's last token sees, itself included."""
    position = jnp.arange(end_BT.shape[1])
    last = last_BQ[..., None]
    return (position <= last) & (last < end_BT[:, None])


def _write(state: State, logits_BQV, sampling: Sampling, eos, stops_SV) -> State:
    """Returns the state with one more token per question, chosen from the logits."""
    flat = logits_BQV.reshape(-1, logits_BQV.shape[-1])
    keys = jax.vmap(lambda key: jax.random.fold_in(key, state.count))(state.key.reshape(-1))
    chosen = choose(flat, sampling, keys).reshape(state.is_over.shape)
    logprob = jax.nn.log_softmax(logits_BQV, axis=-1)
    logprob = jnp.take_along_axis(logprob, chosen[..., None], axis=-1)[..., 0]
    answers, is_over, stop = state.answers, state.is_over, state.stop
    tokens = jnp.where(is_over, eos, chosen)
    ends = tokens == eos
    if stops_SV is not None:
        stop = jnp.where(is_over, stop, stops_SV[stop, chosen])
        ends |= stop < 0
    ended = answers.ended | (~is_over & ends)
    answers = Answers(
        tokens=jax.lax.dynamic_update_index_in_dim(answers.tokens, tokens, state.count, 2),
        length=answers.length + ~is_over, ended=ended,
        logprob=answers.logprob + jnp.where(is_over, 0.0, logprob))
    count = state.count + 1
    return state._replace(answers=answers, count=count, stop=stop,
                          is_over=is_over | ended | (count >= state.limit))


@functools.partial(jax.jit, static_argnames=("model", "num_new", "sampling", "cache_dtype"))
def begin(model, params, batch, questions: Questions, seed, eos, stops_SV, *, num_new, sampling,
          cache_dtype) -> State:
    """Returns the state after prefill: the first token of each answer is written. Arguments as `advance`."""
    num_rows, num_questions = questions.last.shape
    key = jax.random.key(seed)
    with jax.named_scope("prefill"):
        logits, prompt = prefill(model, params, batch, questions.last)
    zeros = jnp.zeros((num_rows, num_questions), jnp.int32)
    tokens = jnp.full((num_rows, num_questions, num_new), eos, jnp.int32)
    empty = State(
        answers=Answers(tokens, zeros, zeros > 0, zeros.astype(jnp.float32)), count=jnp.int32(0),
        is_over=(questions.last < 0) | (questions.limit < 1), stop=zeros,
        memory=remember(prompt, num_questions, num_new, cache_dtype),
        seen=seen_of_prompt(batch.end, questions.last), position=at_last(batch.positions, questions.last),
        limit=jnp.asarray(questions.limit, jnp.int32),
        key=jax.vmap(jax.vmap(lambda draw: jax.random.fold_in(key, draw)))(questions.draw))
    return _write(empty, logits, sampling, eos, stops_SV)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def advance(model, params, state: State, until, eos, stops_SV, *, sampling) -> State:
    """Returns the state with `until` tokens per question, or with all answers over: one while_loop.

    Args:
      state: as `begin` or `advance` returned it; given up.
      stops_SV: int32, the state after reading token v in state s; starts at 0, and -1 ends the answer
        (inputs/stops.py). None: only EOS does.
    """
    def extend(state: State) -> State:
        last = state.count - 1
        tokens = jax.lax.dynamic_index_in_dim(state.answers.tokens, last, 2, keepdims=False)
        logits, memory = step(model, params, tokens, state.position + state.count,
                              text.Step(state.seen, last), state.memory)
        return _write(state._replace(memory=memory), logits, sampling, eos, stops_SV)

    until = jnp.minimum(until, state.answers.tokens.shape[2])
    with jax.named_scope("decode"):
        return jax.lax.while_loop(lambda s: (s.count < until) & ~s.is_over.all(), extend, state)


def stream(model: molmo2.Molmo2, params, batch: types.Batch, questions: Questions, *, eos: int, num_new: int,
           every: int, sampling: Sampling = GREEDY, stops=None, cache_dtype: str | None = None
           ) -> Iterator[Answers]:
    """Yields the answers so far: after the first token, then after each `every` more, at last complete.

    Args and programs as those of `generate`. Whoever stops asking stops the computation.
    """
    seedless = dataclasses.replace(sampling, seed=0)
    state = begin(model, params, batch, questions, sampling.seed, eos, stops, num_new=num_new,
                  sampling=seedless, cache_dtype=cache_dtype)
    written = 1
    while written < num_new:
        answers, is_over = jax.device_get((state.answers, state.is_over))
        if is_over.all():
            break
        yield answers
        written = min(written + every, num_new)
        state = advance(model, params, state, written, eos, stops, sampling=seedless)
    yield jax.device_get(state.answers)


def generate(model: molmo2.Molmo2, params, batch: types.Batch, questions: Questions, *, eos: int,
             num_new: int, sampling: Sampling = GREEDY, stops=None, cache_dtype: str | None = None
             ) -> Answers:
    """Returns the answers to all questions of a batch of prompt trees.

    Compiled once per model, shapes, `num_new` (N, the room for new tokens) and way of sampling, whatever
    the seed. The loop ends when every answer has ended or reached its limit; limits beyond N count as N.

    Args:
      params: a parameter tree, best as `ready` returns it.
      stops: of stop strings, as for `advance`.
      cache_dtype: of the kept keys and values; None keeps that of the computation.
    """
    seedless = dataclasses.replace(sampling, seed=0)
    state = begin(model, params, batch, questions, sampling.seed, eos, stops, num_new=num_new,
                  sampling=seedless, cache_dtype=cache_dtype)
    return advance(model, params, state, num_new, eos, stops, sampling=seedless).answers
