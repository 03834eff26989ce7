"""What training would make of one record: whether it can be used, its size, and what reading it costs.

T tokens, M crops, R visual tokens: the budgets of a row.
"""

import dataclasses
import time

import numpy as np

from data_pipelines import annotations
from data_pipelines import formats
from data_pipelines import tasks
from data_pipelines.stream import ledger
from data_pipelines.stream import preparation
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.inputs import video_file

NOT_SHOWN = "not shown"  # a problem that leaves out an annotation, not the record
_REFUSALS = (ValueError, OSError, EOFError, MemoryError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How records are read. shape: of a row of training; None: records of any size fit.

    has_media: whether media are opened at all.
    """
    model: config.Molmo2Config
    inputs: config.InputConfig
    tokenizer: tokenizers.Tokenizer
    asking: formats.Asking = formats.Asking()
    shape: types.RowShape | None = None
    has_media: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Something about a record that training could not use.

    stage: a reason of the ledger if the whole record is left out, else NOT_SHOWN.
    message: begins with file and line.
    """
    stage: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film:
    """The video of a record. keyframe_seconds: mean time between keyframes."""
    duration: float          # seconds, of the whole file
    fps: float
    keyframe_seconds: float
    num_frames: int          # that the model sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What the examination of a record found; the sizes are 0 where it did not get that far.

    amounts: (kind, amount) of each annotation; KIND_UNITS names the unit.
    tokens, crops, visual_tokens: of the whole sequence, before it is cut to a row.
    read_seconds, compose_seconds: CPU time of reading media, and of making the sequence.
    """
    key: str = ""
    problems: tuple[Problem, ...] = ()
    medium: str = ""                         # "video", "images" or "text"
    amounts: tuple[tuple[str, int], ...] = ()
    film: Film | None = None
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) in pixels
    tokens: int = 0
    crops: int = 0
    visual_tokens: int = 0
    is_cut: bool = False
    read_seconds: float = 0.0
    compose_seconds: float = 0.0

    @property
    def reason(self) -> str:
        """Why training leaves the record out, one of the ledger's; "" if it is used."""
        return next((one.stage for one in self.problems if one.stage != NOT_SHOWN), "")


KIND_UNITS = {"points": "points", "tracks": "objects", "count": "counted objects", "qa": "characters",
              "chat": "turns", "choice": "options", "caption": "characters"}


def amount(annotation: annotations.Annotation) -> int:
    """Returns how much an annotation holds, in the unit of its kind."""
    match annotation:
        case annotations.Points():
            return len(annotation.points)
        case annotations.Tracks():
            return len(annotation.tracks)
        case annotations.Count():
            return annotation.count
        case annotations.Chat():
            return len(annotation.turns)
        case annotations.Choice():
            return len(annotation.options)
        case annotations.QA():
            return len(annotation.answer)
        case annotations.Caption():
            return len(annotation.text if isinstance(annotation.text, str) else annotation.text[0])
    raise ValueError(f"an annotation must be of a known kind; got {type(annotation).__name__}")


def examine(record: types.Example | ValueError, settings: Settings, member: tasks.Member,
            number: int = 0) -> Finding:
    """Returns what training would make of a record: `number` in its data set, used as `member` says."""
    if isinstance(record, ValueError):
        return Finding(problems=(Problem(stage=ledger.LINE, message=str(record)),))
    medium = "video" if record.video is not None else "images" if record.images else "text"
    found = Finding(key=record.key, medium=medium,
                    amounts=tuple((one.type, amount(one)) for one in record.annotations))
    if not settings.has_media:
        return found
    rng, start = preparation.generator(number, 0), time.process_time()
    try:
        crops, media = media_lib.see(record, settings.model, settings.inputs, settings.tokenizer, rng=rng,
                                     high_res=member.high_res_share)
        read_seconds = time.process_time() - start
        film = _film(record, media, settings.inputs.max_read_seconds)
    except _REFUSALS as error:
        return _with(found, ledger.MEDIA, error)
    found = dataclasses.replace(found, film=film, sizes=media.sizes, read_seconds=read_seconds)
    try:
        formatted = formats.format_example(record, media=media, rng=np.random.default_rng(0),
                                           asking=formats.PLAIN)
    except _REFUSALS as error:
        return _with(found, ledger.ANNOTATION, error)
    for place in formatted.dropped:
        found = _with(found, NOT_SHOWN, ValueError(
            f"annotations[{place}]: must have a point at a time that is shown; got none"))
    return _sized(found, record, crops, media, settings, member, rng)


def _sized(found: Finding, record: types.Example, crops, media, settings: Settings, member: tasks.Member,
           rng: np.random.Generator) -> Finding:
    """Returns the finding with the sizes of the sequence, and whether and how it fits a row."""
    def compose(max_tokens: int | None) -> types.Sequence:
        return preparation.compose(record, crops, media, settings.tokenizer, rng, asking=settings.asking,
                                   max_tokens=max_tokens, point_modes=member.point_modes)

    state, start = rng.bit_generator.state, time.process_time()
    try:
        whole = compose(None)
        found = dataclasses.replace(found, compose_seconds=time.process_time() - start,
                                    tokens=len(whole.tokens), crops=len(whole.patches),
                                    visual_tokens=len(whole.pooled))
        if settings.shape is None:
            return found
        if found.tokens > settings.shape.T:
            rng.bit_generator.state = state
            compose(settings.shape.T)
    except preparation.Refused as error:
        return _with(found, error.reason, error)
    for what, used, limit in (("crops", found.crops, settings.shape.M),
                              ("visual tokens", found.visual_tokens, settings.shape.R)):
        if used > limit:
            return _with(found, ledger.SIZE, ValueError(f"must fit a row of {limit} {what}; got {used}"))
    return dataclasses.replace(found, is_cut=found.tokens > settings.shape.T)


def _with(found: Finding, stage: str, error: Exception) -> Finding:
    """Returns the finding with one more problem."""
    message = " ".join(str(error).split()).removeprefix(f"{found.key}: ") or type(error).__name__
    problem = Problem(stage=stage, message=f"{found.key}: {message}")
    return dataclasses.replace(found, problems=(*found.problems, problem))


def _film(record: types.Example, media: types.Media, max_seconds: float) -> Film | None:
    """Returns what the packets of a video show; MediaError if they cannot be read."""
    if record.video is None:
        return None
    with video_file.Reader(record.video, max_seconds) as reader:
        index = reader.index()
    return Film(duration=index.duration, fps=index.fps, num_frames=len(media.seconds),
                keyframe_seconds=index.duration / len(np.unique(index.start)))
