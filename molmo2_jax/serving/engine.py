"""Answers for many clients at once: requests join and leave a fixed number of decode rows at any time.

A thread of the engine's own alternates between two things: it prefills waiting requests into free rows, and
advances all busy rows by a few tokens. Between two such steps requests leave: answered, cancelled or out of
time. What a row computes does not depend on the other rows.

    engine = Engine(answerer, num_rows=8)
    for _ in engine.compile(): pass
    ticket = engine.submit(tickets.Request(turns=("What is this?",)), tell=print)
"""

import collections
import concurrent.futures
import dataclasses
import os
import queue as queue_lib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import stops
from molmo2_jax.inputs import writer as writer_lib
from molmo2_jax.serving import buckets as buckets_lib
from molmo2_jax.serving import compilations
from molmo2_jax.serving import roots as roots_lib
from molmo2_jax.serving import rows as programs_lib
from molmo2_jax.serving import tickets as tickets_lib


@dataclasses.dataclass
class Totals:
    """Counts since the start, for metrics."""
    answered: int = 0
    cancelled: int = 0
    late: int = 0
    failed: int = 0
    refused: int = 0            # because the queue was full
    prompt_tokens: int = 0      # of prefilled prompts, those of roots that were reused included
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0              # calls of `advance`
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Compiled(NamedTuple):
    """One bucket that was compiled."""
    name: str
    seconds: float
    size: int             # bytes of temporary memory of its programs on one device


