"""Decode rows: a fixed number of conversations that are prefilled, extended and left independently.

A row holds the keys and values of one conversation, prompt and answer, from place 0 on; place and position
are the same number. A prompt is prefilled in a buffer of its own. All programs have static shapes:

    see      crops and BOS -> a root: keys and values of the visual input (serving/roots.py keeps them)
    begin    a root, or nothing -> a buffer that begins with it
    extend   a buffer, CHUNK tokens of a question -> the buffer with these
    enter    a buffer, the last tokens of a question -> a row with all of them, and the token after them
    advance  one token for each row that is not over, up to `every` times
    free     a row that is over

A question is mostly short, so `enter` takes one of a few numbers of tokens: padding costs as much as text.
Buffers have one of a few sizes, and `advance` reads only so many of the first places of all rows, so that
short conversations do not pay for the longest one. A row that is over or free computes along and is not read.

For a model with a pointer, a root, a buffer and a row also hold what may be chosen from (choosing.Prompt).

B rows, P places of a row, T tokens of a root, C tokens of a question, V base vocabulary, N new tokens
of a call.

Source: prefill, insert and generate of JetStream (github.com/AI-Hypercomputer/JetStream).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from molmo2_jax import decode
from molmo2_jax import sharding
from molmo2_jax import types
from molmo2_jax.model import choosing
from molmo2_jax.model import layers
from molmo2_jax.model import molmo2
from molmo2_jax.model import text

CHUNK = 128      # tokens of a question that are prefilled at a time, at most
_LEAST = 16      # and at least, padded
NOTHING = -1     # in place of a token: the row was over before it

_PLACES = (None, "rows", "kv_heads", None, None)   # logical axes of keys and of values
_ROOT_PLACES = ("rows", "kv_heads", None, None)


class Ask(NamedTuple):
    """What a row is told with the last chunk of a question; a number each, or an array with one per row."""
    limit: Any           # int32, most new tokens, EOS included
    temperature: Any     # float32, 0 is greedy
    top_k: Any           # int32, 0 keeps all tokens
    top_p: Any           # float32
    seed: Any            # int32


class Rows(NamedTuple):
    """The state of all rows."""
    memory: Any           # text.Memory(None, text.Cache), or a list with one per layer
    ask: Ask
    token: jax.Array      # int32[B], the newest token, whose keys and values are not yet stored
    place: jax.Array      # int32[B], where they will be
    count: jax.Array      # type: ignore[assignment]  # int32[B], new tokens so far
    is_over: jax.Array    # bool[B], also of a free row
    ended: jax.Array      # bool[B], whether EOS ended the answer
    offered: Any = None   # choosing.Prompt of all rows; None for models without a pointer
    progress: Any = None  # choosing.Progress of [B, 1], with the last choice only


class Held(NamedTuple):
    """A root, or a buffer: keys and values, and what may be chosen from."""
    memory: Any           # of a root a text.Cache, of a buffer a text.Memory(None, text.Cache); or lists
    offered: Any = None   # choosing.Prompt; None for models without a pointer


class Fed(NamedTuple):
    """What tokens of a question chose, as choosing.written takes it; int32[CHUNK] each."""
    row: Any
    slot: Any


class News(NamedTuple):
    """What a call of `enter` or `advance` added, small enough to read after each."""
    tokens: jax.Array     # int32[B, N]; NOTHING after the row was over
    is_over: jax.Array    # bool[B]
    ended: jax.Array      # bool[B]
    logprobs: jax.Array   # float32[B, N], of these tokens; NaN if a logit was NaN or infinite
    choices: Any = None   # int32[B, N], of these tokens as in types.Batch; None without a pointer


def empty(model: molmo2.Molmo2, num_rows: int, num_places: int, dtype: str, is_unrolled: bool,
          most: types.RowShape) -> Rows:
    """Returns free rows.

    is_unrolled: the layers are a list, as decode.ready makes them on CPU.
    most: sizes of the largest media; without a pointer unused.
    """
    t = model.config.text
    shape = (1 if is_unrolled else t.num_layers, num_rows, t.num_kv_heads, num_places, t.head_dim)

    def memory():
        values = jnp.zeros(shape, dtype)
        return text.Memory(None, text.Cache(values.swapaxes(-2, -1), values))

    zeros = jnp.zeros(num_rows, jnp.int32)
    ask = Ask(zeros, zeros.astype(jnp.float32), zeros, zeros + jnp.float32(1), zeros)
    return _placed(Rows(
        memory=[memory() for _ in range(t.num_layers)] if is_unrolled else memory(), ask=ask, token=zeros,
        place=zeros, count=zeros, is_over=zeros == 0, ended=zeros > 0,
        offered=_nothing(model, num_rows, most),
        progress=None if model.config.pointer is None else choosing.start(num_rows, 1, 1)))


def _nothing(model: molmo2.Molmo2, num_rows: int, most: types.RowShape) -> choosing.Prompt | None:
    if model.config.pointer is None:
        return None
    return choosing.nothing(num_rows, most, model.config, model.dtype)


def _map_cache(function, memory):
    """Returns the memory with `function(array)` of each array of keys and values."""
    return layers.Stack.map_kept(lambda one: text.Memory(None, text.Cache(*map(function, one.answers))),
                                 memory)


def _placed(rows: Rows) -> Rows:
    """Returns the rows constrained to the sharding that all programs take and give."""
    return sharding.replicate(rows._replace(memory=None, offered=None))._replace(
        memory=_placed_memory(rows.memory), offered=_placed_offered(rows.offered))


def _placed_offered(offered):
    return jax.tree.map(lambda x: sharding.constrain(x, "rows", *[None] * (x.ndim - 1)), offered)


def _offered_layout(offered, mesh: jax.sharding.Mesh):
    return jax.tree.map(lambda x: sharding.of_activation(mesh, x.shape, "rows", *[None] * (x.ndim - 1)),
                        offered)


def _placed_memory(memory):
    return _map_cache(lambda x: sharding.constrain(x, *_PLACES), memory)


def layout(rows: Rows, mesh: jax.sharding.Mesh) -> Rows:
    """Returns the sharding of each array of rows on a mesh, as all programs take and give them."""
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), rows._replace(memory=None))
    return whole._replace(memory=_memory_layout(rows.memory, mesh),
                          offered=_offered_layout(rows.offered, mesh))


def buffer_layout(buffer: Held, mesh: jax.sharding.Mesh) -> Held:
    """Returns the sharding of each array of a buffer on a mesh."""
    return Held(_memory_layout(buffer.memory, mesh), _offered_layout(buffer.offered, mesh))


def _memory_layout(memory, mesh: jax.sharding.Mesh):
    return _map_cache(lambda x: sharding.of_activation(mesh, x.shape, *_PLACES), memory)


def root_layout(root: Held, mesh: jax.sharding.Mesh) -> Held:
    """Returns the sharding of each array of a root on a mesh."""
    cache = jax.tree.map(lambda x: sharding.of_activation(
        mesh, x.shape, *[None] * (x.ndim - len(_ROOT_PLACES)), *_ROOT_PLACES), root.memory)
    return Held(cache, _offered_layout(root.offered, mesh))


def see(model: molmo2.Molmo2, params, batch: types.Batch, *, dtype: str | None) -> Held:
    """Returns roots, with keys and values as decoding reads them: a text.Cache, or a list of them.

    batch: one row, BOS and visual tokens; padding after them is computed along and never seen.
    """
    with jax.named_scope("prefill"):
        _, prompt, offered = decode.prefill_offering(
            model, params, batch, jnp.zeros((batch.tokens.shape[0], 1), jnp.int32))
    place = lambda x: sharding.constrain(x, *[None] * (x.ndim - len(_ROOT_PLACES)), *_ROOT_PLACES)
    cache = layers.Stack.map_kept(lambda one: text.Cache(*map(place, decode.as_read(one, dtype))), prompt)
    return Held(cache, _placed_offered(offered))


def begin(root: Held | None, *, model: molmo2.Molmo2, like: text.Cache | list, size: int, most: types.RowShape
          ) -> Held:
    """Returns a buffer of `size` places that begins with a root; root None: an empty one.

    like: shapes of the rows' keys and values, a text.Cache or a list.
    most: as for `empty`.
    """
    def one(like: text.Cache, cache: text.Cache | None) -> text.Memory:
        k, v = (jnp.zeros((like.k.shape[0], 1, *shape), like.k.dtype) for shape in (
            (*like.k.shape[2:4], size), (like.v.shape[2], size, like.v.shape[4])))
        if cache is not None:
            k, v = (jax.lax.dynamic_update_slice(
                room, given.reshape(-1, *given.shape[-4:]).astype(room.dtype), (0,) * 5)  # a list has no L
                for room, given in zip((k, v), cache))
        return text.Memory(None, text.Cache(k, v))

    cache = None if root is None else root.memory
    if isinstance(like, list):
        made = [one(*pair) for pair in zip(like, cache or [None] * len(like), strict=True)]
    else:
        made = one(like, cache)
    offered = _nothing(model, 1, most)
    if root is not None and offered is not None:
        offered = choosing.put(offered, root.offered, 0)
    return _placed_buffer(Held(made, offered))


def _placed_buffer(buffer: Held) -> Held:
    return Held(_placed_memory(buffer.memory), _placed_offered(buffer.offered))


def _read(model: molmo2.Molmo2, params, buffer: Held, tokens_C, fed: Fed | None, start, num):
    """Returns (logits float32[1, V] after the first `num` tokens, the buffer with all of them)."""
    positions = start + jnp.arange(len(tokens_C))
    where = (tokens_C[None], positions[None], text.Growth(start[None]), buffer.memory)
    wanted = (num - 1)[None, None]
    with jax.named_scope("extend"):
        if fed is None:
            logits, memory = decode.step(model, params, *where, wanted)
        else:
            pointing = buffer.offered, choosing.written(fed.row[None], fed.slot[None])
            logits, memory, _ = decode.pointing_step(model, params, *where, pointing, wanted)
            logits = jnp.where(choosing.allowed(None, True, model.config), logits, -jnp.inf)
    return logits[:, 0], _placed_buffer(buffer._replace(memory=memory))


def extend(model: molmo2.Molmo2, params, buffer: Held, tokens_C, fed: Fed | None, start) -> Held:
    """Returns the buffer with tokens of a question, from place `start` on; arguments as those of `enter`."""
    return _read(model, params, buffer, tokens_C, fed, start, jnp.int32(1))[1]   # logits are compiled away


def enter(model: molmo2.Molmo2, params, rows: Rows, buffer: Held, tokens_C, fed: Fed | None, start, num, row,
          ask: Ask, eos) -> tuple[Rows, News]:
    """Returns the rows with a question in one of them, and its answer's first token, as News of one row.

    Args:
      buffer: all before the last tokens of the question; it has room for these.
      tokens_C: int32[C], of which the first `num` count.
      fed: what they chose; None for models without a pointer.
      start: place of the first.
    """
    logits, buffer = _read(model, params, buffer, tokens_C, fed, start, num)
    one = jax.tree.map(lambda x: x[None], ask)
    token, is_eos, logprob = _next(sharding.replicate(logits), one, jnp.zeros(1, jnp.int32), eos)
    is_over = is_eos | (one.limit <= 1)
    put = lambda old, new: old.at[row].set(new)
    offered, progress = rows.offered, rows.progress
    if offered is not None:
        fresh = choosing.begin(buffer.offered, 1, 1)
        offered = choosing.put(offered, buffer.offered, row)
        progress = jax.tree.map(lambda old, new: put(old, new[0]), progress, fresh)
    rows = rows._replace(
        offered=offered, progress=progress,
        memory=_put_first(rows.memory, buffer.memory, row), ask=jax.tree.map(put, rows.ask, ask),
        token=put(rows.token, token[0]), place=put(rows.place, start + num), count=put(rows.count, 1),
        is_over=put(rows.is_over, is_over[0]), ended=put(rows.ended, is_eos[0]))
    choices = None if fed is None else jnp.full((1, 1), -1, jnp.int32)
    return _placed(rows), sharding.replicate(News(token[:, None], is_over, is_eos, logprob[:, None], choices))


def _put_first(memory, part, row=0):
    """Returns the memory with `part` in its first places, from a row on."""
    join = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, row, 0, 0, 0))
    return jax.tree.map(join, memory, part)


def _first_places(memory, read: int):
    """Returns the first `read` places of all rows."""
    cut = functools.partial(jax.lax.slice_in_dim, start_index=0, limit_index=read)
    return layers.Stack.map_kept(lambda one: text.Memory(None, text.Cache(
        cut(one.answers.k, axis=4), cut(one.answers.v, axis=3))), memory)


def choose(logits_nV, ask: Ask, count_n):
    """Returns int32[n], the next tokens, each as decode.choose with its row's settings chooses it."""
    def filtered(logits_nV):
        return jax.lax.cond(((ask.top_k > 0) | (ask.top_p < 1)).any(),
                            lambda x: decode.keep_likely(x, ask.top_k, ask.top_p), lambda x: x, logits_nV)

    def drawn(logits_nV):
        divisor = jnp.where(ask.temperature > 0, ask.temperature, 1)[:, None]
        keys = jax.vmap(lambda seed, count: jax.random.fold_in(
            jax.random.fold_in(jax.random.key(seed), 0), count))(ask.seed, count_n)
        return jax.vmap(jax.random.categorical)(keys, filtered(logits_nV / divisor)).astype(jnp.int32)

    likeliest = jnp.argmax(logits_nV, axis=-1).astype(jnp.int32)
    sampled = jax.lax.cond((ask.temperature > 0).any(), drawn, lambda _: likeliest, logits_nV)
    return jnp.where(ask.temperature > 0, sampled, likeliest)


