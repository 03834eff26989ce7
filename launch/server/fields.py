"""The body of POST /v1/chat/completions: which fields there are, what they may be, and which are ignored.

Fields that would change the answer and are not supported are refused; all others are ignored and reported.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from launch.server import errors
from molmo2_jax import decode

MAX_COMPLETION_TOKENS = 2048   # where a request names no number
MOST_STOPS = 4
_IGNORED_SHOWN = 32

_KNOWN = frozenset("""
    model messages max_tokens max_completion_tokens temperature top_p top_k seed stop n stream stream_options
    user metadata store response_format frequency_penalty presence_penalty tools tool_choice logprobs
    top_logprobs logit_bias modalities audio functions function_call media_io_kwargs mm_processor_kwargs
    frames_as_video parallel_tool_calls""".split())
# How frames of a video are chosen; see launch/server/media.py.
VIDEO_OPTIONS = ("num_frames", "fps", "frame_sample_mode", "max_fps", "sampling_fps", "start", "end")
_ALIASES = {"nframes": "num_frames"}   # VLMEvalKit
_TIME = re.compile(r"\s*<(\d+(?:\.\d+)?) seconds?>\s*")


@dataclasses.dataclass(frozen=True)
class Part:
    """A picture or video in a message: its kind, its URL, where it stands, and what it says of sampling."""
    kind: str                  # "image" or "video"
    url: str
    where: str
    options: dict[str, Any]
    seconds: float | None = None   # of a picture that is a frame


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request asks for."""
    turns: tuple[str, ...]
    parts: tuple[Part, ...]
    frames_fps: float | None       # of pictures that are frames of a video
    sampling: decode.Sampling | None   # None: greedy
    has_seed: bool
    stop: tuple[str, ...]
    max_new_tokens: int
    is_stream: bool
    has_usage: bool                # include_usage of a stream
    ignored: tuple[str, ...]


class _Ignored:
    """Collects names of fields that nobody reads, each once."""

    def __init__(self):
        self.names: dict[str, None] = {}

    def add(self, keys: Iterable, known: Iterable[str], prefix: str = "") -> None:
        for key in keys:
            if key not in known and len(self.names) < _IGNORED_SHOWN:
                self.names[re.sub(r"[^\w.-]", "_", f"{prefix}{key}", flags=re.ASCII)[:80]] = None


def read(body: Any, model: str) -> Wanted:
    """Returns what the body of a request asks for.

    Args:
      model: the one that is served.

    Raises:
      errors.Refused: a field is missing, has a value that it may not have, or is not supported.
    """
    if not isinstance(body, dict):
        raise errors.bad("the body must be a JSON object")
    named = body.get("model")
    if not isinstance(named, str):
        raise errors.bad(f"model must be given; this server has {model!r}", "model")
    if named != model:
        raise errors.Refused(404, f"the model {named[:100]!r} does not exist; this server has {model!r}",
                             "model", "model_not_found")
    ignored = _Ignored()
    ignored.add(body, _KNOWN)
    _refuse_unsupported(body)
    sampling = decode.Sampling(temperature=_number(body, "temperature", 0.0, 0, 100),
                               top_p=_number(body, "top_p", 1.0, 0, 1, is_open=True),
                               top_k=_top_k(body), seed=_seed(body))
    turns, parts = _conversation(body.get("messages"), _shared_options(body, ignored), ignored)
    stream_options = _object(body, "stream_options")
    ignored.add(stream_options, ("include_usage",), "stream_options.")
    frames = _object(body, "frames_as_video")
    ignored.add(frames, ("fps",), "frames_as_video.")
    return Wanted(
        turns=turns, parts=parts, sampling=sampling if sampling.temperature > 0 else None,
        frames_fps=_number(frames, "fps", 2.0, 0, 1000, "frames_as_video.", is_open=True)
        if body.get("frames_as_video") is not None else None,
        has_seed=body.get("seed") is not None, stop=_stop(body), max_new_tokens=_max_tokens(body),
        is_stream=_flag(body, "stream"), has_usage=_flag(stream_options, "include_usage", "stream_options."),
        ignored=tuple(ignored.names))