class Engine:
    """An Answerer for many clients; see the module.

    most_tokens: of prompt and answer together; at most, and by default, the positions of the model.
    cache_bytes: of roots kept for later questions.
    every: tokens between two looks at the queue, and between pieces of a stream.
    queue: requests that may wait; more are refused.
    crops: numbers of crops of the buckets, see buckets.of_model.

    Raises:
      ValueError: a number is not positive, or several processes take part.
    """

    def __init__(self, answerer: generate.Answerer, *, num_rows: int = 8, most_tokens: int | None = None,
                 cache_bytes: int = 1 << 30, every: int = 8, queue: int = 64, crops: Sequence[int] = ()):
        positions = answerer.config.text.max_positions
        most_tokens = min(most_tokens or positions, positions)
        if min(num_rows, most_tokens, every, queue) < 1 or cache_bytes < 0:
            raise ValueError("rows, tokens, every and queue must be >= 1 and the cache >= 0 bytes; got "
                             f"{(num_rows, most_tokens, every, queue, cache_bytes)}")
        if jax.process_count() > 1:
            raise ValueError(f"one process must hold all devices of an engine; got {jax.process_count()}")
        mesh = answerer.mesh
        groups = mesh.shape["data"] * mesh.shape["fsdp"]
        parts = mesh.shape["tensor"] * mesh.shape["context"]
        self.answerer, self.most_tokens = answerer, most_tokens
        self.num_rows = -(-num_rows // groups) * groups
        step = 4 if jax.default_backend() == "cpu" else 2   # compiling unrolled layers takes long
        self.roots, self.totals = roots_lib.Roots(cache_bytes), Totals()
        self._buckets = buckets_lib.of_model(answerer.config, answerer.inputs, answerer.tokenizer,
                                             most_tokens=most_tokens, counts=crops, parts=parts, step=step)
        places = max([most_tokens, *(shape.T for shape in self._buckets)]) + programs_lib.CHUNK
        self._programs = programs_lib.Programs(
            answerer.model, answerer.params, mesh, answerer.tokenizer.eos_id, num_rows=self.num_rows,
            num_places=-(-places // 128) * 128, every=every, step=step, dtype=answerer.cache_dtype,
            most=types.RowShape(*map(max, zip(*self._buckets))))
        self._queue = queue
        self._waiting: collections.deque[tickets_lib.Ticket] = collections.deque()
        self._busy: dict[int, tickets_lib.Busy] = {}
        self._wake = threading.Condition()
        self._is_open = self._is_closed = False
        self._compiled_before = 0
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # Starting and stopping

    def compile(self) -> Iterator[Compiled]:
        """Compiles all programs, yielding each bucket as it is done, and then takes requests, unless it was
        closed meanwhile."""
        programs, empty = self._programs, sequences.root(sequences.NO_CROPS, self.answerer.tokenizer)
        jobs: dict[str, Callable] = {"a row that is left": programs.compile_free}
        for shape in self._buckets:
            batch = rows_lib.join([empty], shape, self.answerer.config.vision.patch_shape)
            jobs[f"media of up to {shape.M} crops, {shape.T} tokens, {shape.W} patches each"] = (
                lambda batch=batch: programs.compile_see(batch))
        for size in programs.sizes:
            jobs[f"text within {size} places"] = lambda size=size: programs.compile_size(size)

        def run(name: str) -> Compiled:
            start = time.monotonic()
            done = [] if self._is_closed else jobs[name]()
            sizes = [one.memory_analysis() for one in done]
            return Compiled(name, time.monotonic() - start,
                            sum(size.temp_size_in_bytes for size in sizes if size is not None))

        compilations.count()
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for done in concurrent.futures.as_completed([pool.submit(run, name) for name in jobs]):
                yield done.result()
        self._compiled_before = compilations.count()
        if not self._is_closed:
            self._is_open = True
            self._thread.start()

    @property
    def num_programs(self) -> int:
        """How many buckets `compile` yields."""
        return 1 + len(self._buckets) + len(self._programs.sizes)

    @property
    def compilations(self) -> int:
        """How many programs were compiled since requests are taken; 0, unless something is wrong."""
        return compilations.count() - self._compiled_before if self._thread.ident else 0

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def num_waiting(self) -> int:
        with self._wake:
            return sum(not ticket.is_cancelled for ticket in self._waiting)

    @property
    def num_busy(self) -> int:
        return len(self._busy)

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, and ends when those it has are answered, or after `seconds`."""
        with self._wake:
            self._is_open, self._is_closed = False, True
            self._wake.notify()
        if self._thread.ident is None:
            return
        self._thread.join(seconds)
        for ticket in [*self._waiting, *(busy.ticket for busy in [*self._busy.values()])]:
            ticket.cancel()
        self._thread.join()

    # Requests

    def submit(self, request: tickets_lib.Request, tell: tickets_lib.Tell) -> tickets_lib.Ticket:
        """Returns the ticket of a request, which now waits; `tell` hears of its progress.

        Raises:
          tickets.Full, tickets.Closed, tickets.NotSeen: as these say.
          tickets.TooLong: prompt and answer do not fit. buckets.TooLarge: the media do not.
          ValueError: the number of turns is even, an answer among them or a stop string is empty, or an
            answer chose what the media do not have.
        """
        if not self._is_open:
            raise tickets_lib.Closed("requests are not taken now")
        if self.num_waiting >= self._queue:
            self.totals.refused += 1
            raise tickets_lib.Full(f"at most {self._queue} requests may wait")
        stops.check(request.stop)
        if len(request.turns) % 2 == 0:
            raise ValueError(f"a question must have an odd number of turns; got {len(request.turns)}")
        has_pointer = self.answerer.config.pointer is not None
        ids, choices = sequences.ids_of_text(request.turns, self.answerer.tokenizer, has_pointer)
        held = None if request.key is None else self.roots.hold(request.key)
        try:
            ticket = self._ticket(request, tell, held, ids, choices)
            with self._wake:
                if not self._is_open:
                    raise tickets_lib.Closed("requests are not taken now")
                self._waiting.append(ticket)
                self._wake.notify()
        except BaseException:
            if held is not None:
                self.roots.let_go(request.key)
            raise
        return ticket

    def _ticket(self, request: tickets_lib.Request, tell: tickets_lib.Tell, held: roots_lib.Root | None,
                ids: list[int], choices: list[int]) -> tickets_lib.Ticket:
        """Returns a ticket for a request whose root is `held` in the store, comes along, or is BOS alone."""
        root = None
        if held is None and request.key is not None and request.crops is None:
            raise tickets_lib.NotSeen("this root is not in the store")
        if held is None and request.crops is not None:
            root = sequences.root(request.crops, self.answerer.tokenizer)
        media, length, visual = request.media, 1, 0
        if held is not None:
            media, length, visual = held.media, held.length, held.visual
        elif root is not None:
            length, visual = len(root.tokens), len(root.pooled)
        wanted = self.answerer.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        room = self.most_tokens - length - len(ids)
        if wanted < 1:
            raise ValueError(f"max_new_tokens must be >= 1; got {wanted}")
        if room < 1:
            raise tickets_lib.TooLong(
                f"prompt and answer must fit {self.most_tokens} tokens; got {length} for the visual input "
                f"and {len(ids)} for the conversation")
        if root is not None:
            buckets_lib.choose(self._buckets, root)
        fed = grounded.fed(choices, media.cells) if self.answerer.config.pointer is not None else []
        return tickets_lib.Ticket(request, tell, media, (length, visual), ids, fed, min(room, wanted), root,
                                  held is not None)

    def stream(self, request: tickets_lib.Request) -> Iterator[tickets_lib.Event]:
        """Yields the events of a request; if the caller stops iterating, the request is cancelled.

        Raises:
          Exception: as `submit`, or what ended the request.
        """
        events: queue_lib.SimpleQueue[tickets_lib.Event | Exception] = queue_lib.SimpleQueue()
        ticket = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.answer is not None:
                    return
        finally:
            ticket.cancel()

    def answer(self, request: tickets_lib.Request) -> generate.Answer:
        """Returns the answer to a request, as `stream` does."""
        return [*self.stream(request)][-1].answer

    # The engine's thread

    def _work(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._waiting or self._busy):
                        if not self._is_open:
                            return
                        self._wake.wait()
                self._leave()
                self._admit()
                if self._busy:
                    self._advance()
        except BaseException as error:  # noqa: BLE001, told to everybody; the rows are lost
            self._is_open, self.failure = False, error
            for ticket in [*self._waiting, *(busy.ticket for busy in self._busy.values())]:
                self._finish(ticket, RuntimeError(f"the engine failed: {error}"))
            self._waiting.clear()
            self._busy.clear()
            raise

    def _leave(self) -> None:
        """Ends the requests that are cancelled or late."""
        for row, busy in [*self._busy.items()]:
            if busy.ticket.is_cancelled or busy.ticket.is_late:
                self._programs.free(row)
                del self._busy[row]
                self._finish(busy.ticket, busy.ticket.end())
        with self._wake:
            gone = [ticket for ticket in self._waiting if ticket.is_cancelled or ticket.is_late]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._finish(ticket, ticket.end())

    def _finish(self, ticket: tickets_lib.Ticket, event: tickets_lib.Event | Exception) -> None:
        if isinstance(event, tickets_lib.Event):
            self.totals.answered += 1
        elif isinstance(event, tickets_lib.Cancelled):
            self.totals.cancelled += 1
        elif isinstance(event, tickets_lib.OutOfTime):
            self.totals.late += 1
        else:
            self.totals.failed += 1
        self._let_go(ticket)
        ticket.tell(event)

    def _let_go(self, ticket: tickets_lib.Ticket) -> None:
        if ticket.is_holding:
            ticket.is_holding = False
            self.roots.let_go(ticket.request.key)

    def _admit(self) -> None:
        """Prefills waiting requests into free rows; of media, only one while answers are being written."""
        has_seen = False
        while self._waiting and len(self._busy) < self.num_rows:
            ticket = self._waiting[0]
            is_new = ticket.root is not None and self.roots.find(ticket.request.key) is None
            if is_new and has_seen and self._busy:
                return
            has_seen |= is_new
            row = next(row for row in range(self.num_rows) if row not in self._busy)
            start = time.monotonic()
            try:
                news = self._prefill(ticket, row)
            except roots_lib.OutOfMemory as error:
                news = error
            with self._wake:
                self._waiting.popleft()
            if isinstance(news, Exception):
                self._finish(ticket, news)
                continue
            self.totals.prefill_seconds += time.monotonic() - start
            writer = writer_lib.Writer(self.answerer.tokenizer, ticket.request.stop)
            self._busy[row] = tickets_lib.Busy(ticket, writer, start)
            self._hear(row, news, 0)

    def _prefill(self, ticket: tickets_lib.Ticket, row: int) -> programs_lib.News:
        """Returns the first token of an answer, whose prompt is then in the row."""
        request, found = ticket.request, self.roots.find(ticket.request.key)
        if found is not None:
            ticket.cached_tokens = found.length
        elif ticket.root is not None:
            found = self._see(ticket)
        self.totals.prompt_tokens += ticket.prompt_tokens
        self.totals.cached_tokens += ticket.cached_tokens
        how = request.sampling
        ask = programs_lib.Ask(ticket.limit, how.temperature, how.top_k, how.top_p, how.seed)
        if found is None:
            news = self._programs.prefill(None, 0, 0, [self.answerer.tokenizer.bos_id, *ticket.ids], row, ask)
        else:
            news = self._programs.prefill(found.cache, found.places, found.length, ticket.ids, row, ask,
                                          ticket.fed)
        self._let_go(ticket)
        return news

    def _see(self, ticket: tickets_lib.Ticket) -> roots_lib.Root:
        """Returns the root of a ticket's media, which is kept for later questions if there is room."""
        root, shape = ticket.root, buckets_lib.choose(self._buckets, ticket.root)
        batch = rows_lib.join([root], shape, self.answerer.config.vision.patch_shape)
        cache = roots_lib.within_memory(self._programs.see, batch)
        found = roots_lib.Root(cache, len(root.tokens), shape.T, len(root.pooled), ticket.media)
        if ticket.request.key is not None:
            self.roots.keep(ticket.request.key, found)
        ticket.root = None
        return found

    def _advance(self) -> None:
        start = time.monotonic()
        news = self._programs.advance(max(busy.place for busy in self._busy.values()))
        self.totals.decode_seconds += time.monotonic() - start
        self.totals.steps += 1
        for row in [*self._busy]:
            self._hear(row, news, row)

    def _hear(self, row: int, news: programs_lib.News, index: int) -> None:
        """Tells the client of a row what is new, and frees the row after the last of it."""
        busy, is_over = self._busy[row], bool(news.is_over[index])
        before = len(busy.ids)
        choices = None if news.choices is None else news.choices[index]
        event = busy.take(news.tokens[index], news.logprobs[index], is_over, bool(news.ended[index]), choices)
        self.totals.new_tokens += len(busy.ids) - before
        if isinstance(event, tickets_lib.Event) and event.answer is None:
            if event.text:
                busy.ticket.tell(event)
            return
        if not is_over:
            self._programs.free(row)
        del self._busy[row]
        self._finish(busy.ticket, event)
