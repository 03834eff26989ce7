"""Valid media files, damaged copies of them, and the outcome of reading those in a process that may crash."""

import contextlib
import dataclasses
import fractions
import json
import os
import pathlib
import resource
import selectors
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from molmo2_jax import config as configs
from molmo2_jax import types
from molmo2_jax.inputs import media
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.inputs import video_file

CPU_SECONDS = 10.0     # more is a hang
WALL_SECONDS = 240.0   # then the reading process is killed; long, because other work may share the cores
MEMORY_MIB = 1024      # how much the reading process may grow
ADDRESS_SPACE = 8 * 2**30


# Whole files


def _pictures(count: int, rows: int, columns: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 256, (rows // 8, columns // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for number in range(count):
        yield np.roll(ground, (number, 2 * number), (0, 1))


def _film(path: pathlib.Path, codec: str, options: dict[str, str], *, movflags: str = "0", rotation: int = 0,
          irregular: bool = False) -> None:
    with av.open(video_file.url(path), "w", options={"movflags": movflags}) as out:
        stream = out.add_stream(codec, rate=12, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        if irregular:
            stream.codec_context.time_base = stream.time_base = fractions.Fraction(1, 24)
        for number, picture in enumerate(_pictures(30, 64, 96)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if irregular:
                frame.pts, frame.time_base = 2 * number + number % 3 // 2, fractions.Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def whole_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the paths of whole mp4, jpeg and png files of many kinds, written into `folder`."""
    x264 = {"bf": "3", "g": "10", "preset": "ultrafast"}
    _film(folder / "h264.mp4", "libx264", x264)
    _film(folder / "turned.mp4", "libx264", {**x264, "bf": "0"}, rotation=90)
    _film(folder / "front.mp4", "libx264", x264, movflags="faststart")
    _film(folder / "fragments.mp4", "libx264", x264, movflags="frag_keyframe+empty_moov")
    _film(folder / "irregular.mp4", "libx264", x264, irregular=True)
    _film(folder / "mpeg4.mp4", "mpeg4", {"g": "10"})
    picture = Image.fromarray(next(_pictures(1, 80, 120)))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "plain.jpeg", exif=exif)
    picture.save(folder / "progressive.jpeg", progressive=True)
    picture.convert("CMYK").save(folder / "inks.jpeg")
    picture.convert("L").save(folder / "grey.jpeg")
    picture.save(folder / "plain.png")
    picture.quantize(16).save(folder / "palette.png", transparency=1)
    picture.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.arange(9600, dtype=np.uint16).reshape(80, 120) * 6).save(folder / "deep.png")
    return sorted(folder.iterdir())


# Damage


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Returns the file with one to three kinds of damage: bytes, numbers, gaps, insertions, a missing end."""
    result = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if len(result) > 16:
            _DAMAGES[rng.integers(len(_DAMAGES))](result, rng)
    if data[1:4] == b"PNG" and rng.random() < 0.7:
        _repair_sums(result)
    return bytes(result)


def _place(data: bytearray, rng) -> int:
    """Returns a position in the file, half of the time in the metadata rather than in the pixels."""
    moov = data.find(b"moov")
    start, stop = (moov, len(data)) if moov > len(data) // 2 else (0, min(len(data), 1500))
    if rng.random() < 0.5:
        start, stop = 0, len(data)
    return int(rng.integers(start, max(stop - 8, start + 1)))


def _bytes(data, rng):
    for _ in range(rng.integers(1, 9)):
        data[_place(data, rng)] = rng.integers(256)


def _bits(data, rng):
    for _ in range(rng.integers(1, 9)):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def _number(data, rng):
    values = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, int(rng.integers(2**32)), int(rng.integers(2**16)))
    place = _place(data, rng)
    data[place:place + 4] = struct.pack(">I", values[rng.integers(len(values))])


def _gap(data, rng):
    place = _place(data, rng)
    del data[place:place + int(2 ** rng.uniform(0, 9))]


def _insertion(data, rng):
    place = _place(data, rng)
    data[place:place] = rng.bytes(int(2 ** rng.uniform(0, 9)))


def _repetition(data, rng):
    place, length = _place(data, rng), int(2 ** rng.uniform(0, 10))
    data[place:place] = data[place:place + length]


def _end(data, rng):
    del data[int(rng.integers(16, len(data))):]


_DAMAGES = (_bytes, _bits, _number, _number, _gap, _insertion, _repetition, _end)


def _repair_sums(data: bytearray) -> None:
    """Recomputes the checksums of a PNG's chunks, so that the damage is not caught by them."""
    place = 8
    while place + 12 <= len(data):
        length = struct.unpack(">I", data[place:place + 4])[0]
        end = place + 8 + length
        if end + 4 > len(data):
            return
        data[end:end + 4] = struct.pack(">I", zlib.crc32(data[place + 4:end]))
        place = end + 4


# Reading, in a separate process


def read_all() -> None:
    """Reads the files whose paths arrive on standard input, and prints a line of JSON for each."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    model = configs.nano()
    inputs = configs.InputConfig(max_frames=8, overlap_margins=(1, 1), max_read_seconds=WALL_SECONDS)
    tokenizer = tokenizers.train_small(["0.0 1.5"] * 2, model.text.vocab_size)
    print(json.dumps({"peak": _peak_mib()}), flush=True)
    for line in sys.stdin:
        path, start, reason = line.strip(), time.process_time(), ""
        example = types.Example(annotations=(), **({"video": path} if path.endswith("mp4") else
                                                   {"images": (path,)}))
        try:
            crops, _ = media.see(example, model, inputs, tokenizer)
            outcome = "crops" if crops.patches.dtype == np.uint8 and len(crops.patches) else "nothing"
        except media.pixels_lib.MediaError as error:
            outcome, reason = ("error" if path in str(error) else "nameless error"), str(error)
        except ValueError as error:
            outcome, reason = "other error", repr(error)
        except Exception as error:  # any other exception breaks a rule
            outcome, reason = "exception", repr(error)
        print(json.dumps({"outcome": outcome, "reason": reason, "seconds": time.process_time() - start,
                          "peak": _peak_mib()}), flush=True)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of a file: crops, error, or a broken rule; CPU seconds; growth of memory so far, MiB."""
    kind: str
    reason: str = ""
    seconds: float = 0.0
    memory: float = 0.0

    @property
    def is_fine(self) -> bool:
        return self.kind in ("crops", "error") and self.seconds <= CPU_SECONDS and self.memory <= MEMORY_MIB


class Reading:
    """The reading process; it is replaced if it crashes or hangs."""

    def __init__(self):
        self._process = None

    def _start(self):
        root = str(pathlib.Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks import damage; damage.read_all()"], text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": root})  # PYTHONSAFEPATH may exclude the current folder
        first = self._process.stdout.readline()
        if not first:
            raise RuntimeError(f"the reading process must start; it ended with {self._process.wait()}")
        self._peak = json.loads(first)["peak"]

    def read(self, path: pathlib.Path) -> Outcome:
        if self._process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # of a crashed process, which does not answer
            self._process.stdin.write(f"{path}\n")
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(WALL_SECONDS):
                self.close()
                return Outcome("hang", seconds=WALL_SECONDS)
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self.close()
            return Outcome("crash", f"exit status {status}")
        answer = json.loads(line)
        return Outcome(answer["outcome"], answer["reason"], answer["seconds"], answer["peak"] - self._peak)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def outcomes(count: int, seed: int, folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, Outcome]]:
    """Yields (damaged file, outcome); the file is deleted at the next iteration."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    files = whole_files(whole)
    reading = Reading()
    try:
        for number in range(count):
            source = files[number % len(files)]
            path = folder / f"damaged_{number}_{source.name}"
            path.write_bytes(damaged(source.read_bytes(), np.random.default_rng((seed, number))))
            yield path, reading.read(path)
            path.unlink()
    finally:
        reading.close()