def _refuse_unsupported(body: dict) -> None:
    for name, plain in (("n", (None, 1)), ("logprobs", (None, False)), ("top_logprobs", (None, 0)),
                        ("frequency_penalty", (None, 0)), ("presence_penalty", (None, 0)),
                        ("tools", (None, [])), ("functions", (None, [])), ("logit_bias", (None, {})),
                        ("audio", (None,)), ("modalities", (None, ["text"])),
                        ("tool_choice", (None, "none", "auto")), ("function_call", (None, "none", "auto"))):
        value = body.get(name)
        if value not in plain or (isinstance(value, bool) and name == "n"):
            raise errors.bad(f"{name} is not supported; got {_shown(value)}", name)
    form = body.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise errors.bad("response_format must be {'type': 'text'}; others are not supported",
                         "response_format")


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _object(body: dict, name: str, prefix: str = "") -> dict:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise errors.bad(f"{prefix}{name} must be an object; got {_shown(value)}", prefix + name)
    return value or {}


def _flag(body: dict, name: str, prefix: str = "") -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise errors.bad(f"{prefix}{name} must be true or false; got {_shown(value)}", prefix + name)
    return bool(value)


def _number(body: dict, name: str, default: float, least: float, most: float, prefix: str = "",
            is_open: bool = False) -> float:
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (is_open and value == least):
        edge = "(" if is_open else "["
        raise errors.bad(f"{prefix}{name} must be a number in {edge}{least:g}, {most:g}]; got "
                         f"{_shown(value)}", prefix + name)
    return float(value)