def _next(logits_nV, ask: Ask, count_n, eos):
    """Returns (token, whether it is EOS, its log-probability) of each row."""
    token = choose(logits_nV, ask, count_n)
    logprob = jax.nn.log_softmax(logits_nV, axis=-1)
    return token, token == eos, jnp.take_along_axis(logprob, token[:, None], axis=-1)[:, 0]


def advance(model: molmo2.Molmo2, params, rows: Rows, eos, *, every: int, read: int) -> tuple[Rows, News]:
    """Returns the rows after up to `every` tokens each, and these tokens; ends once all rows are over.

    read: places that are read; more than `every` beyond the place of every row that is not over.
    """
    num_rows, num_places, offered = rows.token.shape[0], _num_places(rows.memory), rows.offered

    def once(carry):
        rows, tokens, logprobs, choices, n = carry
        where = rows.token[:, None], rows.place[:, None], text.Growth(rows.place), rows.memory
        if offered is None:
            logits, memory = decode.step(model, params, *where)
        else:
            logits, memory, heads = decode.pointing_step(model, params, *where, (offered, rows.progress))
            logits = jnp.where(choosing.allowed(rows.progress, False, model.config), logits, -jnp.inf)
        logits = sharding.constrain(logits[:, 0], "rows", None)
        token, is_eos, logprob = _next(logits, rows.ask, rows.count, eos)
        goes_on = ~rows.is_over
        count = rows.count + goes_on
        tokens = tokens.at[:, n].set(jnp.where(goes_on, token, NOTHING))
        logprobs = logprobs.at[:, n].set(logprob)
        if offered is not None:
            progress: Any = model.apply({"params": params}, offered, rows.progress, heads, token[:, None], 0,
                                   method="choose")
            rows, choices = rows._replace(progress=progress), choices.at[:, n].set(progress.choice[:, 0, 0])
        rows = rows._replace(
            memory=memory, token=jnp.where(goes_on, token, rows.token), place=rows.place + goes_on,
            count=count, ended=rows.ended | (goes_on & is_eos),
            is_over=rows.is_over | is_eos | (count >= rows.ask.limit))
        return _placed(rows), *sharding.replicate((tokens, logprobs, choices)), n + 1

    memory = rows.memory
    part = memory if read == num_places else _first_places(memory, read)
    none = jnp.full((num_rows, every), NOTHING, jnp.int32)
    start = (_placed(rows._replace(memory=part, offered=None)), none,
             jnp.zeros((num_rows, every), jnp.float32), None if offered is None else none, jnp.int32(0))
    with jax.named_scope("decode"):
        rows, tokens, logprobs, choices, _ = jax.lax.while_loop(
            lambda carry: (carry[-1] < every) & ~carry[0].is_over.all(), once, start)
    rows = rows._replace(offered=offered)
    if read != num_places:
        rows = rows._replace(memory=_put_first(memory, rows.memory))
    return _placed(rows), sharding.replicate(News(tokens, rows.is_over, rows.ended, logprobs, choices))


