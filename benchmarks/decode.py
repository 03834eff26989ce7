"""Sampled frames per second and core of our reader, torchcodec and decord, on the same videos in one run.

  python -m benchmarks.decode [--folder=/tmp/films] [--rows=360] [--keys=12] [--seconds=10] [--repeats=2]

Each film is opened, sampled at 2 frames/s (at most 128 frames, evenly spaced) and decoded to RGB at full
size; then the frames are resized to 378 x 378 by the model's rule: ours in numpy, the others' with torch. One
thread each, CPU time, in alternation; the best of the repeats counts. decord is given frame numbers. A peer
that is not installed is left out, and the table says so:

  pip install torchcodec==0.11.1 decord      # and FFmpeg 4 .. 8: apt-get install libavdevice59
"""

import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np
from absl import app
from absl import flags

from benchmarks import films
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import video

_FOLDER = flags.DEFINE_string("folder", "/tmp/molmo2_films", "Where films are kept (1.2 GB for all).")
_ROWS = flags.DEFINE_multi_integer("rows", list(films.SIZES), "Heights of the films.")
_KEYS = flags.DEFINE_multi_integer("keys", list(films.UNIT), "Frames from keyframe to keyframe.")
_SECONDS = flags.DEFINE_multi_integer("seconds", [10, 60, 600], "Lengths of the films.")
_REPEATS = flags.DEFINE_integer("repeats", 2, "Timed readings of each film by each reader.")
MAX_FRAMES, SIDE = 128, 378

Read = Callable[[pathlib.Path, np.ndarray, np.ndarray], np.ndarray]  # path, seconds, frame numbers -> pixels


def _ours(path, seconds, numbers):
    return video.read(path, max_frames=MAX_FRAMES, seconds=seconds).pixels


def _torchcodec(path, seconds, numbers):
    from torchcodec import decoders
    decoder = decoders.VideoDecoder(str(path.resolve()), dimension_order="NHWC", num_ffmpeg_threads=1,
                                    seek_mode="exact")
    begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    times = np.clip(begin + seconds, begin + video.EDGE_SECONDS, end - video.EDGE_SECONDS)
    return decoder.get_frames_played_at(times.tolist()).data.numpy()


def _decord(path, seconds, numbers):
    import decord
    return decord.VideoReader(str(path.resolve()), num_threads=1).get_batch(numbers.tolist()).asnumpy()


def _resized(pixels):
    for picture in pixels:
        pixels_lib.resize(picture, SIDE, SIDE)


def _resized_by_torch(pixels):
    import torch
    for picture in pixels:
        planes = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        planes = torch.nn.functional.interpolate(planes, size=(SIDE, SIDE), mode="bilinear")
        planes.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous()


def readers() -> tuple[dict[str, tuple[Read, Callable]], list[str]]:
    """Returns {name: (reader, resizer)} of the readers that work here, and a line about each other one."""
    found, missing = {"ours": (_ours, _resized)}, []
    for name, read in (("torchcodec", _torchcodec), ("decord", _decord)):
        try:
            import torch
            torch.set_num_threads(1)
            module = __import__(name)
            found[f"{name} {module.__version__}"] = (read, _resized_by_torch)
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: no FFmpeg for torchcodec
            missing.append(f"{name} is left out: {str(error).splitlines()[0]}")
    return found, missing


def measure(path: pathlib.Path, peers: dict) -> tuple[int, dict[str, tuple[float, float]], bool]:
    """Returns (frames, {reader: CPU seconds to decode, and with resizing}, whether all pixels are equal)."""
    index = video.index(path)
    seconds = video.sample_seconds(index.duration, MAX_FRAMES)
    numbers, times, equal = video.frames_at(index, seconds), {}, True
    expected = None
    for read, resize in peers.values():  # one-time setup is not timed
        resize(read(path, seconds[:1], numbers[:1]))
    for _ in range(_REPEATS.value):
        for name, (read, resize) in peers.items():
            start = time.process_time()
            pixels = read(path, seconds, numbers)
            middle = time.process_time()
            resize(pixels)
            stop = time.process_time()
            times.setdefault(name, []).append((middle - start, stop - start))
            expected = pixels if expected is None else expected
            equal = equal and np.array_equal(pixels, expected)
            del pixels
    return len(seconds), {name: tuple(map(min, zip(*runs))) for name, runs in times.items()}, equal


def main(_) -> None:
    peers, missing = readers()
    print("\n".join(missing))
    names = list(peers)
    print("Frames per CPU second, to full-size RGB / and resized to 378 x 378; ratio to the best peer\n")
    print("| film | frames |", " | ".join(names), "| ratio | same pixels |")
    print("|---" * (4 + len(names)) + "|")
    ratios = ([], [])
    for rows in _ROWS.value:
        for keys in _KEYS.value:
            for length in _SECONDS.value:
                path = films.film(pathlib.Path(_FOLDER.value), rows, keys, length)
                count, times, equal = measure(path, peers)
                shown = [" / ".join(f"{count / one:.0f}" for one in times[name]) for name in names]
                here = [min((times[name][i] for name in names[1:]), default=np.nan) / times["ours"][i]
                        for i in range(2)]
                for all_ratios, ratio in zip(ratios, here):
                    all_ratios.append(ratio)
                print(f"| {rows}p, key every {keys}, {length} s | {count} |", " | ".join(shown),
                      f"| {here[0]:.2f} / {here[1]:.2f} | {'yes' if equal else 'NO'} |", flush=True)
    for what, values in zip(("decoded", "and resized"), ratios):
        print(f"{what}: median ratio {statistics.median(values):.2f}, smallest {min(values):.2f}")


if __name__ == "__main__":
    app.run(main)
