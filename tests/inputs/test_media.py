"""An example's media of any kind become crops; errors name the file."""

import dataclasses
import threading

import av
import numpy as np
import pytest
from PIL import Image

from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import media
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.inputs import video

NANO, INPUTS = config.nano(), config.InputConfig(max_frames=3, max_crops=2, overlap_margins=(1, 1))
TOKENIZER = tokenizers.train_small(["0.0 1.5 Image subtitle"] * 2, NANO.text.vocab_size)


def see(**fields):
    return media.see(types.Example(annotations=(), **fields), NANO, INPUTS, TOKENIZER)


@pytest.fixture
def film(tmp_path):
    """Three seconds at 4 frames a second, each 20 levels brighter than the previous one."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for level in range(12):
            frame = np.full((48, 64, 3), 20 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(tmp_path / "a.mp4")


def test_a_video_gives_one_crop_a_frame_and_the_times_of_its_frames(film):
    crops, seen = see(video=film, clip=(1.0, 2.0), subtitles=((0.0, 0.5, "hello"),))
    assert len(crops.patches) == len(seen.seconds) == 3 and seen.is_video and seen.sizes == ((64, 48),)
    assert (seen.duration, seen.fps) == (1.0, 4.0)
    np.testing.assert_allclose(seen.seconds, [0, 0.5, 1])
    assert abs(crops.patches[0].mean() - 80) < 4  # the clip begins with the fifth frame
    assert "hello" in TOKENIZER.decode(crops.tokens)


def test_subtitles_are_cut_to_the_clip(film):
    said = ((-1.5, -0.25, "15"), (-0.75, 0.5, "1 0.5"), (0.5, 3.0, "5 1"), (1.25, 2.0, "15"))
    crops, _ = see(video=film, clip=(1.0, 2.0), subtitles=said)
    text = TOKENIZER.decode(crops.tokens)
    assert text.endswith("subtitle\n0.0 - 0.5 1 0.5\n0.5 - 1.0 5 1\n")


def test_images_give_their_sizes_and_text_alone_gives_nothing(tmp_path):
    for name, size in (("a.png", (50, 30)), ("b.png", (20, 70))):
        Image.new("RGB", size).save(tmp_path / name)
    crops, seen = see(images=(str(tmp_path / "a.png"), str(tmp_path / "b.png")))
    assert seen == types.Media(sizes=((50, 30), (20, 70))) and set(crops.image) == {-1, 0, 1}
    assert not seen.is_video
    assert see() == (None, types.Media())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.png: there is no such file"):
        see(images=(str(tmp_path / "none.png"),))


def test_a_tracking_clip_is_sampled_by_its_annotations_rate(film):
    inputs = dataclasses.replace(INPUTS, max_frames=20)
    for rate, times in ((1, np.arange(12) / 4), (2, np.arange(12) / 4)):
        example = types.Example(annotations=(), video=film, tracking_fps=rate)
        seen = media.see(example, NANO, inputs, TOKENIZER)[1]
        np.testing.assert_array_equal(seen.seconds, times)
    few = media.see(example, NANO, dataclasses.replace(INPUTS, max_frames=6), TOKENIZER)[1]
    np.testing.assert_array_equal(few.seconds, np.arange(6) / 2)
    paper = dataclasses.replace(INPUTS, max_frames=5, max_tracking_fps=2)  # 2 frames/s, cut after the fifth
    np.testing.assert_array_equal(media.see(example, NANO, paper, TOKENIZER)[1].seconds, np.arange(5) / 2)
    with pytest.raises(ValueError, match="tracking clip needs a rate"):
        media.see(dataclasses.replace(example, tracking_fps=3), NANO, inputs, TOKENIZER)


def test_media_that_take_too_long_are_cut_with_an_error_that_names_them(film, monkeypatch):
    inputs = dataclasses.replace(INPUTS, max_read_seconds=0.2)
    example = types.Example(annotations=(), video=film)
    free = threading.Event()  # threads that wait for it end only after the test
    with monkeypatch.context() as patch:
        patch.setattr(video, "read", lambda *args, **named: free.wait())
        with pytest.raises(pixels_lib.MediaError, match=r"a.mp4: must be read within 0.2 seconds"):
            media.see(example, NANO, inputs, TOKENIZER)
        patch.setattr(pixels_lib, "load", lambda path: free.wait())
        with pytest.raises(pixels_lib.MediaError, match=r"b.png, c.png: must be read within 0.2 seconds"):
            media.see(types.Example(annotations=(), images=("b.png", "c.png")), NANO, inputs, TOKENIZER)
    with pytest.raises(pixels_lib.MediaError, match=r"a.mp4: must be read within 0 seconds"):
        video.read(film, max_frames=3, max_seconds=0)  # stops by itself, between two packets
    free.set()
    assert len(see(video=film)[1].seconds) == 3
