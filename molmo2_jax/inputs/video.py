"""Which seconds of a video to look at, which frames are shown then, and their pixels.

A file is read twice at most: first only its packets, which tell every presentation time and keyframe at a
hundredth of the cost of decoding; then the packets that the chosen frames need.

N frames, H x W pixels. Ticks are the stream's own integer time units.

Source: paper, section 3.1; reference: olmo/data/video_loader.py (time sampling with exact seeking).
"""

import dataclasses
import fractions
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from molmo2_jax import types
from molmo2_jax.inputs import image

MediaError = image.MediaError
MAX_TRACKING_FPS = 10
EDGE_SECONDS = 1e-6            # requested times stay this far inside the stream
MAX_FRAME_PIXELS = 2**26       # decoders refuse larger frames; 8K video has half of it
HELD_BYTES = 16 * 2**20        # smaller files keep their packets in memory between the two passes
FALLBACK_FPS = fractions.Fraction(25)  # of a single frame that states neither duration nor rate
# Building swscale's tables costs as much as decoding a small clip; they are kept while the format stays.
_converters = threading.local()


# Times


def sample_seconds(duration: float, max_frames: int, fps: float | None = 2.0) -> np.ndarray:
    """Returns float64[N] times in seconds at which to read frames, N <= max_frames.

    Every 1/fps seconds and always the end of the clip; if that is too many, or fps is None, max_frames
    evenly spaced from start to end.

    Raises:
      ValueError: duration, max_frames or fps is not positive.
    Source: paper, section 3.1.
    """
    if not (duration > 0 and math.isfinite(duration)):
        raise ValueError(f"duration must be positive and finite; got {duration}")
    if max_frames < 1:
        raise ValueError(f"max_frames must be >= 1; got {max_frames}")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps must be positive; got {fps}")
    if fps is None or duration > (max_frames - 1) / fps:
        return np.linspace(0.0, duration, max_frames)
    times = np.arange(math.ceil(duration * fps) + 1) / fps
    return np.append(times[times < duration], duration)


def tracking_rates(video_fps: float, annotation_fps: float) -> list[int]:
    """Returns the rates allowed for a tracking clip, ascending: at most 10 frames/s, multiples of the
    annotation's rate, dividing the video's.

    Raises:
      ValueError: no such rate exists.
    """
    whole = round(video_fps)
    rates = [rate for rate in range(1, min(MAX_TRACKING_FPS, whole) + 1)
             if annotation_fps > 0 and rate % annotation_fps == 0 and whole % rate == 0]
    if not rates or abs(video_fps - whole) > 0.05:
        raise ValueError(f"a tracking clip needs a rate <= {MAX_TRACKING_FPS} frames/s that is a multiple of "
                         f"annotation_fps and divides video_fps; got {annotation_fps} and {video_fps}")
    return rates


def tracking_seconds(duration: float, max_frames: int, video_fps: float, annotation_fps: float) -> np.ndarray:
    """Returns float64[N] times at the densest allowed rate with which max_frames still span the clip.

    If even the sparsest does not, the first max_frames times of that rate. The last frame is not added.
    (The paper says that tracking is sampled at 2 frames/s; the reference does this.)

    Raises:
      ValueError: duration or max_frames is not positive, or no rate is allowed.
    Source: reference: olmo/data/video_loader.py, sampling mode "fps".
    """
    if not duration > 0 or max_frames < 1:
        raise ValueError(f"duration and max_frames must be positive; got {duration} and {max_frames}")
    chosen, *denser = tracking_rates(video_fps, annotation_fps)
    for rate in denser:
        if max_frames / rate < duration:
            break
        chosen = rate
    times = np.arange(max_frames) / chosen
    return times[times < duration]


