"""Answers token by token: prefill a message tree once, then extend all of its branches together.

A row is the prompt tree of one visual input: the root (BOS and all visual tokens) and one branch per
question. The root is prefilled once for all questions, and its keys and values are stored once. Each question
has its own slots for the tokens of its answer; a new token sees what the last token of its question sees, and
its own answer:

    prompt   root aaa bbb .        answers   a a a . .       two questions a, b; . is not visible
                                             b b b . .

Two programs per shape: `begin` prefills the prompts and chooses the first tokens; `advance` is one while_loop
up to a given number of tokens. One call of it completes the answers; repeated calls stream them.

B rows, T prompt tokens, Q questions per row, n = B * Q, N token slots per answer, V base vocabulary, S states
of the automaton that finds stop strings, D decoder width, L layers, K key heads, H head width. Of a model
that chooses where to point: M crops, P patches, A tapped width of the ViT, R visual tokens.

Source: reference, olmo/models/molmo2/molmo2.py (generate), which handles one question at a time with a
growing cache.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from molmo2_jax import sharding
from molmo2_jax import types
from molmo2_jax.attention import tree_mask
from molmo2_jax.model import choosing
from molmo2_jax.model import layers
from molmo2_jax.model import molmo2
from molmo2_jax.model import pointer
from molmo2_jax.model import quantized
from molmo2_jax.model import text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits.

    temperature 0 is greedy. Otherwise: logits / temperature, then the `top_k` most likely (0: all), then the
    smallest set of these whose probability reaches `top_p`, then a draw.
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
    """The questions in the prompt trees of a Batch."""
    last: Any    # int32[B, Q], position in the row of a question's last token; -1: no question
    limit: Any   # int32[B, Q], maximum of new tokens in its answer, EOS included
    draw: Any    # int32[B, Q], number of the question: with the seed, determines what is sampled


class Answers(NamedTuple):
    """Answers so far; `tokens` are padded with EOS after `length`."""
    tokens: jax.Array    # int32[B, Q, N], including the EOS or stop string that ended the answer
    length: jax.Array    # int32[B, Q]
    ended: jax.Array     # bool[B, Q], whether EOS or a stop string was reached within the limit
    logprob: jax.Array   # float32[B, Q], sum of the log-probabilities of the tokens
    choice: Any = None   # int32[B, Q, N], of the tokens as in types.Batch; None for models without a pointer


class State(NamedTuple):
    """Incomplete answers, and what `advance` needs to continue them."""
    answers: Answers
    count: jax.Array     # type: ignore[assignment]  # int32[], new tokens per question so far
    is_over: jax.Array   # bool[B, Q]
    stop: jax.Array      # int32[B, Q], state of the stop-string automaton; see `advance`
    memory: Any          # text.Memory, or a list with one per layer
    seen: jax.Array      # bool[B, Q, T], prompt tokens that the answer sees
    position: jax.Array  # int32[B, Q], of the last prompt token
    limit: jax.Array     # int32[B, Q]
    key: jax.Array       # [B, Q], random key of the question
    pointing: Any = None     # (choosing.Prompt, choosing.Progress); None for models without a pointer


# Logical axes of the memory, without those of layers.
_PROMPT_PLACES = ("rows", "kv_heads", None, "length"), ("rows", "kv_heads", "length", None)
_PLACES = _PROMPT_PLACES, (("rows", None, "kv_heads", None, None),) * 2


def _on_places(function, memory: text.Memory) -> text.Memory:
    """Returns `function(array, *logical axes)` of each array of a memory."""
    return text.Memory(*(
        text.Cache(*(function(x, *[None] * (x.ndim - len(names)), *names) for x, names in zip(part, places)))
        for part, places in zip(memory, _PLACES)))


def _placed(state: State) -> State:
    """Returns the state constrained to its `layout`: so `advance` is one program for all states."""
    memory = layers.Stack.map_kept(functools.partial(_on_places, sharding.constrain), state.memory)
    pointing = state.pointing and choosing.placed(*state.pointing)
    return sharding.replicate(state._replace(memory=None, seen=None, pointing=None))._replace(
        memory=memory, seen=sharding.constrain(state.seen, "rows", None, "length"), pointing=pointing)


def layout(state: State, mesh: jax.sharding.Mesh) -> State:
    """Returns the sharding of each array of a state on a mesh, as `begin` leaves it."""
    of = lambda x, *names: sharding.of_activation(mesh, x.shape, *names)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), state._replace(memory=None))
    if state.pointing is not None:
        prompt = choosing.Prompt(*(of(x, "rows", *[None] * (x.ndim - 1)) for x in state.pointing[0]))
        whole = whole._replace(pointing=(prompt, whole.pointing[1]))
    return whole._replace(
        memory=layers.Stack.map_kept(functools.partial(_on_places, of), state.memory),
        seen=of(state.seen, "rows", None, "length"))


def choose(logits_nV, sampling: Sampling, keys_n):
    """Returns int32[n], the next tokens; `keys_n` are unused when temperature is 0."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_nV, axis=-1).astype(jnp.int32)
    logits_nV = logits_nV / sampling.temperature
    if sampling.top_k > 0 or sampling.top_p < 1:
        logits_nV = keep_likely(logits_nV, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys_n, logits_nV).astype(jnp.int32)


