"""Marks are drawn at their places, keep their colours, and survive being written to files."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from molmo2_jax import render
from molmo2_jax.inputs import points
from molmo2_jax.render import pictures

GREY = np.full((60, 80, 3), 128, np.uint8)


def changed(picture):
    """Returns bool[h, w]: where a drawing on GREY differs from it."""
    return (np.abs(picture.astype(int) - 128) > 20).any(-1)


def centre(mask):
    rows, columns = np.nonzero(mask)
    return (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2


def test_a_predicted_point_is_a_cross_in_its_colour_at_its_place():
    picture = pictures.draw(GREY, predicted=[("2", 20.0, 45.0)])
    assert picture.shape == (288, 384, 3) and picture.dtype == np.uint8
    x, y = centre(changed(picture))
    assert abs(x / 4.8 - 20) < 0.3 and abs(y / 4.8 - 45) < 0.3
    np.testing.assert_allclose(picture[216, 96], pictures.colour("2"), atol=6)
    assert changed(picture).mean() < 0.02


def test_a_true_point_is_a_ring_that_leaves_the_object_visible():
    picture = pictures.draw(GREY, true=[("1", 40.0, 30.0)])
    assert not changed(picture)[144, 192] and changed(picture).any()
    np.testing.assert_allclose(centre(changed(picture)), (192, 144), atol=1.5)


def test_a_mask_tints_its_pixels_and_no_others():
    mask = np.zeros((60, 80), bool)
    mask[10:30, 40:70] = True
    tinted = changed(pictures.draw(GREY, masks=[("1", mask)]))
    assert tinted[60:140, 200:330].all() and not tinted[:44].any() and not tinted[:, :188].any()


def test_large_frames_are_not_enlarged_and_small_ones_keep_their_shape():
    assert pictures.draw(np.zeros((300, 500, 3), np.uint8)).shape == (300, 500, 3)
    assert pictures.draw(np.zeros((20, 10, 3), np.uint8)).shape == (576, 288, 3)


def test_ids_keep_their_colours_and_the_first_eight_differ():
    assert len({pictures.colour(str(number)) for number in range(1, 9)}) == 8
    assert pictures.colour("dog") == pictures.colour("dog")


def test_tracks_leave_a_trail_only_behind_objects_that_are_there():
    frames = np.stack([GREY] * 3)
    drawn = pictures.track(frames, [{"1": (10, 30)}, {"1": (40, 30)}, {}], labels=["0", "1", "2"])
    assert len(drawn) == 3
    assert changed(drawn[1])[144, 120] and not changed(drawn[0])[144, 120]  # between the two positions
    assert not changed(drawn[2])[100:].any()


def test_a_contact_sheet_holds_every_picture_in_reading_order():
    cells = [np.full((10, 20, 3), value, np.uint8) for value in (50, 100, 150, 200, 250)]
    sheet = pictures.contact_sheet(cells, columns=3, gap=2)
    assert sheet.shape == (2 * 12 + 2, 3 * 22 + 2, 3)
    middles = [sheet[2 + 12 * (n // 3) + 5, 2 + 22 * (n % 3) + 10, 0] for n in range(5)]
    assert middles == [50, 100, 150, 200, 250]
    with pytest.raises(ValueError, match="at least one picture"):
        pictures.contact_sheet([])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_plays_all_pictures_at_their_times(kind):
    cells = [np.full((16, 16, 3), value, np.uint8) for value in (0, 120, 240)]
    with Image.open(io.BytesIO(pictures.animation(cells, [0.5, 0.2, 0.1], kind))) as read:
        assert read.n_frames == 3
        levels, times = [], []
        for number in range(3):
            read.seek(number)
            levels.append(np.asarray(read.convert("RGB")).mean())
            times.append(read.info.get("duration"))
    np.testing.assert_allclose(levels, (0, 120, 240), atol=4)
    if kind != "WEBP":  # Pillow reports a WEBP frame's time only after decoding it
        assert times == [500, 200, 100]


def test_a_video_file_may_have_a_colon_in_its_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures.write_video("12:30.mp4", [np.zeros((16, 16, 3), np.uint8)], 4)
    assert (tmp_path / "12:30.mp4").stat().st_size


def test_a_video_file_holds_the_pictures(tmp_path):
    cells = [np.full((33, 48, 3), value, np.uint8) for value in (20, 120, 220)]
    pictures.write_video(tmp_path / "a.mp4", cells, 4)
    with av.open(str(tmp_path / "a.mp4")) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 4
    assert read[0].shape == (32, 48, 3)
    np.testing.assert_allclose([frame.mean() for frame in read], (20, 120, 220), atol=4)


class Said:
    """Stands for a generate.Answer."""
    points = (points.Point(0.5, "1", 24.0, 16.0), points.Point(1.0, "1", 8.0, 16.0))


@pytest.fixture
def clip(tmp_path):
    pictures.write_video(tmp_path / "clip.mp4", [np.full((32, 48, 3), 128, np.uint8)] * 12, 6)
    return str(tmp_path / "clip.mp4")


def test_an_answer_about_a_video_is_drawn_at_its_times(tmp_path, clip):
    render.save_answer(Said(), str(tmp_path / "a.png"), video=clip)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (288 + 16, 2 * 432 + 24, 3)  # two times, side by side
    assert changed(sheet[8:296, 8:440])[140:148, 212:220].all()
    render.save_answer(Said(), str(tmp_path / "a.gif"), video=clip, fps=4)
    with Image.open(tmp_path / "a.gif") as read:
        has_mark = []
        for number in range(read.n_frames):
            read.seek(number)
            has_mark.append(changed(np.asarray(read.convert("RGB")))[60:].any())
    assert has_mark == [False, False] + [True] * 6  # from 0.5 s on
    render.save_answer(Said(), str(tmp_path / "a.mp4"), video=clip)
    assert (tmp_path / "a.mp4").stat().st_size > 500


def test_an_answer_about_images_is_drawn_on_the_image_it_names(tmp_path):
    paths = [str(tmp_path / name) for name in ("one.png", "two.png")]
    for path in paths:
        Image.fromarray(GREY).save(path)
    said = Said()
    said.points = (points.Point(2.0, "1", 40.0, 30.0),)
    render.save_answer(said, str(tmp_path / "a.jpg"), images=paths)
    sheet = np.asarray(Image.open(tmp_path / "a.jpg"))
    assert not changed(sheet[8:296, 8:392])[60:].any()
    assert changed(sheet[8:296, 400:784])[140:148, 188:196].all()


def test_a_file_of_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must end in one of .png.*; got 'a.bmp'"):
        render.save_answer(Said(), "a.bmp", images=("x.png",))
