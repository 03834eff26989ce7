"""A video file: the index of its frames, made from its packets alone, and its packets, from any place.

N frames. Ticks are the stream's own integer time units; places count packets in the file's order.
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

from molmo2_jax.inputs import image
from molmo2_jax.inputs import truncation

MediaError = image.MediaError
MAX_FRAME_PIXELS = 2**26       # decoders refuse larger frames; 8K video has half of it
HELD_BYTES = 16 * 2**20        # smaller files keep their packets in memory between the two passes
SEEK_PACKETS = 32              # from so many unneeded packets on, a seek is cheaper than reading over them
JUMP_SECONDS = 10              # longer gaps in time are those between parts that were joined (FFmpeg's value)
BACK_SECONDS = fractions.Fraction(1, 10)  # and so are such steps back, at a keyframe also smaller ones
INDEX_ENTRIES = 256            # of the end of an index, among which the one stored last must be
FALLBACK_FPS = fractions.Fraction(25)  # of a single frame that states neither duration nor rate


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
    unit: fractions.Fraction | None = None    # seconds per tick; None where only `seconds` are known
    length: fractions.Fraction | None = None  # seconds, exact; None where only begin and end are known

    @property
    def duration(self) -> float:
        return self.end - self.begin if self.length is None else float(self.length)

    @property
    def elapsed(self) -> np.ndarray:
        """float64[N] seconds since the first frame, to the last bit also where `seconds` are large."""
        if self.unit is None:
            return self.seconds - self.begin
        return (self.ticks - self.ticks[0]) * self.unit.numerator / self.unit.denominator

    @property
    def nominal_fps(self) -> float:
        """The rate of the frames that follow each other without a gap; missing frames do not lower it."""
        gaps = np.diff(self.elapsed)
        if not len(gaps):
            return self.fps
        middle = np.sort(gaps)[len(gaps) // 2]
        regular = gaps[(gaps > 0.5 * middle) & (gaps < 1.5 * middle)]
        return len(regular) / regular.sum()


def url(path) -> str:
    """Returns the name by which FFmpeg opens a file; it would take what precedes a colon for a protocol."""
    return "file:" + os.fsdecode(path)


def _best_stream(container):
    """Returns the video stream that players show (av_find_best_stream), never a cover picture, or None."""
    best = container.streams.best("video")
    if best is None or not best.disposition & Disposition.attached_pic:
        return best
    films = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    return max(films, key=lambda one: bool(one.disposition & Disposition.default), default=None)


class Reader:
    """An open file. Whatever FFmpeg finds wrong with it leaves as a MediaError naming the file."""

    def __init__(self, path, max_seconds: float = math.inf):
        self.path = path
        self._late = time.monotonic() + max_seconds
        self._error = too_slow(path, max_seconds)
        self._held: list[av.Packet] | None = None
        self._shifts: list[tuple[int, int]] = []  # first packet of each part but the first, ticks it is moved
        self._marks: list[np.ndarray] = []  # ticks, place in bytes, size of each packet, if it can be sought

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
            raise MediaError(f"{self.path}: cannot be opened as a video: {_reason(error)}") from error
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
        try:  # before skip_frame is ever set: some decoders read it only here
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
        except IndexError as error:  # PyAV's, when a damaged file brings up streams it had not announced
            raise MediaError(f"{self.path}: cannot be decoded: its streams change") from error

    def index(self) -> VideoIndex:
        """Returns the index; reads all packets, and keeps those of a small file."""
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
        """Returns the ticks by which the part to which a packet belongs is moved."""
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
        """Yields (place, packet) from one place in the file's order to another, both included."""
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
        """Makes the packet at place `first`, or one before it, the next to be read."""
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
            self._marks = []  # a container that lands elsewhere does so again
            self._next = sys.maxsize
        if first < self._next:
            self._container.close()
            self._open()


def too_slow(path, max_seconds: float) -> MediaError:
    """Returns the error of a file that takes too long to read."""
    return MediaError(f"{path}: must be read within {max_seconds:g} seconds (max_read_seconds)")


def _joints(rows: Sequence[tuple], stream) -> list[tuple[int, int]]:
    """Returns (place of its first packet, ticks to add) of each part after the first of a joined stream.

    Streams that may be joined from parts, as MPEG-TS, can begin their times anew or jump in them. Each part
    then follows the one before without a gap, as in FFmpeg's programs: where decoding times go back, or
    leave out more than JUMP_SECONDS.
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
    """Raises ValueError where frames would be lost: MPEG program streams mix up the times around a joint."""
    far = JUMP_SECONDS / stream.time_base
    if (len({row[0] for row in moved}) < len(moved)
            or any(row[6] is not None and abs(row[0] - row[6]) > far for row in raw)):
        raise ValueError("is joined from parts whose time stamps do not fit together")


def _missing_packets(path, stream, last: av.Packet | None) -> str | None:
    """Returns why packets must be missing after the last one that was read, or None."""
    name, size = stream.container.format.name, os.path.getsize(path)
    if last is not None and last.is_corrupt and name != "mpegts":  # there, the mark of any lost packet
        return "its last frame is not whole"
    if name.startswith("mov,"):
        end = max((entry.pos + entry.size for entry in stream.index_entries[-INDEX_ENTRIES:]), default=0)
        if end > size:
            return f"its last frame ends at byte {end}, the file at {size}"
    return None


def _reason(error) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _index_of(rows: Sequence[tuple], stream) -> VideoIndex:
    """Returns the index of packets (ticks, duration in ticks, is keyframe, is never shown, ...) in order."""
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

    A frame stored behind a keyframe but shown before it leans on what came before that keyframe.
    """
    if not len(keys):
        return np.zeros(len(ticks), np.int64)
    key = np.searchsorted(keys, packets, side="right") - 1
    while (later := (key >= 0) & (key_ticks[key] > ticks)).any():
        key -= later
    return np.where(key >= 0, keys[key], 0)
