"""Chooses the times to sample in a video, finds the frames on display then, and decodes them.

The first pass reads packets only, which give every presentation time and keyframe at a hundredth of the cost
of decoding. The second pass decodes only the packets that the chosen frames need, seeking over the rest.

N frames, H x W pixels. Ticks are the stream's own integer time units.

Source: paper, section 3.1; reference: olmo/data/video_loader.py (time sampling with exact seeking).
"""

import dataclasses
import fractions
import math
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np

from molmo2_jax import types
from molmo2_jax.inputs import kept_video
from molmo2_jax.inputs import orientation
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import video_file

MediaError = pixels_lib.MediaError
EDGE_SECONDS = 1e-6            # requested times stay this far inside the stream
# A time at most this much before a frame shows that frame: float sums and six-decimal times err by less.
ROUNDING_SECONDS = 6e-7
WHOLE_RATE = 0.0025            # relative distance at which a rate counts as whole; NTSC's differ by 0.001


# Times


def sample_seconds(duration: float, max_frames: int, fps: float | None = 2.0) -> np.ndarray:
    """Returns float64[N] times in seconds at which to read frames, N <= max_frames.

    Times are every 1/fps seconds plus the end of the clip; if those are too many, or fps is None, max_frames
    times evenly spaced from start to end.

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


def tracking_rates(video_fps: float, annotation_fps: float, max_fps: int = 10) -> list[int]:
    """Returns the sampling rates allowed for a tracking clip, in frames per second, ascending.

    They are multiples of the annotation's rate, and at most max_fps and the video's rate. If the video's rate
    is whole, or NTSC's 1000/1001 of a whole number, they must also divide it: the reference's rule, which
    covers no other rates.

    Raises:
      ValueError: no such rate exists.
    """
    whole = round(video_fps)
    is_whole = abs(video_fps - whole) <= WHOLE_RATE * whole
    highest = whole if is_whole else math.floor(video_fps)
    rates = [rate for rate in range(1, min(max_fps, highest) + 1)
             if annotation_fps > 0 and rate % annotation_fps == 0 and (whole % rate == 0 or not is_whole)]
    if not rates:
        raise ValueError(f"a tracking clip needs a rate <= {max_fps} frames/s that is a multiple of "
                         f"annotation_fps and divides video_fps where that is whole; "
                         f"got {annotation_fps} and {video_fps}")
    return rates


def tracking_seconds(duration: float, max_frames: int, video_fps: float, annotation_fps: float,
                     max_fps: int = 10) -> np.ndarray:
    """Returns float64[N] times in seconds at the highest allowed rate at which max_frames span the clip.

    If even the lowest rate does not span it, the first max_frames times at that rate. The last frame is not
    added. (The paper samples tracking clips at 2 frames/s and cuts them: use max_fps = 2.)

    Raises:
      ValueError: duration or max_frames is not positive, or no rate is allowed.
    Source: reference: olmo/data/video_loader.py, sampling mode "fps".
    """
    if not duration > 0 or max_frames < 1:
        raise ValueError(f"duration and max_frames must be positive; got {duration} and {max_frames}")
    chosen, *denser = tracking_rates(video_fps, annotation_fps, max_fps)
    for rate in denser:
        if max_frames / rate < duration:
            break
        chosen = rate
    times = np.arange(max_frames) / chosen
    return times[times < duration]


# Times to frames


def index(path) -> video_file.VideoIndex:
    """Returns the index of the video stream that players show.

    Raises:
      MediaError: the file is missing, empty, broken, or has no video frames.
    """
    with video_file.Reader(path) as reader:
        return reader.index()


def clip_span(index: video_file.VideoIndex, clip: tuple[float, float] | None) -> tuple[float, float]:
    """Returns (stream time at which the clip begins, duration of the clip), both in seconds.

    The duration is the correctly rounded difference of the decimal numbers: exactly 1.0 for 1.2 to 2.2.

    Raises:
      ValueError: the clip does not satisfy 0 <= start < end, start < duration.
    """
    if clip is None:
        return index.begin, index.duration
    start, end = clip
    if not (0 <= start < end and start < index.duration):
        raise ValueError(f"a clip must satisfy 0 <= start < end and start < {index.duration:.3f} seconds, "
                         f"the duration; got {start} .. {end}")
    exact = min(_decimal(end), index.length or _decimal(index.duration)) - _decimal(start)
    return index.begin + start, float(exact)


def _decimal(number: float) -> fractions.Fraction:
    """Returns the shortest decimal number that rounds to this float, as a person would have written it."""
    return fractions.Fraction(repr(float(number)))


def frames_at(index: video_file.VideoIndex, seconds: np.ndarray,
              clip: tuple[float, float] | None = None) -> np.ndarray:
    """Returns int64[N]: the frame on display at each time, counted from the start of the clip.

    That is the last frame whose presentation time is at most ROUNDING_SECONDS after the given time, so a time
    equal to a frame's shows that frame. Times outside the stream are moved to its start or end.

    Raises:
      ValueError: as `clip_span`.
    """
    clip_span(index, clip)  # checks the clip
    times = (clip[0] if clip else 0.0) + np.asarray(seconds, np.float64)
    # The upper bound last: a stream may be shorter than both margins together.
    times = np.minimum(np.maximum(times, EDGE_SECONDS), index.duration - EDGE_SECONDS)
    shown = np.searchsorted(index.elapsed, times + ROUNDING_SECONDS, side="right") - 1
    return np.maximum(shown, 0)


# Decoding


@dataclasses.dataclass(frozen=True)
class _Run:
    """A range of packets to decode, inclusive; `wanted` are those whose frames are kept."""
    first: int
    last: int
    wanted: frozenset[int]


def _runs(index: video_file.VideoIndex, frames: Iterable[int]) -> list[_Run]:
    """Returns the runs to decode for ascending frames; a new run begins where a keyframe allows a gap."""
    runs = []
    for frame in frames:
        packet, start = int(index.packets[frame]), int(index.start[frame])
        if runs and start <= runs[-1].last:
            run = runs.pop()
            runs.append(_Run(run.first, max(run.last, packet), run.wanted | {packet}))
        else:
            runs.append(_Run(start, packet, frozenset({packet})))
    return runs


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A decoded frame and the display matrix that applies to it."""
    frame: av.VideoFrame
    matrix: orientation.Matrix | None