# Index


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """Every frame of a video in presentation order, known without decoding.

    `start` is the packet from which decoding must begin so that the frame comes out whole. Width and height
    are as coded, before a rotation flag is applied. Where packets do not carry the time of their frame
    the stream is not `timed`, and the n-th frame that leaves the decoder is frame n.
    """
    seconds: np.ndarray    # float64[N], ascending
    ticks: np.ndarray      # int64[N]
    packets: np.ndarray    # int64[N], place in the file's order
    start: np.ndarray      # int64[N], place in the file's order
    begin: float           # seconds
    end: float             # seconds, of the last frame's display
    width: int
    height: int
    fps: float             # average
    timed: bool = True

    @property
    def duration(self) -> float:
        return self.end - self.begin


def index(path) -> VideoIndex:
    """Returns the index of the first video stream of a file.

    Raises:
      MediaError: missing, empty, broken, or without video frames.
    """
    with _Reader(path) as reader:
        return reader.index()


class _Reader:
    """An open file. Whatever FFmpeg finds wrong with it leaves as a MediaError naming the file."""

    def __init__(self, path):
        self.path = path
        self.held: list[av.Packet] | None = None

    def __enter__(self) -> "_Reader":
        if not os.path.isfile(self.path):
            raise MediaError(f"{self.path}: there is no such file")
        if not os.path.getsize(self.path):
            raise MediaError(f"{self.path}: is empty")
        self._open()
        return self

    def _open(self):
        try:
            self._container = av.open(os.fspath(self.path), metadata_errors="replace")
        except (av.FFmpegError, ValueError, OSError) as error:
            raise MediaError(f"{self.path}: cannot be opened as a video: {_reason(error)}") from error
        try:
            self._open_stream()
        except Exception:
            self._container.close()
            raise

    def _open_stream(self):
        streams = [stream for stream in self._container.streams.video
                   if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise MediaError(f"{self.path}: has no video stream")
        self.stream, self.codec = streams[0], streams[0].codec_context
        if self.codec is None:
            raise MediaError(f"{self.path}: its video codec is unknown")
        self.codec.thread_count = 1
        self.codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        try:  # before skip_frame is ever set: some decoders read it only here
            self.codec.open(strict=False)
        except av.FFmpegError as error:
            raise MediaError(f"{self.path}: cannot be decoded: {_reason(error)}") from error

    def __exit__(self, kind, error, trace):
        self.held = None
        self._container.close()
        if isinstance(error, av.FFmpegError):
            raise MediaError(f"{self.path}: cannot be decoded: {_reason(error)}") from error

    def packets(self) -> Iterator[av.Packet]:
        """Yields the packets of the stream; a second call starts over."""
        if self.held is not None:
            yield from self.held
            return
        self._container.close()
        self._open()
        yield from self._demux()

    def _demux(self) -> Iterator[av.Packet]:
        try:
            for packet in self._container.demux(self.stream):
                if packet.size:
                    yield packet
        except IndexError as error:  # PyAV's, when a damaged file brings up streams it had not announced
            raise MediaError(f"{self.path}: cannot be decoded: its streams change") from error

    def index(self) -> VideoIndex:
        rows, held, size = [], [], 0
        for packet in self._demux():
            rows.append((packet.pts, packet.duration, packet.is_keyframe, packet.is_discard))
            size += packet.size
            if size <= HELD_BYTES:
                held.append(packet)
        self.held = held if size <= HELD_BYTES else None
        try:
            return _index_of(rows, self.stream)
        except ValueError as error:
            raise MediaError(f"{self.path}: {error}") from None


def _reason(error) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _index_of(rows: Sequence[tuple], stream) -> VideoIndex:
    """Returns the index of packets (ticks, duration in ticks, is keyframe, is never shown) in file order."""
    rate, unit = stream.average_rate or stream.guessed_rate, stream.time_base
    packets = np.array([place for place, row in enumerate(rows) if not row[3]], np.int64)
    if not len(packets):
        raise ValueError("has a video stream without frames")
    if unit is None or any(row[0] is None for row in rows):  # elementary streams
        ticks, unit, timed, last = np.arange(len(packets)), 1 / (rate or FALLBACK_FPS), False, 1
    else:
        ticks, first = np.unique([rows[place][0] for place in packets], return_index=True)
        packets = packets[first]
        last = rows[packets[-1]][1] or 0
        # AVI stores the order of decoding only; FFmpeg's guess at the order of display can be wrong.
        timed = stream.container.format.name != "avi" or not stream.codec_context.has_b_frames
    keys = [place for place, row in enumerate(rows) if row[2]] if timed else []
    seconds = ticks.astype(np.float64) * unit.numerator / unit.denominator
    begin, end = float(seconds[0]), float((ticks[-1] + last) * unit) if last > 0 else float(
        seconds[-1] + float(1 / (rate or FALLBACK_FPS)))
    if not begin < end:
        raise ValueError(f"has impossible time stamps: {begin} .. {end} seconds")
    stated, counted = float(rate or 0), len(ticks) / (end - begin)
    return VideoIndex(
        seconds=seconds, ticks=ticks, packets=packets, timed=timed, begin=begin, end=end,
        start=_starts(ticks, packets, np.array(keys, np.int64), [rows[place][0] for place in keys]),
        width=stream.codec_context.width, height=stream.codec_context.height,
        fps=stated if abs(stated - counted) <= 0.01 * counted else counted)


def _starts(ticks, packets, keys, key_ticks) -> np.ndarray:
    """Returns int64[N]: for each frame the last keyframe neither shown nor stored after it, else packet 0.

    A frame stored behind a keyframe but shown before it leans on what came before that keyframe.
    """
    start = np.zeros(len(ticks), np.int64)
    candidate = np.searchsorted(keys, packets, side="right") - 1
    for frame, key in enumerate(candidate):
        while key >= 0 and key_ticks[key] > ticks[frame]:
            key -= 1
        start[frame] = keys[key] if key >= 0 else 0
    return start


def clip_span(index: VideoIndex, clip: tuple[float, float] | None) -> tuple[float, float]:
    """Returns (stream time at which the clip begins, duration of the clip), both in seconds.

    Raises:
      ValueError: the clip does not satisfy 0 <= start < end, start < duration.
    """
    if clip is None:
        return index.begin, index.duration
    start, end = clip
    if not (0 <= start < end and start < index.duration):
        raise ValueError(f"a clip must satisfy 0 <= start < end and start < {index.duration:.3f} seconds, "
                         f"the duration; got {start} .. {end}")
    return index.begin + start, min(end, index.duration) - start


def frames_at(index: VideoIndex, seconds: np.ndarray, clip: tuple[float, float] | None = None) -> np.ndarray:
    """Returns int64[N]: the frame on display at each time, counted from the start of the clip.

    That is the last frame whose presentation time is not after the time; times outside the stream are moved
    to its first or last instant.
    """
    times = clip_span(index, clip)[0] + np.asarray(seconds, np.float64)
    # The upper edge last: a stream may be shorter than both edges together.
    times = np.minimum(np.maximum(times, index.begin + EDGE_SECONDS), index.end - EDGE_SECONDS)
    return np.maximum(np.searchsorted(index.seconds, times, side="right") - 1, 0)


# Decoding


@dataclasses.dataclass(frozen=True)
class _Run:
    """Packets to decode in one go, first and last included; `wanted` are those whose frames are kept."""
    first: int
    last: int
    wanted: frozenset[int]


def _runs(index: VideoIndex, frames: Iterable[int]) -> list[_Run]:
    """Returns what to decode for ascending frames: a new run wherever a keyframe lets packets be left out."""
    runs = []
    for frame in frames:
        packet, start = int(index.packets[frame]), int(index.start[frame])
        if runs and start <= runs[-1].last:
            run = runs.pop()
            runs.append(_Run(run.first, max(run.last, packet), run.wanted | {packet}))
        else:
            runs.append(_Run(start, packet, frozenset({packet})))
    return runs


def _decode(reader: _Reader, runs: Iterable[_Run]) -> Iterator[av.VideoFrame]:
    """Yields decoded frames in presentation order; of the unwanted ones only those that others need."""
    packets = enumerate(reader.packets())
    for run in runs:
        for place, packet in packets:
            if place >= run.first:
                reader.codec.skip_frame = "DEFAULT" if place in run.wanted else "NONREF"
                yield from reader.codec.decode(packet)
            if place >= run.last:
                break
        yield from reader.codec.decode(None)  # what the decoder still holds back for reordering
        reader.codec.flush_buffers()


def _wanted(reader: _Reader, index: VideoIndex, frames: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame number, decoded frame) for ascending frame numbers.

    Streams whose decoder does not hand out every frame that the packets promise are decoded from the
    start, and the frame before takes the place of one that is missing, as on a screen.
    """
    pending = list(frames)
    if index.timed:
        of_ticks = {int(index.ticks[frame]): frame for frame in frames}
        for decoded in _decode(reader, _runs(index, frames)):
            if decoded.pts in of_ticks:
                yield of_ticks.pop(decoded.pts), decoded
        pending = sorted(of_ticks.values())
    if not pending:
        return
    whole = _Run(0, int(index.packets.max()), frozenset(index.packets.tolist()))
    shown = None
    for count, decoded in enumerate(_decode(reader, [whole])):
        by_time = index.timed and decoded.pts is not None
        frame = np.searchsorted(index.ticks, decoded.pts) if by_time else count
        while pending and frame > pending[0] and shown is not None:
            yield pending.pop(0), shown
        shown = decoded
    if shown is None:
        raise MediaError(f"{reader.path}: none of its frames can be decoded")
    for frame in pending:
        yield frame, shown


def read(path, *, max_frames: int, fps: float | None = 2.0, clip: tuple[float, float] | None = None,
         seconds: np.ndarray | None = None, size: tuple[int, int] | None = None) -> types.Frames:
    """Returns the frames of a video on display at the sampled times.

    Args:
      max_frames, fps: as in sample_seconds; unused where `seconds` is given.
      clip: (start, end) in seconds from the start of the video; None for all of it.
      seconds: times relative to the start of the clip, instead of sampled ones.
      size: (rows, columns) to which each frame is resized as soon as it is decoded; None: source size.

    Raises:
      MediaError: the file is missing, empty, broken, without video, or changes its frame size.
      ValueError: the clip does not lie in the video, or a limit is not positive.
    """
    with _Reader(path) as reader:
        contents = reader.index()
        duration = clip_span(contents, clip)[1]
        if seconds is None:
            seconds = sample_seconds(duration, max_frames, fps)
        seconds = np.asarray(seconds, np.float64)
        if not len(seconds):
            raise ValueError("at least one time must be read; got none")
        frames = frames_at(contents, seconds, clip)
        pixels, shape = None, None
        for frame, decoded in _wanted(reader, contents, np.unique(frames).tolist()):
            rgb = _upright_rgb(decoded)
            shape = shape or rgb.shape
            if size is not None:
                rgb = image.resize(rgb, *size)
            if pixels is None:
                pixels = np.empty((len(frames), *rgb.shape), np.uint8)
            if rgb.shape != pixels.shape[1:]:
                raise MediaError(f"{path}: all frames must have one size; got {shape[1]} x {shape[0]}, "
                                 f"then {rgb.shape[1]} x {rgb.shape[0]}")
            pixels[frames == frame] = rgb
    return types.Frames(pixels=pixels, seconds=seconds, width=shape[1], height=shape[0], duration=duration,
                        fps=contents.fps)


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Returns uint8[H, W, 3], turned counterclockwise by what the rotation flag says, in quarter turns."""
    if not hasattr(_converters, "rgb"):
        _converters.rgb = VideoReformatter()
    rgb = _converters.rgb.reformat(frame, format="rgb24").to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.rot90(rgb, turns) if turns else rgb
