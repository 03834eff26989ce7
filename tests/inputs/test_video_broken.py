"""Videos that are damaged, cut, empty, or change their frame size are rejected with the reason."""

import fractions

import av
import numpy as np
import pytest
from av.stream import Disposition

from molmo2_jax.inputs import video
from tests.inputs import films


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films.write(tmp_path_factory.mktemp("films") / "film.mp4", 90, between=3)


# Frames of several sizes


def joined(path, sizes, *, count=24, codec="libx264", ending="ts"):
    """Writes one stream of parts, `count` frames each at 12 frames/s, of the given (columns, rows)."""
    parts = []
    for columns, rows in sizes:
        part = path.with_name(f"part_{columns}.{ending}")
        with av.open(str(part), "w") as out:
            stream = out.add_stream(codec, rate=12, options={"bf": "2", "g": "12"})
            stream.width, stream.height, stream.pix_fmt = columns, rows, "yuv420p"
            for number in range(count):
                picture = films.numbered(number, rows, columns)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                # A late start keeps the muxer from moving the first part to make its times positive.
                frame.pts, frame.time_base = 12 + number + len(parts) * count, fractions.Fraction(1, 12)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("size", [None, (24, 24)])
@pytest.mark.parametrize("name, codec, second", [
    ("film.ts", "libx264", 2.0), ("film.ts", "mpeg2video", 2.0), ("film.h264", "libx264", 0.96)])
def test_a_film_whose_frame_size_changes_is_refused_with_the_time(name, codec, second, size, tmp_path):
    path = joined(tmp_path / name, [(64, 32), (128, 64)], codec=codec, ending=name.split(".")[1])
    with pytest.raises(video.MediaError, match=f"{name}: all frames must have one size; got 64 x 32, then "
                                               f"128 x 64 from {second:.3f} seconds on"):
        video.read(path, max_frames=3, size=size)


def test_a_clip_in_which_the_size_does_not_change_is_read(tmp_path):
    path = joined(tmp_path / "film.ts", [(64, 32), (128, 64)])
    assert video.read(path, max_frames=3, clip=(0.0, 1.5), size=(24, 24)).width == 64
    late = video.read(path, max_frames=3, clip=(2.0, 3.5))
    assert (late.width, [films.number_of(one) for one in late.pixels]) == (128, [0, 9, 18])


# Broken files


def audio_only(path, cover=False):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        if cover:
            picture = out.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 32, "rgb24"
            picture.disposition = Disposition.attached_pic
            out.mux(picture.encode(av.VideoFrame.from_ndarray(films.numbered(1), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return path


def no_frames(path):
    """Writes an mp4 whose video track is empty."""
    films.write(path, 1)
    contents = path.read_bytes()
    for table in (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"stss"):
        place = contents.find(table)
        if place > 0:
            count = place + (12 if table == b"stsz" else 8)
            contents = contents[:count] + bytes(4) + contents[count + 4:]
    path.write_bytes(contents)
    return path


def test_broken_files_are_named_with_the_reason(film, tmp_path, capfd):
    contents = film.read_bytes()
    cases = {
        "missing.mp4": (None, "there is no such file"),
        "empty.mp4": (b"", "is empty"),
        "cut.mp4": (contents[:len(contents) // 2], "cannot be opened as a video"),
        "notes.mp4": (b"these are notes, not pictures\n" * 50, "cannot be opened as a video"),
        "pointer.mp4": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                        "cannot be opened as a video: a Git LFS pointer"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "cannot be opened as a video"),
    }
    for name, (data, reason) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(video.MediaError, match=f"{name}: {reason}"):
            video.read(tmp_path / name, max_frames=8)
    with pytest.raises(video.MediaError, match="sound.m4a: has no video stream"):
        video.read(audio_only(tmp_path / "sound.m4a"), max_frames=8)
    with pytest.raises(video.MediaError, match="covered.mp4: has no video stream"):
        video.read(audio_only(tmp_path / "covered.mp4", cover=True), max_frames=8)
    with pytest.raises(video.MediaError, match="hollow.mp4: "):
        video.read(no_frames(tmp_path / "hollow.mp4"), max_frames=8)
    with pytest.raises(video.MediaError, match="there is no such file"):
        video.read(tmp_path, max_frames=8)
    assert capfd.readouterr().err == ""


def test_a_film_cut_short_behind_its_index_is_refused(tmp_path):
    path = films.write(tmp_path / "front.mp4", 60, options={"bf": "0", "movflags": "faststart"})
    moved = tmp_path / "faststart.mp4"
    with av.open(str(path)) as source, av.open(str(moved), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    contents = moved.read_bytes()
    assert contents.find(b"moov") < contents.find(b"mdat")
    for share in (0.6, 0.8, 0.95):
        moved.write_bytes(contents[:int(len(contents) * share)])
        with pytest.raises(video.MediaError, match="faststart.mp4: "):
            video.read(moved, max_frames=8)


def test_damaged_films_give_frames_or_a_named_error(film, tmp_path, capfd):
    contents = film.read_bytes()
    rng = np.random.default_rng(1)
    outcomes = {"frames": 0, "error": 0}
    for _ in range(60):
        damaged = bytearray(contents)
        for place in rng.integers(0, len(contents), rng.integers(1, 30)):
            damaged[place] = rng.integers(256)
        path = tmp_path / "damaged.mp4"
        path.write_bytes(damaged)
        try:
            frames = video.read(path, max_frames=8, size=(16, 16))
        except video.MediaError as error:
            assert "damaged.mp4: " in str(error)
            outcomes["error"] += 1
        else:
            assert frames.pixels.shape == (len(frames.seconds), 16, 16, 3)
            outcomes["frames"] += 1
    assert outcomes["frames"] and outcomes["error"]
    assert capfd.readouterr().err == ""
