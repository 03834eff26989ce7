"""Reads media in processes of their own, each with limits on time and memory.

A decoder that crashes, hangs or asks for too much memory ends its process, and nothing else.
"""

import contextlib
import dataclasses
import os
import queue
import resource
from collections.abc import Iterator

import numpy as np

from data_pipelines.stream import child
from molmo2_jax import config as configs
from molmo2_jax import types
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import file_kind
from molmo2_jax.inputs import held_file
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import tokenizer as tokenizers

EVENLY = 1e6             # frames per second; more than a video has, so that frames are spread evenly
_GRACE_SECONDS = 5.0     # from the limit on reading to the end of the process


@dataclasses.dataclass(frozen=True)
class NamedFile(os.PathLike):
    """A file on disk that messages call by another name."""
    path: str
    name: str

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Media to read. Fields that are None are the model's; tracking_fps as in types.Example.

    kind: "images", "video", or "frames", pictures that are shown at `seconds`.
    key: hash of everything that the result depends on.
    """
    kind: str
    files: tuple[held_file.HeldFile | NamedFile, ...]
    key: str
    seconds: tuple[float, ...] = ()
    max_frames: int | None = None
    max_fps: float | None = None
    clip: tuple[float, float] | None = None
    tracking_fps: float | None = None
    max_tracking_fps: int | None = None


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads a Job; sent to the processes.

    most_seconds: of a video. most_pixels: of a picture. most_bytes: of the process's memory.
    """
    config: configs.Molmo2Config
    inputs: configs.InputConfig
    tokenizer: tokenizers.Tokenizer
    most_seconds: float
    most_pixels: int
    most_bytes: int

    def __call__(self, job: Job) -> tuple[types.Crops, types.Media]:
        """Returns the crops and the media.

        Raises:
          ValueError: the media cannot be read; the message is for whoever sent them.
        """
        resource.setrlimit(resource.RLIMIT_AS, (self.most_bytes, self.most_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            return self._read(job)
        except MemoryError:
            raise ValueError(f"media must be read within {self.most_bytes / 2**30:g} GiB of memory") from None
        except pixels_lib.MediaError as error:
            for file in job.files:
                if what := file_kind.describe(file, is_binary=True):
                    raise NotMedia(f"{file}: is {what.partition(':')[0]}") from error
            if "is not an image of a known format" in str(error):
                raise NotMedia(str(error)) from error
            raise

    def _read(self, job: Job) -> tuple[types.Crops, types.Media]:
        changed = {name: value for name in ("max_frames", "max_fps", "max_tracking_fps")
                   if (value := getattr(job, name)) is not None}
        inputs = dataclasses.replace(self.inputs, **changed)
        if job.kind == "frames":
            return self._frames(job, inputs)
        for file in job.files if job.kind == "images" else ():
            pixels_lib.check_size(file, self.most_pixels)
        video = job.files[0] if job.kind == "video" else None
        crops, media = media_lib.see(types.Example(
            annotations=(), video=video, images=() if video else job.files, clip=job.clip,
            tracking_fps=job.tracking_fps), self.config, inputs, self.tokenizer)
        if media.duration > self.most_seconds:
            raise ValueError(f"a video may have {self.most_seconds:g} seconds; got {media.duration:g}: "
                             "choose a part with start and end")
        return crops, media

    def _frames(self, job: Job, inputs) -> tuple[types.Crops, types.Media]:
        side, pixels, size = self.config.vision.image_size, [], None
        for file in job.files:
            pixels_lib.check_size(file, self.most_pixels)
            frame = pixels_lib.load(file)
            size = size or frame.shape
            if frame.shape != size:
                raise ValueError(f"frames of a video must have one size; got {size[1]} x {size[0]} and "
                                 f"{frame.shape[1]} x {frame.shape[0]}")
            pixels.append(pixels_lib.resize(frame, side, side))
        seconds = np.array(job.seconds, np.float64)
        steps = np.diff(seconds)
        rate = 1 / float(np.median(steps[steps > 0])) if (steps > 0).any() else 1.0
        frames = types.Frames(np.stack(pixels), seconds, size[1], size[0], float(seconds[-1]), rate)
        return crops_lib.crops_of_frames(frames, self.config, inputs, self.tokenizer), frames.media


class NotMedia(ValueError):
    """A file is neither a picture nor a video."""


class Failed(ValueError):
    """The process that read media ended or did not."""


class Readers:
    """Processes that read media; as many calls run at a time, others wait. Called in threads."""

    def __init__(self, reader: Reader, count: int):
        limit = reader.inputs.max_read_seconds
        self._all = [child.Child(reader, limit, tries=1, slack=_GRACE_SECONDS) for _ in range(count)]
        self._free: queue.SimpleQueue[child.Child] = queue.SimpleQueue()
        for one in self._all:
            self._free.put(one)

    @contextlib.contextmanager
    def _one(self) -> Iterator[child.Child]:
        one = self._free.get()
        try:
            yield one
        finally:
            self._free.put(one)

    def read(self, job: Job) -> tuple[types.Crops, types.Media]:
        """Returns what Reader makes of a job.

        Raises:
          ValueError: as Reader. Failed: the process crashed or hung.
        """
        with self._one() as process:
            try:
                return process(job)
            except child.Crashed as error:
                raise Failed("the media cannot be decoded: their decoder crashed or did not end") from error

    def start(self) -> None:
        """Starts the processes, so that the first request need not wait for them."""
        for one in self._all:
            one.start()

    def close(self) -> None:
        """Ends the processes."""
        for one in self._all:
            one.close()
