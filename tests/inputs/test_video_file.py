"""Which file is opened, which of its streams is read, and what its packets contain."""

import contextlib
import fractions
import pathlib
import shutil

import av
import numpy as np
import pytest
from av.stream import Disposition

from molmo2_jax.inputs import video
from molmo2_jax.inputs import video_file
from tests.inputs import films

BLUE, RED = (0, 0, 255), (255, 0, 0)


def add_film(out, colour, *, columns=64, rows=48, codec="libx264", rate=10, **fields):
    stream = out.add_stream(codec, rate=fractions.Fraction(rate))
    stream.width, stream.height, stream.pix_fmt = columns, rows, "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.disposition = fields.get("disposition", Disposition(0))
    return stream, np.full((rows, columns, 3), colour, np.uint8)


def write(path, films, counts):
    """Writes `counts[i]` frames of video i (stream, picture), one stream after the other."""
    with av.open(str(path), "w") as out:
        films = [add_film(out, **film) for film in films]
        for (stream, picture), count in zip(films, counts):
            for _ in range(count):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write(tmp_path_factory.mktemp("films") / "film.mp4", [{"colour": BLUE}], [20])


@pytest.mark.parametrize("name", [
    "2024-01-01T12:30:00.mp4", "concat:a.mp4", "file:a.mp4", "http:x.mp4", "a: b.mp4", ":.mp4", "pipe:0",
    "data:a.mp4", "subfile,,start,0,end,0,,:a.mp4", "-a.mp4", "%d é #1.mp4"])
def test_a_path_that_exists_is_a_file_whatever_its_name(name, film, tmp_path):
    shutil.copy(film, tmp_path / name)
    with contextlib.chdir(tmp_path):
        for path in (name, pathlib.Path(name), pathlib.Path(name).absolute()):
            assert len(video.read(path, max_frames=4).seconds) == 4


def test_a_path_with_a_colon_is_read_again_by_seeking(tmp_path, monkeypatch):
    path = write(tmp_path / "12:30.mp4", [{"colour": BLUE}], [60])
    monkeypatch.setattr(video_file, "HELD_BYTES", 0)
    with contextlib.chdir(tmp_path):
        assert len(video.read(path.name, max_frames=4).seconds) == 4


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
@pytest.mark.parametrize("default", [0, 1])
def test_the_stream_marked_as_default_is_read(ending, default, tmp_path):
    marks = [Disposition.default if number == default else Disposition(0) for number in range(2)]
    path = write(tmp_path / f"two.{ending}", [
        {"colour": BLUE, "disposition": marks[0]},
        {"colour": RED, "disposition": marks[1], "columns": 32, "rows": 32}], [20, 30])
    frames = video.read(path, max_frames=4)
    with av.open(str(path)) as container:
        assert container.streams.best("video").index == default
    assert (frames.width, frames.height) == ((64, 48), (32, 32))[default]
    assert frames.duration == pytest.approx((2, 3)[default])
    assert abs(frames.pixels[0, 0, 0].astype(int) - (BLUE, RED)[default]).max() < 10


@pytest.mark.parametrize("picture", [0, 1])
def test_a_still_preview_beside_the_film_is_not_read(picture, tmp_path):
    films = [{"colour": BLUE, "disposition": Disposition.default}]
    films.insert(picture, {"colour": RED, "codec": "mjpeg", "columns": 160, "rows": 120})
    counts = [20]
    counts.insert(picture, 1)
    frames = video.read(write(tmp_path / "preview.mkv", films, counts), max_frames=4)
    assert (frames.width, frames.height, frames.duration) == (64, 48, pytest.approx(2))


@pytest.mark.parametrize("mark", [Disposition.attached_pic, Disposition.attached_pic | Disposition.default])
def test_a_cover_picture_is_never_the_film(mark, film):
    class Stream:
        def __init__(self, disposition):
            self.disposition = disposition

    class Streams:
        def __init__(self, *video):
            self.video = video

        def best(self, kind):
            return self.video[0]

    class Container:
        def __init__(self, *video):
            self.streams = Streams(*video)

    cover, plain, default = (Stream(one) for one in (mark, Disposition(0), Disposition.default))
    assert video_file._best_stream(Container(cover, plain)) is plain
    assert video_file._best_stream(Container(cover, plain, default)) is default
    assert video_file._best_stream(Container(cover)) is None


# Joined videos


def part(path, numbers, start, *, codec="libx264"):
    """Returns a file of the frames of the given numbers at 30 frames/s from `start` seconds on."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=30, options={"bf": "2", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        packets = []
        for number in numbers:
            packets += stream.encode(av.VideoFrame.from_ndarray(films.numbered(number), format="rgb24"))
        for packet in packets + stream.encode(None):
            moved = round(start / packet.time_base)
            packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
            out.mux(packet)
    return path.read_bytes()


STARTS = [(1, 1, 1), (1000, 1, 500), (1, 2, 3), (1, 1.9, 2.8), (1, 100, 5000), (90_000, 1, 1), (1, 1.95, 1)]


def joined_parts(path, starts, codec):
    path.write_bytes(b"".join(
        part(path.with_stem("part"), range(30 * place, 30 * place + 30), start, codec=codec)
        for place, start in enumerate(starts)))
    return path


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("starts", STARTS)
def test_parts_joined_to_one_film_are_all_shown(starts, codec, held, tmp_path, monkeypatch):
    if not held:
        monkeypatch.setattr(video_file, "HELD_BYTES", 0)
        monkeypatch.setattr(video_file, "SEEK_PACKETS", 1)
    path = joined_parts(tmp_path / "film.ts", starts, codec)
    contents = video.index(path)
    assert len(contents.ticks) == 90 and contents.duration == pytest.approx(3, abs=0.01)
    frames = video.read(path, max_frames=16, seconds=np.arange(0, 90, 6) / 30 + 0.001)
    assert [films.number_of(picture) for picture in frames.pixels] == list(range(0, 90, 6))


@pytest.mark.parametrize("starts", STARTS)
def test_no_part_of_a_joined_program_stream_is_lost_in_silence(starts, tmp_path):
    path = joined_parts(tmp_path / "film.mpg", starts, "mpeg2video")
    try:
        contents = video.index(path)
    except video.MediaError as error:
        assert "film.mpg: is joined from parts whose time stamps do not fit together" in str(error)
    else:
        assert len(contents.ticks) == 90 and contents.duration == pytest.approx(3, abs=0.1)


def test_a_gap_of_some_seconds_stays_a_gap(tmp_path):
    path = tmp_path / "film.ts"
    path.write_bytes(part(path, range(30), 1) + part(path, range(30, 60), 6))
    contents = video.index(path)
    assert len(contents.ticks) == 60 and contents.duration == pytest.approx(6)
    frames = video.read(path, max_frames=3, seconds=np.array([0.5, 3.0, 5.5]))
    assert [films.number_of(picture) for picture in frames.pixels] == [15, 29, 45]
