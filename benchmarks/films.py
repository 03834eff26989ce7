"""Videos for the benchmarks, drawn and encoded once: H.264 at about the bit rates of videos on the web."""

import functools
import pathlib
import tempfile
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from molmo2_jax.inputs import video_file

FPS = 30
SIZES = {360: 640, 720: 1280, 1080: 1920}   # rows: columns
UNIT = {12: 300, 60: 300, 250: 500}         # frames encoded per keyframe distance; longer films repeat them
QUALITY = {360: "26", 720: "28", 1080: "28"}  # x264's crf: 0.5 .. 5 Mbit/s with these pictures


def scenes(rows: int, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields uint8[rows, columns, 3]: eight objects that cross a grainy, slowly panned background."""
    rng, columns = np.random.default_rng(seed), SIZES[rows]
    ground = Image.fromarray(rng.integers(0, 256, (rows // 24, columns // 24, 3), dtype=np.uint8))
    ground = np.asarray(ground.resize((columns + 128, rows + 128), Image.Resampling.BICUBIC), np.int16)
    ground = np.clip(ground + rng.integers(-6, 7, ground.shape[:2])[:, :, None], 0, 255).astype(np.uint8)
    things = [(rng.integers(0, 192, 3), rng.uniform(0, 1, 4), int(rng.integers(rows // 12, rows // 4)))
              for _ in range(8)]
    for number in range(count):
        left, top = (int(64 + 60 * np.sin(number / period)) for period in (90, 70))
        picture = ground[top:top + rows, left:left + columns].copy()
        for colour, (x, y, right, down), side in things:
            column = int((x + right * number / 150) % 1 * (columns - side))
            row = int((y + down * number / 150) % 1 * (rows - side))
            thing = picture[row:row + side, column:column + side]
            thing[:] = thing // 4 + colour.astype(np.uint8)
        yield picture


def _open(path, rows: int, keys: int) -> tuple[av.container.OutputContainer, av.VideoStream]:
    options = {"preset": "fast", "crf": QUALITY[rows], "bf": "3",
               "x264-params": f"keyint={keys}:min-keyint={keys}:scenecut=0:open-gop=0:threads=2"}
    out = av.open(video_file.url(path), "w")
    stream = out.add_stream("libx264", rate=FPS, options=options)
    stream.width, stream.height, stream.pix_fmt = SIZES[rows], rows, "yuv420p"
    return out, stream


@functools.lru_cache(maxsize=2)
def _encoded(rows: int, keys: int, count: int) -> list[tuple]:
    """Returns data, ticks shown and decoded, is keyframe, and unit of the packets of a short film."""
    with tempfile.TemporaryDirectory() as folder:
        out, stream = _open(pathlib.Path(folder, "part.mp4"), rows, keys)
        packets = []
        for picture in scenes(rows, count):
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode(None)
        out.close()
    return [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe, packet.time_base)
            for packet in packets]


def write(path, rows: int, keys: int, seconds: int) -> None:
    """Writes an mp4 with a keyframe every `keys` frames."""
    out, stream = _open(path, rows, keys)
    count, done = seconds * FPS, 0
    with out:
        while done < count:
            part = min(UNIT[keys], count - done)
            for data, pts, dts, is_key, unit in _encoded(rows, keys, part):
                packet, step = av.Packet(data), round(1 / FPS / unit)
                packet.pts, packet.dts, packet.duration = pts + done * step, dts + done * step, step
                packet.time_base, packet.is_keyframe, packet.stream = unit, is_key, stream
                out.mux(packet)
            done += part


def film(folder: pathlib.Path, rows: int, keys: int, seconds: int) -> pathlib.Path:
    """Returns the path of a video in `folder`, drawn if it does not exist yet."""
    path = folder / f"{rows}p_{keys}_{seconds}s.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"part_{path.name}"
        write(part, rows, keys, seconds)
        part.rename(path)
    return path
