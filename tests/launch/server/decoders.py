"""Decoders that misbehave, for processes that read media; imports little, as these start often."""

import ctypes
import time

import numpy as np

from launch.server import reading


class Greedy(reading.Reader):
    """Asks for more memory than it may have."""

    def _read(self, job):
        return np.ones(1 << 33, np.uint8).sum()


def act(job):
    """Does what the first file of a job says."""
    match job.files[0].content:
        case b"crash":
            ctypes.string_at(0)
        case b"hang":
            time.sleep(1000)
        case b"grow":
            return Greedy(config=None, inputs=None, tokenizer=None, most_seconds=1, most_pixels=1,
                          most_bytes=3 << 30)(job)
    return "read"