def _whole(value, name: str, least: int, param: str | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise errors.bad(f"{name} must be a whole number >= {least}; got {_shown(value)}", param or name)
    return value


def _top_k(body: dict) -> int:
    value = body.get("top_k")
    if value is None or value == -1:   # vLLM's word for all tokens
        return 0
    return min(_whole(value, "top_k", 0), 2**31 - 1)


def _seed(body: dict) -> int:
    value = body.get("seed")
    return 0 if value is None else _whole(value, "seed", -2**63) & (2**31 - 1)


def _max_tokens(body: dict) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return min(_whole(body[name], name, 1), 2**31 - 1)
    return MAX_COMPLETION_TOKENS


def _stop(body: dict) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not (isinstance(stops, list) and len(stops) <= MOST_STOPS
            and all(isinstance(one, str) and 0 < len(one) <= 1000 for one in stops)):
        raise errors.bad(f"stop must be a text, or up to {MOST_STOPS} of them, of 1 to 1000 characters; got "
                         f"{_shown(value)}", "stop")
    return tuple(stops)


def _options(given: dict, known: Iterable[str], prefix: str, ignored: _Ignored) -> dict[str, Any]:
    """Returns the options of sampling among fields that are not `known`, by their names here."""
    found = {_ALIASES.get(key, key): value for key, value in given.items()
             if _ALIASES.get(key, key) in VIDEO_OPTIONS and value is not None}
    ignored.add(given, {*known, *VIDEO_OPTIONS, *_ALIASES}, prefix)
    return found


def _shared_options(body: dict, ignored: _Ignored) -> dict[str, Any]:
    """Returns the options for all videos of a request: media_io_kwargs before mm_processor_kwargs."""
    media = _object(body, "media_io_kwargs")
    ignored.add(media, ("video",), "media_io_kwargs.")
    kinds = (_object(body, "mm_processor_kwargs"), "mm_processor_kwargs."), (
        _object(media, "video", "media_io_kwargs."), "media_io_kwargs.video.")
    found: dict[str, Any] = {}
    for given, prefix in kinds:
        found |= _options(given, (), prefix, ignored)
    return found


def _conversation(messages, shared: dict[str, Any], ignored: _Ignored
                  ) -> tuple[tuple[str, ...], tuple[Part, ...]]:
    """Returns (texts of the turns, the media of all turns in order)."""
    if not isinstance(messages, list) or not messages:
        raise errors.bad("messages must be a list of at least one message", "messages")
    system, turns, parts = [], [], []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        if not isinstance(message, dict):
            raise errors.bad(f"{where} must be an object", where)
        ignored.add(message, ("role", "content", "name", "refusal", "tool_calls", "audio"), "messages.")
        role = message.get("role")
        text, found = _content(message.get("content"), f"{where}.content", shared, ignored)
        if role in ("system", "developer"):
            if turns or found:
                raise errors.bad(f"{where}: a system message must be text, before all others",
                                 f"{where}.role")
            system.append(text)
            continue
        if role != ("user", "assistant")[len(turns) % 2]:
            raise errors.bad(f"{where}.role must be 'user', 'assistant', 'user' ... after system messages; "
                             f"got {_shown(role)}", f"{where}.role")
        if role == "assistant" and (found or not text):
            raise errors.bad(f"{where}: an assistant's message must be text, and not empty",
                             f"{where}.content")
        turns.append(text)
        parts += found
    if len(turns) % 2 == 0:
        raise errors.bad("the last message must be a user's", "messages")
    if not (turns[-1].strip() or parts):
        raise errors.bad("the last message must have a text", "messages")
    turns[0] = "\n".join([*system, turns[0]])
    return tuple(turns), tuple(parts)


def _content(content, where: str, shared: dict[str, Any], ignored: _Ignored) -> tuple[str, list[Part]]:
    """Returns (text, media) of a message."""
    if isinstance(content, str):
        return content, []
    if content is None:
        return "", []
    if not isinstance(content, list):
        raise errors.bad(f"{where} must be a text or a list of parts; got {_shown(content)}", where)
    pieces: list[str | Part] = []
    for number, part in enumerate(content):
        pieces.append(_part(part, f"{where}.{number}", shared, ignored))
    return _frames(pieces)


def _part(part, where: str, shared: dict[str, Any], ignored: _Ignored) -> str | Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text"):
        ignored.add(part, ("type", "text"), "messages.content.")
        if not isinstance(part.get("text"), str):
            raise errors.bad(f"{where}.text must be a text", where)
        return part["text"]
    if kind not in ("image_url", "input_image", "video_url", "input_video", "video"):
        raise errors.bad(f"{where}.type must be text, image_url or video_url; got {_shown(kind)}",
                         f"{where}.type")
    medium = "image" if "image" in kind else "video"
    name = next((name for name in (kind, f"{medium}_url", medium, "url") if part.get(name) is not None), kind)
    value = part.get(name)
    inner = value if isinstance(value, dict) else {"url": value}
    if not isinstance(inner.get("url"), str):
        raise errors.bad(f"{where}.{name} must be a URL, or an object with one", f"{where}.{name}")
    known = ("type", "url", "detail", name)
    options = dict(shared)
    for given, prefix in ((part, "messages.content."), (inner, f"messages.content.{name}.")):
        options |= _options(given, known, prefix, ignored)
    return Part(medium, inner["url"], where, options)


def _frames(pieces: list[str | Part]) -> tuple[str, list[Part]]:
    """Returns (text, media), where pictures after times such as `<1.5 seconds>` are frames with that time.

    There must be at least two of them in a row; otherwise the times are text.
    """
    runs: list[tuple[int, int]] = []   # (first piece, number of pairs)
    for place, (first, second) in enumerate(zip(pieces, pieces[1:])):
        if (isinstance(first, str) and _TIME.fullmatch(first)
                and isinstance(second, Part) and second.kind == "image"):
            if runs and runs[-1][0] + 2 * runs[-1][1] == place:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((place, 1))
    places = [start + 2 * pair for start, count in runs if count > 1 for pair in range(count)]
    times = {place: float(_TIME.fullmatch(str(pieces[place]))[1]) for place in places}
    texts, parts = [], []
    for place, piece in enumerate(pieces):
        if isinstance(piece, Part):
            parts.append(dataclasses.replace(piece, seconds=times.get(place - 1)))
        elif place not in times:
            texts.append(piece)
    return "".join(texts), parts
