"""A video file: an index of its frames built from packets alone, and random access to its packets.

N frames. Ticks are the stream's own integer time units; a place is a packet's number in file order.
"""

import bisect
import contextlib
import dataclasses
import fractions
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.format import Flags
from av.stream import Disposition

from molmo2_jax.inputs import file_kind
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import truncation

MediaError = pixels_lib.MediaError
MAX_FRAME_PIXELS = 2**26       # decoders reject larger frames; 8K video has half as many
HELD_BYTES = 16 * 2**20        # packets of smaller files stay in memory between both passes
SEEK_PACKETS = 32              # from this many unneeded packets on, seeking is cheaper than reading
JUMP_SECONDS = 10              # longer gaps separate parts that were joined (FFmpeg's value)
BACK_SECONDS = fractions.Fraction(1, 10)  # so do steps back of this size; at a keyframe also smaller ones
INDEX_ENTRIES = 256            # at the end of an index, which must include the frame stored last
FALLBACK_FPS = fractions.Fraction(25)  # for a single frame with neither duration nor rate


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """Every frame of a video in presentation order, known without decoding.

    `start` is the packet at which decoding must begin to get the frame complete. Width and height are as
    coded, before any rotation flag. If packets do not carry their frame's time, the stream is not `timed`,
    and the n-th frame that the decoder returns is frame n.
    """
    seconds: np.ndarray    # float64[N], ascending, presentation times
    ticks: np.ndarray      # int64[N]
    packets: np.ndarray    # int64[N], places
    start: np.ndarray      # int64[N], places
    begin: float           # seconds
    end: float             # seconds, when the last frame's display ends
    width: int
    height: int
    fps: float             # average
    timed: bool = True
    unit: fractions.Fraction | None = None    # seconds per tick; None if only `seconds` are known
    length: fractions.Fraction | None = None  # seconds, exact; None if only begin and end are known

    @property
    def duration(self) -> float:
        return self.end - self.begin if self.length is None else float(self.length)

    @property
    def elapsed(self) -> np.ndarray:
        """float64[N] seconds since the first frame, exact to the last bit even if `seconds` are large."""
        if self.unit is None:
            return self.seconds - self.begin
        return (self.ticks - self.ticks[0]) * self.unit.numerator / self.unit.denominator

    @property
    def nominal_fps(self) -> float:
        """The rate of consecutive frames without gaps between them; missing frames do not lower it."""
        gaps = np.diff(self.elapsed)
        if not len(gaps):
            return self.fps
        middle = np.sort(gaps)[len(gaps) // 2]
        regular = gaps[(gaps > 0.5 * middle) & (gaps < 1.5 * middle)]
        return len(regular) / regular.sum()


def url(path) -> str:
    """Returns the name by which FFmpeg opens a file; it takes text before a colon for a protocol."""
    return "file:" + os.fsdecode(path)


def _best_stream(container):
    """Returns the video stream that players show (av_find_best_stream), never a cover picture, or None."""
    best = container.streams.best("video")
    if best is None or not best.disposition & Disposition.attached_pic:
        return best
    films = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    return max(films, key=lambda one: bool(one.disposition & Disposition.default), default=None)


class Reader:
    """An open file. Errors of FFmpeg are raised as MediaError with the file's name."""

    def __init__(self, path, max_seconds: float = math.inf):
        self.path = path
        self._late = time.monotonic() + max_seconds
        self._error = too_slow(path, max_seconds)
        self._held: list[av.Packet] | None = None
        self._shifts: list[tuple[int, int]] = []  # (first place, added ticks) of each part after the first
        self._marks: list[np.ndarray] = []  # ticks, byte offset, size of each packet, if seekable

    def __enter__(self) -> "Reader":
        if not os.path.isfile(self.path):
            raise MediaError(f"{self.path}: there is no such file")
        if not os.path.getsize(self.path):
            raise MediaError(f"{self.path}: is empty")
        self._open()
        return self

    def _open(self):
        try:
            self._container = av.open(url(self.path), metadata_errors="replace")
        except (av.FFmpegError, ValueError, OSError) as error:
            what = file_kind.describe(self.path) or _reason(error)
            raise MediaError(f"{self.path}: cannot be opened as a video: {what}") from error
        try:
            self._open_stream()
        except Exception:
            self._container.close()
            raise

    def _open_stream(self):
        self.stream = _best_stream(self._container)
        if self.stream is None:
            raise MediaError(f"{self.path}: has no video stream")
        self.codec = self.stream.codec_context
        if self.codec is None:
            raise MediaError(f"{self.path}: its video codec is unknown")
        self.codec.thread_count = 1
        self.codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        try:  # before skip_frame is set: some decoders read it only here
            self.codec.open(strict=False)
        except av.FFmpegError as error:
            raise MediaError(f"{self.path}: cannot be decoded: {_reason(error)}") from error
        self._source, self._next = self._demux(), 0

    def __exit__(self, kind, error, trace):
        self._held = None
        self._container.close()
        if isinstance(error, av.FFmpegError):
            raise MediaError(f"{self.path}: cannot be decoded: {_reason(error)}") from error

    def check_time(self) -> None:
        if time.monotonic() > self._late:
            raise self._error

    def _demux(self) -> Iterator[av.Packet]:
        try:
            for packet in self._container.demux(self.stream):
                self.check_time()
                if packet.size:
                    yield packet
        except IndexError as error:  # from PyAV, if a damaged file has unannounced streams
            raise MediaError(f"{self.path}: cannot be decoded: its streams change") from error

    def index(self) -> VideoIndex:
        """Returns the index; reads all packets, and keeps those of a small file.

        Raises:
          MediaError: the file is cut off, has no frames, or has impossible time stamps.
        """
        rows, held, packet = [], [], None
        is_small = os.path.getsize(self.path) <= HELD_BYTES
        self._refuse(truncation.missing_end(self.path, self._container.format.name))
        for packet in self._source:
            rows.append((packet.pts, packet.duration, packet.is_keyframe, packet.is_discard, packet.pos,
                         packet.size, packet.dts))
            if is_small:
                held.append(packet)
        self._held, self._next = (held if is_small else None), len(rows)
        self._refuse(_missing_packets(self.path, self.stream, packet))
        raw, self._shifts = rows, _joints(rows, self.stream)
        try:
            if self._shifts:
                rows = [(row[0] + self._shift(place), *row[1:]) for place, row in enumerate(rows)]
                _check_joined(raw, rows, self.stream)
                for place, packet in enumerate(held):
                    self._move(place, packet)
            contents = _index_of(rows, self.stream)
        except ValueError as error:
            raise MediaError(f"{self.path}: {error}") from None
        if not is_small and contents.timed and all(row[4] is not None for row in rows):
            self._marks = [np.array([row[column] for row in raw], np.int64) for column in (0, 4, 5)]
        return contents

    def _shift(self, place: int) -> int:
        """Returns the ticks to add to the times of the part that contains a packet."""
        part = bisect.bisect_right(self._shifts, place, key=lambda one: one[0])
        return self._shifts[part - 1][1] if part else 0

    def _move(self, place: int, packet: av.Packet) -> None:
        shift = self._shift(place)
        packet.pts += shift
        if packet.dts is not None:
            packet.dts += shift

    def _refuse(self, reason: str | None) -> None:
        if reason:
            raise MediaError(f"{self.path}: cannot be decoded: it is cut off: {reason}")

    def between(self, first: int, last: int) -> Iterator[tuple[int, av.Packet]]:
        """Yields (place, packet) from place `first` to place `last`, inclusive."""
        if self._held is not None:
            yield from enumerate(self._held[first:last + 1], first)
            return
        if not self._next <= first < self._next + SEEK_PACKETS:
            self._go_to(first)
        for packet in self._source:
            place, self._next = self._next, self._next + 1
            if place >= first:
                if self._shifts:
                    self._move(place, packet)
                yield place, packet
            if place >= last:
                return

    def _go_to(self, first: int) -> None:
        """Moves to the packet at place `first`, or to one before it."""
        if first and self._marks:
            ticks, offsets, sizes = self._marks
            with contextlib.suppress(av.FFmpegError, StopIteration):
                self._container.seek(int(ticks[first]), stream=self.stream)
                self._source = self._demux()
                packet = next(self._source)
                places = [place for place in np.flatnonzero(offsets == packet.pos).tolist()
                          if (ticks[place], sizes[place]) == (packet.pts, packet.size)]
                if len(places) == 1 and places[0] <= first:
                    self._source, self._next = itertools.chain((packet,), self._source), places[0]
                    return
            self._marks = []  # a container that seeks elsewhere will do so again
            self._next = sys.maxsize
        if first < self._next:
            self._container.close()
            self._open()


def too_slow(path, max_seconds: float) -> MediaError:
    """Returns the error for a file that takes too long to read."""
    return MediaError(f"{path}: must be read within {max_seconds:g} seconds (max_read_seconds)")


def _joints(rows: Sequence[tuple], stream) -> list[tuple[int, int]]:
    """Returns (place of its first packet, ticks to add) of each part after the first of a joined stream.

    In formats whose files may be joined from parts, such as MPEG-TS, times may restart or jump. A part begins
    where decoding times go back, or skip more than JUMP_SECONDS; it then follows the previous part without a
    gap, as in FFmpeg's programs.
    """
    if not stream.container.format.flags & Flags.ts_discont.value or any(row[0] is None for row in rows):
        return []
    back, jump = (float(seconds / stream.time_base) for seconds in (-BACK_SECONDS, JUMP_SECONDS))
    known = np.array([place for place, row in enumerate(rows) if row[6] is not None], np.int64)
    steps: Any = np.diff(np.array([row[6] for row in rows if row[6] is not None], np.int64))
    is_key = np.array([rows[place][2] for place in known[1:]], bool)
    is_joint = (steps < back) | (steps > jump) | ((steps <= 0) & is_key)
    places = known[1:][is_joint].tolist()
    frame = int(1 / (stream.average_rate or stream.guessed_rate or FALLBACK_FPS) / stream.time_base)
    joints, shift = [], 0
    for start, place, stop in zip([0, *places], places, [*places[1:], len(rows)]):
        final = max(rows[start:place], key=lambda row: row[0])
        shift += final[0] + (final[1] or frame) - min(row[0] for row in rows[place:stop])
        joints.append((place, shift))
    return joints


def _check_joined(raw: Sequence[tuple], moved: Sequence[tuple], stream) -> None:
    """Checks that no frames would be lost: MPEG program streams mix up the times around a joint.

    Raises:
      ValueError: two frames would have one time, or a packet's times are too far apart.
    """
    far = JUMP_SECONDS / stream.time_base
    if (len({row[0] for row in moved}) < len(moved)
            or any(row[6] is not None and abs(row[0] - row[6]) > far for row in raw)):
        raise ValueError("is joined from parts whose time stamps do not fit together")


def _missing_packets(path, stream, last: av.Packet | None) -> str | None:
    """Returns why packets must be missing after the last one read, or None."""
    name, size = stream.container.format.name, os.path.getsize(path)
    if last is not None and last.is_corrupt and name != "mpegts":  # where it marks any lost packet
        return "its last frame is not whole"
    if name.startswith("mov,"):
        end = max((entry.pos + entry.size for entry in stream.index_entries[-INDEX_ENTRIES:]), default=0)
        if end > size:
            return f"its last frame ends at byte {end}, the file at {size}"
    return None


def _reason(error) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _index_of(rows: Sequence[tuple], stream) -> VideoIndex:
    """Returns the index of packets, each (ticks, duration in ticks, is keyframe, is never shown, ...)."""
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
        # AVI stores the decoding order only; FFmpeg's guess of the display order can be wrong.
        timed = stream.container.format.name != "avi" or not stream.codec_context.has_b_frames
    keys = [place for place, row in enumerate(rows) if row[2]] if timed else []
    seconds = ticks.astype(np.float64) * unit.numerator / unit.denominator
    length = int(ticks[-1] - ticks[0]) * unit + (last * unit if last > 0 else 1 / (rate or FALLBACK_FPS))
    begin, end = float(seconds[0]), float(int(ticks[0]) * unit + length)
    if not begin < end:
        raise ValueError(f"has impossible time stamps: {begin} .. {end} seconds")
    stated, counted = float(rate or 0), len(ticks) / float(length)
    return VideoIndex(
        seconds=seconds, ticks=ticks, packets=packets, timed=timed, begin=begin, end=end, unit=unit,
        length=length,
        start=_starts(ticks, packets, np.array(keys, np.int64),
                      np.array([rows[place][0] for place in keys], np.int64)),
        width=stream.codec_context.width, height=stream.codec_context.height,
        fps=stated if abs(stated - counted) <= 0.01 * counted else counted)


def _starts(ticks, packets, keys, key_ticks) -> np.ndarray:
    """Returns int64[N]: for each frame the last keyframe neither shown nor stored after it, else packet 0.

    A frame stored after a keyframe but shown before it depends on frames before that keyframe.
    """
    if not len(keys):
        return np.zeros(len(ticks), np.int64)
    key = np.searchsorted(keys, packets, side="right") - 1
    while (later := (key >= 0) & (key_ticks[key] > ticks)).any():
        key -= later
    return np.where(key >= 0, keys[key], 0)