def keep_likely(logits_nV, top_k, top_p):
    """Returns the logits with -inf outside the `top_k` most likely and, of these, the `top_p` nucleus.

    Tokens tied with the least likely one kept are kept, and so is always the most likely token. Both limits
    are numbers, or arrays with one for each row.
    """
    num_tokens = logits_nV.shape[-1]
    top_k_n1, top_p_n1 = (jnp.broadcast_to(x, logits_nV.shape[:1])[:, None] for x in (top_k, top_p))
    falling = -jnp.sort(-logits_nV, axis=-1)
    last = jnp.where((top_k_n1 > 0) & (top_k_n1 < num_tokens), top_k_n1, num_tokens) - 1
    least = jnp.take_along_axis(falling, last, axis=-1)
    logits_nV, falling = (jnp.where(x < least, -jnp.inf, x) for x in (logits_nV, falling))
    share = jax.nn.softmax(falling, axis=-1)
    is_kept = (jnp.cumsum(share, axis=-1) - share < top_p_n1) | (top_p_n1 >= 1)
    least = jnp.min(jnp.where(is_kept, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_nV < least, -jnp.inf, logits_nV)


def at_last(x_BT, last_BQ):
    """Returns x[b, last[b, q]], shape [B, Q, ...]; x[b, 0] where `last` is -1."""
    return jax.vmap(lambda x, index: x[index])(x_BT, jnp.maximum(last_BQ, 0))


def stored_dtype(path: str, dtype: str) -> str:
    """Returns the dtype in which a parameter is stored to answer with: matrices and tables have that of the
    computation, to which they would be rounded anyway.

    Args:
      path: of the parameter in the tree, such as "text/layers/attn/q/kernel".
    """
    is_rounded = path.rpartition("/")[2] in ("kernel", "base_embedding", "new_embedding", "head")
    return dtype if is_rounded else "float32"


def is_in_8_bits(path: str) -> bool:
    """Returns whether `weights="int8"` stores a parameter in 8 bits: the decoder's kernels and its own head.

    Decoding reads these for every token. Of a table it reads a few rows, for which XLA would copy all rows of
    8 bits on a TPU, so a head that is the table stays as it is. ViT and connector run in prefill only, which
    is bound by operations.
    """
    return path == "head" or (path.startswith("text/") and path.endswith("/kernel"))


def stored(path: str, leaf, dtype: str, weights: str | None = None):
    """Returns a parameter as answering stores it: in `stored_dtype`, or in 8 bits.

    Args:
      leaf: an array or a quantized.Int8, which is left as it is.
      weights: "int8", or None: in the dtype of the computation.
    """
    if quantized.is_int8(leaf):
        return leaf
    leaf = leaf.astype(stored_dtype(path, dtype))
    if weights == "int8" and is_in_8_bits(path):
        return quantized.quantize(leaf, quantized.summed_axes(path))
    return leaf


def _map_named(function, params, *others):
    """Returns `function(path, leaf, *others' leaves)` of each parameter; a quantized.Int8 is one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves),
        params, *others, is_leaf=quantized.is_int8)


def abstract_stored(params, dtype: str, weights: str | None = None):
    """Returns a tree of ShapeDtypeStructs as `stored` makes of arrays of these shapes and shardings."""
    def one(path, leaf):
        if weights == "int8" and is_in_8_bits(path):
            return quantized.abstract(leaf, quantized.summed_axes(path))
        return leaf.update(dtype=jnp.dtype(stored_dtype(path, dtype)))
    return _map_named(one, params)


def stored_bytes(params, dtype: str, weights: str | None = None) -> int:
    """Returns the bytes of all parameters as `stored`, from a tree of their shapes, boxed or not."""
    leaves = jax.tree.leaves(abstract_stored(nn.meta.unbox(params), dtype, weights))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def ready(params, dtype: str, unroll: bool | None = None, shardings=None, weights: str | None = None):
    """Returns the parameters on the devices, stored and laid out for prefill and decoding.

    Args:
      params: the tree, float32 or already `stored`, on the host or on devices.
      unroll: make a list of the layers: in a loop, XLA's CPU backend copies each layer's part of the stack
        for every token. None unrolls on CPU; elsewhere a loop compiles faster.
      shardings: tree of NamedShardings of the parameters; None: one device.
      weights: see `stored`.
    """
    def one(path, leaf, place=None):
        if place is not None and not quantized.is_int8(leaf):
            leaf = sharding.distribute(leaf.astype(stored_dtype(path, dtype)), place)
        leaf = stored(path, leaf, dtype, weights)
        if place is not None and quantized.is_int8(leaf):
            places = quantized.shardings(place, leaf.ndim, quantized.summed_axes(path))
            leaf = quantized.Int8(*map(sharding.distribute, leaf, places))
        return leaf

    params = _map_named(one, params, *([] if shardings is None else [shardings]))
    if unroll or (unroll is None and jax.default_backend() == "cpu"):
        for tower in ("vision", "text"):
            stack = layers.Stack(params[tower]["layers"])
            params = params | {tower: params[tower] | {"layers": stack.unrolled()}}
    return params if shardings is not None else jax.device_put(params)


def prefill(model: molmo2.Molmo2, params, batch: types.Batch, last_BQ):
    """Returns (float32[B, Q, V] logits after each question, text.Cache of the prompt, stacked or a list)."""
    return prefill_offering(model, params, batch, last_BQ)[:2]


def prefill_offering(model: molmo2.Molmo2, params, batch: types.Batch, last_BQ):
    """Returns what `prefill` does, and the choosing.Prompt, None without a pointer or visual tokens."""
    mask = tree_mask.from_batch(batch, model.config.visual_attention)
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    x_BTD, features_BMPA, visual_BRD = apply(batch, is_in_place=True, method="embed")
    hidden_BTD, cache, states_BTD = apply(x_BTD, batch.positions, mask, method="decode_inside")
    hidden_BQD = sharding.constrain(at_last(hidden_BTD, last_BQ), "replicas", None, None)
    prompt = None
    if model.config.pointer is not None and features_BMPA is not None:
        seen = pointer.visual_of(batch, model.config)
        heads = apply(pointer.take(states_BTD, seen.position), method="heads")
        prompt = choosing.Prompt(
            key=pointer.rotate(heads.patch_k, seen.place, model.config.pointer.theta),
            selectable=seen.selectable, place=seen.place, visual=visual_BRD,
            features=features_BMPA.reshape(features_BMPA.shape[0], -1, features_BMPA.shape[-1]),
            pooled=batch.pooled)
    return apply(hidden_BQD, is_in_place=True, method="logits"), cache, prompt


def step(model: molmo2.Molmo2, params, tokens_BQ, positions_BQ, where: text.Step | text.Growth, memory,
         wanted_BQ=None):
    """Returns (float32[B, Q, V] logits after one new token per question, the memory with that token).

    With `wanted_BQ`, only the logits after these of a row's new tokens.
    """
    x_BQD = model.apply({"params": params}, tokens_BQ, is_in_place=True, method="embed_tokens")
    hidden_BQD, memory = model.apply({"params": params}, x_BQD, positions_BQ, where, memory, method="decode")
    if wanted_BQ is not None:
        hidden_BQD = at_last(hidden_BQD, wanted_BQ)
    return model.apply({"params": params}, hidden_BQD, is_in_place=True, method="logits"), memory


def pointing_step(model, params, tokens_BQ, positions_BQ, where: text.Step | text.Growth, memory, pointing,
                  wanted_BQ=None):
    """Returns (logits, memory, pointer.Heads of the states): `step` for a model with a pointer.

    pointing: (choosing.Prompt, choosing.Progress), of which what the new tokens chose is fed back.
    """
    apply = functools.partial(model.apply, {"params": params})
    x_BQD = apply(tokens_BQ, is_in_place=True, method="embed_tokens")
    x_BQD += apply(*pointing, method="fed_back").astype(x_BQD.dtype)
    hidden_BQD, memory, states_BQD = apply(x_BQD, positions_BQ, where, memory, method="decode_inside")
    if wanted_BQ is not None:
        hidden_BQD, states_BQD = at_last(hidden_BQD, wanted_BQ), at_last(states_BQD, wanted_BQ)
    return apply(hidden_BQD, is_in_place=True, method="logits"), memory, apply(states_BQD, method="heads")


def as_read(prompt: text.Cache, dtype: str | None = None) -> text.Cache:
    """Returns keys and values of tokens as decoding reads them: [..., K, H, T] and [..., K, T, H]."""
    k, v = (x.astype(dtype or x.dtype) for x in prompt)
    return text.Cache(jnp.moveaxis(k, -3, -1), v.swapaxes(-3, -2))


def remember(prompt, num_questions: int, num_new: int, dtype: str | None = None):
    """Returns the memory of prefilled prompts, with room for `num_new` tokens per answer.

    Args:
      prompt: text.Cache, or a list with one per layer; the result is accordingly a text.Memory or a list.
      dtype: of the stored keys and values; None: that of the computation.
    """
    def one(prompt: text.Cache) -> text.Memory:
        *stack, B, _, K, H = prompt.k.shape  # one layer of a list has no L
        room = jnp.zeros((*(stack or [1]), B, num_questions, K, num_new, H), dtype or prompt.k.dtype)
        return text.Memory(as_read(prompt, dtype), text.Cache(room.swapaxes(-2, -1), room))

    return layers.Stack.map_kept(one, prompt)


def seen_of_prompt(end_BT, last_BQ):
    """Returns bool[B, Q, T]: the prompt tokens that each question's last token sees, itself included."""
    position = jnp.arange(end_BT.shape[1])
    last = last_BQ[..., None]
    return (position <= last) & (last < end_BT[:, None])


def _write(model, params, state: State, logits_BQV, sampling: Sampling, eos, stops_SV, heads=None) -> State:
    """Returns the state with one more token per question, chosen from the logits.

    heads: with a pointer, what says where to point; None for the first token.
    """
    logits_BQV = sharding.constrain(logits_BQV, "rows", None, None)
    if model.config.pointer is not None:
        progress = state.pointing and state.pointing[1]
        logits_BQV = jnp.where(choosing.allowed(progress, heads is None, model.config), logits_BQV, -jnp.inf)
    logits_nV = logits_BQV.reshape(-1, logits_BQV.shape[-1])
    keys_n = jax.vmap(lambda key: jax.random.fold_in(key, state.count))(state.key.reshape(-1))
    chosen = choose(logits_nV, sampling, keys_n).reshape(state.is_over.shape)
    logprob = jax.nn.log_softmax(logits_BQV, axis=-1)
    logprob = jnp.take_along_axis(logprob, chosen[..., None], axis=-1)[..., 0]
    answers, is_over, stop = state.answers, state.is_over, state.stop
    tokens = jnp.where(is_over, eos, chosen)
    ends = tokens == eos
    if stops_SV is not None:
        read = jnp.where(chosen < stops_SV.shape[1], stops_SV[stop, chosen], 0)   # choices are no text
        stop = jnp.where(is_over, stop, read)
        ends |= stop < 0
    ended = answers.ended | (~is_over & ends)
    pointing = state.pointing
    if pointing is not None and heads is not None:
        progress = model.apply({"params": params}, *pointing, heads, tokens, state.count, method="choose")
        pointing = pointing[0], progress
    answers = Answers(
        tokens=jax.lax.dynamic_update_index_in_dim(answers.tokens, tokens, state.count, 2),
        length=answers.length + ~is_over, ended=ended,
        logprob=answers.logprob + jnp.where(is_over, 0.0, logprob),
        choice=None if pointing is None else pointing[1].choice)
    count = state.count + 1
    is_over |= ended | (count >= state.limit)
    return _placed(state._replace(answers=answers, count=count, stop=stop, is_over=is_over,
                                  pointing=pointing))


@functools.partial(jax.jit, static_argnames=("model", "num_new", "sampling", "cache_dtype"))
def begin(model, params, batch, questions: Questions, seed, eos, stops_SV, *, num_new, sampling,
          cache_dtype) -> State:
    """Returns the state after prefill, with the first token of each answer. Arguments as `generate`."""
    num_rows, num_questions = questions.last.shape
    key = jax.random.key(seed)
    with jax.named_scope("prefill"):
        logits, prompt, offered = prefill_offering(model, params, batch, questions.last)
    zeros = jnp.zeros((num_rows, num_questions), jnp.int32)
    tokens = jnp.full((num_rows, num_questions, num_new), eos, jnp.int32)
    pointing = None if offered is None else (offered, choosing.begin(offered, num_questions, num_new))
    empty = State(
        answers=Answers(tokens, zeros, zeros > 0, zeros.astype(jnp.float32)), count=jnp.int32(0),
        is_over=(questions.last < 0) | (questions.limit < 1), stop=zeros,
        memory=remember(prompt, num_questions, num_new, cache_dtype),
        seen=seen_of_prompt(batch.end, questions.last), position=at_last(batch.positions, questions.last),
        limit=jnp.asarray(questions.limit, jnp.int32),
        key=jax.vmap(jax.vmap(lambda draw: jax.random.fold_in(key, draw)))(questions.draw), pointing=pointing)
    return _write(model, params, empty, logits, sampling, eos, stops_SV)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def advance(model, params, state: State, until, eos, stops_SV, *, sampling) -> State:
    """Returns the state once each question has `until` tokens or every answer is over: one while_loop.

    Args:
      state: from `begin` or `advance`; donated.
      stops_SV: int32, the automaton's next state after token v in state s; it starts in 0, and -1 ends the
        answer (inputs/stops.py). None: only EOS does.
    """
    def extend(state: State) -> State:
        last = state.count - 1
        tokens = jax.lax.dynamic_index_in_dim(state.answers.tokens, last, 2, keepdims=False)
        where, heads = (tokens, state.position + state.count, text.Step(state.seen, last), state.memory), None
        if state.pointing is None:
            logits, memory = step(model, params, *where)
        else:
            logits, memory, heads = pointing_step(model, params, *where, state.pointing)
        return _write(model, params, state._replace(memory=memory), logits, sampling, eos, stops_SV, heads)

    until = jnp.minimum(until, state.answers.tokens.shape[2])
    with jax.named_scope("decode"):
        return _placed(jax.lax.while_loop(lambda s: (s.count < until) & ~s.is_over.all(), extend, state))


def stream(model: molmo2.Molmo2, params, batch: types.Batch, questions: Questions, *, eos: int, num_new: int,
           every: int, sampling: Sampling = GREEDY, stops=None, cache_dtype: str | None = None
           ) -> Iterator[Answers]:
    """Yields the answers so far: after the first token, after each `every` more, and finally complete.

    Arguments and compiled programs are those of `generate`. If the caller stops iterating, computation stops.
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

    Compiled once per model, shapes, `num_new` (N, the room for new tokens) and sampling apart from its seed.
    The loop ends when every answer has ended or reached its limit; limits beyond N count as N.

    Args:
      params: a parameter tree, best as `ready` returns it.
      stops: automaton of the stop strings, `stops_SV` of `advance`.
      cache_dtype: of the stored keys and values; None: that of the computation.
    """
    seedless = dataclasses.replace(sampling, seed=0)
    state = begin(model, params, batch, questions, sampling.seed, eos, stops, num_new=num_new,
                  sampling=seedless, cache_dtype=cache_dtype)
    return advance(model, params, state, num_new, eos, stops, sampling=seedless).answers
