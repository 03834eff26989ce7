"""Media in memory, whole and as kept frames, against the files they came from."""

import gc
import os
import pickle

import numpy as np
import pytest

from molmo2_jax.inputs import held_file
from molmo2_jax.inputs import kept_video
from molmo2_jax.inputs import pixels
from molmo2_jax.inputs import video
from tests.inputs import films

QUALITY = 95
MEAN_ERROR = 1.0   # of 255, mean of absolute differences after JPEG at QUALITY; measured: 0.45
SMALL_ERROR = 2.0  # of frames of 20 x 20 pixels, where neighbours differ more; measured: 1.1
SETTINGS = dict(fps=2.0, max_side=378, quality=QUALITY)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film of 6 seconds."""
    return films.write(tmp_path_factory.mktemp("films") / "film.mp4", 180, between=3)


def keep(film, **how):
    return video.keep(film, name="film", **{**SETTINGS, "max_frames": (8,), **how})


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(other))


@pytest.mark.parametrize("name, how", [
    ("h264.mp4", {}), ("film.mkv", {}), ("film.ts", {}), ("raw.h264", {"format": "h264"}),
    ("film.avi", {"codec": "mpeg4"})])
def test_a_video_in_memory_is_read_to_the_bit(tmp_path, name, how):
    path = films.write(tmp_path / name, 60, **how)
    held = held_file.HeldFile(name, path.read_bytes())
    assert equal(video.read(held, max_frames=5), video.read(path, max_frames=5))
    assert equal(video.read(pickle.loads(pickle.dumps(held)), max_frames=5), video.read(path, max_frames=5))


def test_a_held_file_leaves_nothing_when_it_is_gone(tmp_path):
    held = held_file.HeldFile("a.txt", b"content")
    path = os.fspath(held)
    with open(path, "rb") as file:
        assert file.read() == b"content"
    del held
    gc.collect()
    assert not os.path.exists(path)


def test_errors_about_a_held_file_have_its_name():
    with pytest.raises(pixels.MediaError, match=r"^media/a\.jpg: "):
        pixels.load(held_file.HeldFile("media/a.jpg", b"no image"))
    with pytest.raises(pixels.MediaError, match=r"^media/a\.mp4: is empty"):
        video.read(held_file.HeldFile("media/a.mp4", b""), max_frames=4)


@pytest.mark.parametrize("how", [
    {}, {"clip": (1.3, 4.25)}, {"clip": (2.0, 100.0)}, {"tracking_fps": 2.0}, {"max_frames": (4,)},
    {"max_frames": (4, 30)}])
@pytest.mark.parametrize("shown", ["number", "pixels"])
def test_kept_frames_are_those_of_the_file(film, how, shown):
    how = {"max_frames": (8,), **how}
    kept = pickle.loads(pickle.dumps(keep(film, **how)))
    for limit in how["max_frames"]:
        one, other = (video.read(source, **{**how, "max_frames": limit}, fps=2.0, size=None)
                      for source in (kept, film))
        assert one.media.sizes == other.media.sizes and (one.duration, one.fps) == (other.duration, other.fps)
        np.testing.assert_array_equal(one.seconds, other.seconds)
        if shown == "number":
            assert [films.number_of(a) for a in one.pixels] == [films.number_of(a) for a in other.pixels]
        else:
            error = np.abs(one.pixels.astype(int) - other.pixels).mean()
            assert error < MEAN_ERROR
            assert error > 0   # it did come from the JPEGs


@pytest.mark.parametrize("how", [
    {"max_frames": 30}, {"max_frames": 20, "fps": 3.0}, {"max_frames": 8, "tracking_fps": 5.0},
    {"max_frames": 8, "clip": (0.9, 2.0)}])
def test_a_rule_that_needs_another_frame_is_refused_by_name(film, how):
    kept = keep(film)
    with pytest.raises(pixels.MediaError, match=r"film: times must show one of the 8 frames that were kept "
                                                r"for at most 8 frames at 2 frames/s; got one that shows a "
                                                r"frame after \d+\.\d{3} seconds"):
        video.read(kept, **{"fps": 2.0, **how})


def test_a_time_before_the_first_kept_frame_is_refused(film):
    kept = keep(film, clip=(2.0, 4.0))
    assert len(video.read(kept, max_frames=8, clip=(2.0, 4.0)).seconds) == 5
    with pytest.raises(pixels.MediaError, match="got one that shows a frame after 0.000 seconds"):
        video.read(kept, max_frames=8)


def test_frames_are_cut_to_the_longest_side_by_each_side(film):
    frames = video.read(film, max_frames=8, size=(20, 20))
    kept = keep(film, max_side=20)
    small = video.read(kept, max_frames=8, size=(20, 20))
    assert np.abs(small.pixels.astype(int) - frames.pixels).mean() < SMALL_ERROR
    assert small.media.sizes == ((64, 32),)   # of the source: annotations are relative to it


def test_a_damaged_kept_frame_is_named(film):
    kept = keep(film)
    broken = kept_video.KeptVideo(**{**vars(kept), "jpegs": (b"broken", *kept.jpegs[1:])})
    with pytest.raises(pixels.MediaError, match="film: its kept frame 0 cannot be decoded"):
        video.read(broken, max_frames=8)