def _decode(reader: video_file.Reader, runs: Iterable[_Run]) -> Iterator[_Picture]:
    """Yields decoded pictures in presentation order; unwanted ones only if other frames need them."""
    for run in runs:
        matrix = None
        for frame in _decode_run(reader, run):
            own = orientation.display_matrix(frame)
            if own is not None or frame.key_frame:  # messages in the stream accompany keyframes only
                matrix = own
            yield _Picture(frame, matrix)


def _decode_run(reader: video_file.Reader, run: _Run) -> Iterator[av.VideoFrame]:
    for place, packet in reader.between(run.first, run.last):
        reader.check_time()
        reader.codec.skip_frame = "DEFAULT" if place in run.wanted else "NONREF"
        yield from reader.codec.decode(packet)
    yield from reader.codec.decode(None)  # frames that the decoder held back for reordering
    reader.codec.flush_buffers()


def _wanted(reader: video_file.Reader, index: video_file.VideoIndex,
            frames: Sequence[int]) -> Iterator[tuple[int, _Picture]]:
    """Yields (frame number, decoded picture) for ascending frame numbers.

    If the decoder does not return every frame that the packets announce, the stream is decoded from its
    start, and a missing frame is replaced by the previous one, as on a screen.
    """
    pending = list(frames)
    if index.timed:
        of_ticks = {int(index.ticks[frame]): frame for frame in frames}
        for decoded in _decode(reader, _runs(index, frames)):
            if decoded.frame.pts in of_ticks:
                yield of_ticks.pop(decoded.frame.pts), decoded
        pending = sorted(of_ticks.values())
    if not pending:
        return
    whole = _Run(0, int(index.packets.max()), frozenset(index.packets.tolist()))
    shown = None
    for count, decoded in enumerate(_decode(reader, [whole])):
        ticks = decoded.frame.pts if index.timed else None
        frame = count if ticks is None else np.searchsorted(index.ticks, ticks)
        while pending and frame > pending[0] and shown is not None:
            yield pending.pop(0), shown
        shown = decoded
    if shown is None:
        raise MediaError(f"{reader.path}: none of its frames can be decoded")
    for frame in pending:
        yield frame, shown


def read(path, *, max_frames: int, fps: float | None = 2.0, clip: tuple[float, float] | None = None,
         seconds: np.ndarray | None = None, tracking_fps: float | None = None, max_tracking_fps: int = 10,
         size: tuple[int, int] | None = None, max_seconds: float = math.inf) -> types.Frames:
    """Returns the frames of a video that are on display at the sampled times.

    Args:
      path: of a file; or a KeptVideo.
      max_frames, fps: as in sample_seconds; unused if `seconds` is given.
      clip: (start, end) in seconds from the start of the video; None for all of it.
      seconds: times relative to the start of the clip, instead of sampled ones.
      tracking_fps: the rate of annotated tracks; times are then those of tracking_seconds, with at most
        max_tracking_fps per second.
      size: (rows, columns) to which each frame is resized as soon as it is decoded; None keeps its size.
      max_seconds: time limit, checked between packets.

    Raises:
      MediaError: the file is missing, empty or broken, has no video, changes frame size or takes too long.
      ValueError: the clip is not within the video, a limit is not positive, no tracking rate is allowed, or
        there is no time to read.
    """
    def choose(contents):
        duration = clip_span(contents, clip)[1]
        times = seconds
        if times is None:
            times = _sampled(contents, duration, max_frames, fps, tracking_fps, max_tracking_fps)
        times = np.asarray(times, np.float64)
        if not len(times):
            raise ValueError("at least one time must be read; got none")
        return duration, times, frames_at(contents, times, clip)

    if isinstance(path, kept_video.KeptVideo):
        duration, times, frames = choose(path)
        return types.Frames(pixels=path.pixels(frames, size), seconds=times, width=path.width,
                            height=path.height, duration=duration, fps=path.fps)
    with video_file.Reader(path, max_seconds) as reader:
        contents = reader.index()
        duration, times, frames = choose(contents)
        pixels, (height, width) = _pixels(reader, contents, frames, size)
    return types.Frames(pixels=pixels, seconds=times, width=width, height=height, duration=duration,
                        fps=contents.fps)