def _num_places(memory) -> int:
    return (memory[0] if isinstance(memory, list) else memory).answers.k.shape[-1]


def free(rows: Rows, row) -> Rows:
    """Returns the rows with one row over, whatever it was doing."""
    return _placed(rows._replace(is_over=rows.is_over.at[row].set(True)))


class Programs:
    """The compiled programs of one model and one number of rows, and the rows.

    Each is compiled ahead of time for the shapes of its bucket: a call with another one is an error, never a
    compilation.

    num_places: P of each row.
    every: most tokens per row of one `advance`.
    step: ratio of the sizes of buffers, and of the numbers of tokens that `enter` takes.
    sizes: those of buffers, ascending, the last one P.
    most: sizes of the largest media.
    """

    def __init__(self, model, params, mesh: jax.sharding.Mesh, eos: int, *, num_rows: int, num_places: int,
                 every: int, step: int, dtype: str | None, most: types.RowShape):
        self._model, self._params, self._mesh, self._eos = model, params, mesh, np.int32(eos)
        self._dtype, self._every, self._most = dtype, every, most
        sizes = [size for size in (512 * step ** n for n in range(32)) if size <= num_places // 2]
        self.sizes = (*sizes, num_places)
        self._counts = sorted(CHUNK // step ** n for n in range(8) if CHUNK // step ** n >= _LEAST)
        is_unrolled = isinstance(params["text"]["layers"], list)
        new = functools.partial(empty, model, num_rows, num_places, dtype or model.dtype, is_unrolled,
                                most)
        abstract = jax.eval_shape(new)
        self._layout = self._on_mesh(layout, abstract)
        self._rows_shape = self._shaped(abstract, self._layout)
        self._like = layers.Stack.map_kept(lambda one: one.answers, abstract.memory)
        self._compiled: dict[tuple, Any] = {}
        with sharding.using(mesh):
            self._rows = jax.jit(new, out_shardings=self._layout)()

    def _on_mesh(self, function, tree):
        return None if self._mesh.size == 1 else function(tree, self._mesh)

    @staticmethod
    def _shaped(tree, layouts):
        if layouts is None:
            return tree
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layouts)

    def _compile(self, key: tuple, function, *arguments, donate=(), layouts=None):
        with sharding.using(self._mesh):
            lowered = jax.jit(function, donate_argnums=donate, out_shardings=layouts).lower(*arguments)
            self._compiled[key] = lowered.compile()
        return self._compiled[key]

    def compile_see(self, batch: types.Batch) -> list:
        """Compiles what roots of this shape need; returns the compiled programs."""
        see_it = functools.partial(see, self._model, dtype=self._dtype)
        with sharding.using(self._mesh):
            abstract = jax.eval_shape(see_it, self._params, batch)
        layouts, given = self._on_mesh(root_layout, abstract), batch
        if self._mesh.size > 1:
            given = self._shaped(batch, sharding.of_batch(self._mesh, batch))
        made = [self._compile(("see", *_shape_of(batch)), see_it, self._params, given, layouts=layouts)]
        places = batch.tokens.shape[1]
        made += [self._compile_begin(places, size, self._shaped(abstract, layouts)) for size in self.sizes
                 if size >= places]
        return made

    def _begin(self, size: int):
        return functools.partial(begin, model=self._model, like=self._like, size=size, most=self._most)

    def _fed(self, count: int, chosen: Sequence[tuple[int, int]] = ()) -> Fed | None:
        """Returns the (row, slot) that tokens chose, padded to `count` tokens."""
        if self._model.config.pointer is None:
            return None
        padded = np.full((count, 2), -1, np.int32)
        padded[:len(chosen)] = np.reshape(chosen, (-1, 2))
        return Fed(*padded.T)

    def _compile_begin(self, places: int, size: int, root):
        of_size = self._begin(size)
        layouts = self._on_mesh(buffer_layout, jax.eval_shape(of_size, root))
        return self._compile(("begin", places, size), of_size, root, layouts=layouts)

    def compile_size(self, size: int) -> list:
        """Compiles what buffers and reads of this size need; returns the compiled programs."""
        number = np.int32(0)
        ask = Ask(number, np.float32(0), number, np.float32(1), number)
        whole = None if self._mesh.size == 1 else sharding.replicated(self._mesh)
        abstract = jax.eval_shape(self._begin(size), None)
        layouts = self._on_mesh(buffer_layout, abstract)
        buffer = self._shaped(abstract, layouts)
        pair = lambda first: None if whole is None else (first, whole)
        token = lambda count: np.zeros(count, np.int32)
        extending = self._compile(
            ("extend", size), functools.partial(extend, self._model), self._params, buffer, token(CHUNK),
            self._fed(CHUNK), number, donate=(1,), layouts=layouts)
        entering = [self._compile(
            ("enter", size, count), functools.partial(enter, self._model), self._params, self._rows_shape,
            buffer, token(count), self._fed(count), number, number, number, ask, number, donate=(1,),
            layouts=pair(self._layout)) for count in self._counts]
        advancing = self._compile(
            ("advance", size), functools.partial(advance, self._model, every=self._every, read=size),
            self._params, self._rows_shape, number, donate=(1,), layouts=pair(self._layout))
        return [self._compile_begin(0, size, None), extending, *entering, advancing]

    def compile_free(self) -> list:
        """Compiles `free`; returns it."""
        return [self._compile(("free",), free, self._rows_shape, np.int32(0), donate=(0,),
                              layouts=self._layout)]

    def see(self, batch: types.Batch):
        """Returns the root of a batch of one row of a compiled shape."""
        batch = jax.tree.map(sharding.distribute, batch, sharding.of_batch(self._mesh, batch))
        return self._compiled["see", *_shape_of(batch)](self._params, batch)

    def prefill(self, root: Held | None, places: int, start: int, tokens: Sequence[int], row: int, ask: Ask,
                fed: Sequence[tuple[int, int]] = ()) -> News:
        """Prefills a question into a row, and returns the first token of its answer.

        Args:
          root: what the question is about, in a bucket of `places`; None: nothing, and places is 0.
          start: place of the first token, the length of the root.
          fed: (row, slot) of each token, for a model with a pointer; (): no token chose any.
        """
        ask = Ask(*(kind(x) for kind, x in zip((np.int32, np.float32, np.int32, np.float32, np.int32), ask)))
        before = (len(tokens) - 1) // CHUNK * CHUNK     # tokens before the last ones
        num = len(tokens) - before
        count = next(count for count in self._counts if count >= num)
        size = next(size for size in self.sizes if size >= max(places, start + before + count))
        buffer = self._compiled["begin", places, size](root)
        for first in range(0, before, CHUNK):
            part = np.array(tokens[first:first + CHUNK], np.int32)
            chosen = self._fed(CHUNK, fed[first:first + CHUNK])
            buffer = self._compiled["extend", size](
                self._params, buffer, part, chosen, np.int32(start + first))
        self._rows, news = self._compiled["enter", size, count](
            self._params, self._rows, buffer, np.array([*tokens[before:], *[0] * (count - num)], np.int32),
            self._fed(count, fed[before:]), np.int32(start + before), np.int32(num), np.int32(row), ask,
            self._eos)
        return jax.device_get(news)

    def advance(self, farthest: int) -> News:
        """Advances all rows; `farthest` is the largest place of a row that is not over."""
        needed = min(farthest + self._every + 1, self.sizes[-1])
        program = self._compiled["advance", next(size for size in self.sizes if size >= needed)]
        self._rows, news = program(self._params, self._rows, self._eos)
        return jax.device_get(news)

    def free(self, row: int) -> None:
        """Makes a row over."""
        self._rows = self._compiled["free",](self._rows, np.int32(row))


def _shape_of(batch: types.Batch) -> tuple[int, int, int, int]:
    return batch.tokens.shape[1], batch.patches.shape[1], *batch.pooled.shape[1:]
