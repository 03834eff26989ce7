"""Requests to an engine, and what becomes of them."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from molmo2_jax import decode
from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.inputs import writer as writer_lib
from molmo2_jax.serving import rows as rows_lib


class Full(Exception):
    """The queue is full."""


class Closed(Exception):
    """The engine does not take requests: it is not started, stopping, or failed."""


class Cancelled(Exception):
    """The client gave the request up."""


class OutOfTime(Exception):
    """A request was not answered within its time."""


class NotSeen(Exception):
    """A request names a root by its key alone, and the root is not here."""


class TooLong(ValueError):
    """Prompt and answer do not fit a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A conversation whose next turn is wanted. Special tokens in its texts stay text.

    crops, media: as Answerer.see returns them. With a key, crops may be None if the root is in the store.
    key: hash of what the crops were made from; None: the root is not kept.
    max_new_tokens: at most; cut to what fits the row. None: the answerer's.
    seconds: time limit, from `submit` on.
    """
    turns: tuple[str, ...]
    crops: types.Crops | None = None
    media: types.Media = types.Media()
    key: str | None = None
    max_new_tokens: int | None = None
    sampling: decode.Sampling = decode.GREEDY
    stop: tuple[str, ...] = ()
    seconds: float = math.inf


class Event(NamedTuple):
    """New text of an answer; the last event has the whole Answer."""
    text: str
    answer: generate.Answer | None = None


# Called with each Event, or once with an Exception, in the engine's thread; must return at once.
Tell = Callable[[Event | Exception], None]


class Ticket:
    """A submitted request.

    media: what the answer's points refer to. prompt_tokens, image_tokens: of the prompt, and of these visual
    ones. cached_tokens: those that were not computed again; known with the first event. fed: what the tokens
    `ids` chose, see rows.Programs.prefill.
    """

    def __init__(self, request: Request, tell: Tell, media: types.Media, sizes: tuple[int, int],
                 ids: list[int], fed: list[tuple[int, int]], limit: int, root: types.Sequence | None,
                 is_holding: bool):
        length, visual = sizes
        self.request = dataclasses.replace(request, crops=None)   # `root` has them until they are computed
        self.media, self.ids, self.fed, self.limit = media, ids, fed, limit
        self.prompt_tokens, self.image_tokens, self.cached_tokens = length + len(ids), visual, 0
        self.root, self.is_holding, self.is_cancelled = root, is_holding, False
        self.submitted = time.monotonic()
        self._tell = tell

    def cancel(self) -> None:
        """Gives up the answer; its row is free after the current step."""
        self.is_cancelled = True

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.submitted > self.request.seconds

    def end(self) -> Exception:
        """Returns why a request that is cancelled or late has no answer."""
        if self.is_cancelled:
            return Cancelled("the request was cancelled")
        return OutOfTime(f"an answer must be complete within {self.request.seconds:g} seconds")

    def tell(self, event: Event | Exception) -> None:
        try:
            self._tell(event)
        except Exception:  # noqa: BLE001, whoever asked is gone, the others are not
            self.cancel()


class Busy:
    """A row with a ticket."""

    def __init__(self, ticket: Ticket, writer: writer_lib.Writer, began: float):
        self.ticket, self.ids, self.choices, self.logprob = ticket, [], [], 0.0
        self._writer, self._began = writer, began

    @property
    def place(self) -> int:
        """Of the newest token."""
        return self.ticket.prompt_tokens + len(self.ids) - 1

    def take(self, tokens, logprobs, is_over: bool, ended: bool, choices=None) -> Event | Exception:
        """Returns what new tokens amount to; an Event with an Answer, or an exception, is the last one."""
        chosen = None if choices is None else self.choices
        for place, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
            if token == rows_lib.NOTHING:
                break
            self.ids.append(token)
            self.logprob += logprob
            if chosen is not None:
                chosen.append(int(choices[place]))
            if self._writer.read(self.ids, chosen):
                is_over = ended = True
                break
        if not math.isfinite(self.logprob):
            return generate.NotFinite("logits must be finite; got NaN or infinity")
        text = self._writer.write(self.ids, is_over, chosen)
        if not is_over:
            return Event(text)
        waited = self._began - self.ticket.submitted
        return Event(text, generate.read_answer(
            self._writer.text, self.ticket.media, is_complete=ended, new_tokens=len(self.ids),
            prompt_tokens=self.ticket.prompt_tokens, logprob=self.logprob,
            seconds={"wait": waited, "answer": time.monotonic() - self._began}))
