"""Which file is opened, which of its streams is read, and what its packets say."""

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

BLUE, RED = (0, 0, 255), (255, 0, 0)


def add_film(out, colour, *, columns=64, rows=48, codec="libx264", rate=10, **fields):
    stream = out.add_stream(codec, rate=fractions.Fraction(rate))
    stream.width, stream.height, stream.pix_fmt = columns, rows, "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.disposition = fields.get("disposition", Disposition(0))
    return stream, np.full((rows, columns, 3), colour, np.uint8)


def write(path, films, counts):
    """Writes `counts[i]` frames of film i (stream, picture), one stream after the other."""
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