def _sampled(contents, duration: float, max_frames: int, fps: float | None, tracking_fps: float | None,
             max_tracking_fps: int) -> np.ndarray:
    """Returns the times at which training looks at a clip of `duration` seconds."""
    if tracking_fps is None:
        return sample_seconds(duration, max_frames, fps)
    return tracking_seconds(duration, max_frames, contents.nominal_fps, tracking_fps, max_tracking_fps)


def keep(path, *, name: str, max_frames: Sequence[int], fps: float, max_side: int, quality: int,
         clip: tuple[float, float] | None = None, tracking_fps: float | None = None,
         max_tracking_fps: int = 10, max_seconds: float = math.inf) -> kept_video.KeptVideo:
    """Returns the frames of a video that `read` shows with any of the limits `max_frames`.

    Args:
      name: by which errors name the result.
      max_side, quality: of the JPEGs, as in kept_video.to_jpeg.

    Raises:
      MediaError, ValueError: as read.
    """
    with video_file.Reader(path, max_seconds) as reader:
        contents = reader.index()
        duration = clip_span(contents, clip)[1]
        shown = [frames_at(contents, _sampled(contents, duration, most, fps, tracking_fps, max_tracking_fps),
                           clip) for most in max_frames]
        frames = np.unique(np.concatenate(shown))
        jpegs, shape = {}, (0, 0)
        for frame, rgb in _upright(reader, contents, frames.tolist()):
            shape = rgb.shape[:2]
            jpegs[frame] = kept_video.to_jpeg(rgb, max_side, quality)
    elapsed = np.append(contents.elapsed, math.inf)
    limits = " or ".join(map(str, max_frames))
    rate = f"{fps:g} frames/s" if tracking_fps is None else f"tracks of {tracking_fps:g} points/s"
    return kept_video.KeptVideo(
        name=name, jpegs=tuple(jpegs[frame] for frame in frames.tolist()),
        starts=tuple(elapsed[frames].tolist()),
        stops=tuple(elapsed[frames + 1].tolist()), width=shape[1], height=shape[0], begin=contents.begin,
        duration=contents.duration, length=contents.length, fps=contents.fps,
        nominal_fps=contents.nominal_fps, rule=f"at most {limits} frames at {rate}")


def _pixels(reader: video_file.Reader, contents: video_file.VideoIndex, frames: np.ndarray,
            size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns uint8[N, rows, columns, 3] of the frames, and (height, width) of the source."""
    pixels, shape = None, (0, 0)
    for frame, rgb in _upright(reader, contents, np.unique(frames).tolist()):
        shape = rgb.shape[:2]
        if size is not None:
            rgb = pixels_lib.resize(rgb, *size)
        if pixels is None:
            pixels = np.empty((len(frames), *rgb.shape), np.uint8)
        pixels[frames == frame] = rgb
    return pixels, shape


def _upright(reader: video_file.Reader, contents: video_file.VideoIndex,
             frames: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (frame number, uint8[H, W, 3]) for ascending frame numbers, all of one size."""
    shape, before = None, 0
    for frame, picture in _wanted(reader, contents, frames):
        rgb = orientation.upright_rgb(picture.frame, picture.matrix)
        shape = shape or rgb.shape
        if rgb.shape != shape:
            raise _changed_size(reader, contents, shape, (before, frame))
        yield frame, rgb
        before = frame


def _changed_size(reader, contents, shape, frames: tuple[int, int]) -> MediaError:
    """Returns the error for a video that has `shape` at frames[0] and another one at frames[1]."""
    reader.codec.flush_buffers()
    between = range(frames[0] + 1, frames[1] + 1)
    keys = [frame for frame in between if contents.start[frame] == contents.packets[frame]]
    pictures = ((frame, orientation.upright_rgb(picture.frame, picture.matrix).shape)
                for frame, picture in _wanted(reader, contents, keys or [frames[1]]))
    frame, other = next((one for one in pictures if one[1] != shape), (frames[1], None))
    then = f"{other[1]} x {other[0]}" if other else "another"
    return MediaError(f"{reader.path}: all frames must have one size; got {shape[1]} x {shape[0]}, then "
                      f"{then} from {contents.seconds[frame] - contents.begin:.3f} seconds on")
