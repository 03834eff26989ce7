"""What is answered: chat completions, whole or in pieces, and the model's card."""

import json
import time
from typing import Any

from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import points as points_lib
from molmo2_jax.serving import tickets as tickets_lib

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"    # a comment; keeps proxies from closing a connection without traffic


def event(value: Any) -> bytes:
    """Returns a server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def usage(ticket: tickets_lib.Ticket, answer: generate.Answer) -> dict:
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens,
            "total_tokens": answer.prompt_tokens + answer.new_tokens,
            "prompt_tokens_details": {"cached_tokens": ticket.cached_tokens,
                                      "image_tokens": ticket.image_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0}}


def reason(answer: generate.Answer) -> str:
    return "stop" if answer.is_complete else "length"


def points(text: str, media: types.Media, *, is_partial: bool = False) -> list[dict]:
    """Returns the points in a text, or in the beginning of one, with the labels of their tags, in pixels."""
    if not media.sizes:
        return []
    if media.cells is not None:
        found = grounded.parse_labelled(text, media.cells, media, is_partial=is_partial)
    else:
        size = dict(zip(("width", "height"), media.sizes[0])) if media.is_video else {"sizes": media.sizes}
        found = points_lib.parse_labelled(text, **size, accept_unterminated=is_partial)
    name, number = ("frame_time", float) if media.is_video else ("image", int)
    return [{"id": point.id, "label": label, name: number(point.index), "x": point.x, "y": point.y}
            for label, point in found]


def places(answer: generate.Answer, media: types.Media) -> dict:
    """Returns the points of an answer, and what of the media the model saw."""
    return {"points": points(answer.text, media),
            "frames_used": len(media.seconds) if media.is_video else len(media.sizes),
            "times": media.seconds.tolist() if media.is_video else [],
            "sizes": [list(size) for size in media.sizes]}


class Completion:
    """The replies to one request."""

    def __init__(self, name: str, model: str, ticket: tickets_lib.Ticket):
        self._ticket, self.name = ticket, name
        self._text, self._num_points = "", 0
        self._common = {"id": name, "created": int(time.time()), "model": model}

    def whole(self, answer: generate.Answer) -> dict:
        """Returns a `chat.completion`."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason(answer), "logprobs": None}
        return {**self._common, "object": "chat.completion", "choices": [choice],
                "usage": usage(self._ticket, answer), "molmo2": places(answer, self._ticket.media)}

    def _chunk(self, delta: dict, why: str | None = None, molmo2: dict | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": why, "logprobs": None}
        return event({**self._common, "object": "chat.completion.chunk", "choices": [choice],
                      **({"molmo2": molmo2} if molmo2 else {})})

    def first(self) -> bytes:
        """Returns the chunk with the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        """Returns the chunk with a new text, and all points of the answer so far if there are new ones."""
        self._text += text
        found = points(self._text, self._ticket.media, is_partial=True) if "coords" in self._text else []
        is_new = len(found) > self._num_points   # a tag that is being closed is read again when it is closed
        self._num_points = max(self._num_points, len(found))
        return self._chunk({"content": text}, molmo2={"points": found} if is_new else None)

    def last(self, answer: generate.Answer, has_usage: bool) -> bytes:
        """Returns the chunk with the reason, one with the usage if that was asked for, and the end."""
        end = self._chunk({}, reason(answer), molmo2=places(answer, self._ticket.media))
        if has_usage:
            end += event({**self._common, "object": "chat.completion.chunk", "choices": [],
                          "usage": usage(self._ticket, answer)})
        return end + DONE


def card(model: str, created: int, most_tokens: int) -> dict:
    """Returns the model as /v1/models lists it."""
    return {"id": model, "object": "model", "created": created, "owned_by": "molmo2_jax", "root": model,
            "max_model_len": most_tokens}
