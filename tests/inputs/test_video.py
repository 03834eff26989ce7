"""Sampled times, the frames on display then, and their decoding, compared with goldens and real files."""

import dataclasses
import fractions
import json
import pathlib

import av
import numpy as np
import pytest

from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import video
from molmo2_jax.inputs import video_file
from tests.inputs import films

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "goldens/frame_sampling/cases.json").read_text())
MATCH = 1e-9   # seconds; times of the goldens are printed in full


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films.write(tmp_path_factory.mktemp("films") / "film.mp4", 90, between=3)


def index_of(seconds, end):
    """Returns an index with presentation times only, which is all that frames_at needs."""
    seconds = np.array(seconds, np.float64)
    places = np.arange(len(seconds))
    return video_file.VideoIndex(seconds=seconds, ticks=places, packets=places, start=places,
                                 begin=seconds[0], end=end, width=64, height=32, fps=1.0)


# Times


def test_sampled_times_are_those_of_the_reference():
    for case in GOLDENS["time_sampler"]:
        times = video.sample_seconds(case["duration"], case["max_frames"], case["max_fps"])
        assert len(times) == case["n"], case
        np.testing.assert_allclose(times[:8], case["head"], atol=MATCH)
        np.testing.assert_allclose(times[-8:], case["tail"], atol=MATCH)
        np.testing.assert_allclose(times.sum(), case["sum"], rtol=MATCH)


def test_tracking_times_are_those_of_the_reference():
    for case in GOLDENS["tracking_sampler"]:
        assert video.tracking_rates(case["video_fps"], case["annotation_fps"]) == case["candidates"]
        times = video.tracking_seconds(case["duration"], case["max_frames"], case["video_fps"],
                                       case["annotation_fps"])
        assert len(times) == case["n"], case
        np.testing.assert_allclose(times[:6], case["head"], atol=MATCH)
        np.testing.assert_allclose(times[-3:], case["tail"], atol=MATCH)


@pytest.mark.parametrize("duration", [0.01, 0.5, 3.7, 63.5, 63.6, 1000.0])
@pytest.mark.parametrize("max_frames", [1, 2, 16, 128])
def test_sampling_keeps_within_its_limit_and_ends_on_the_last_frame(duration, max_frames):
    times = video.sample_seconds(duration, max_frames)
    assert 1 <= len(times) <= max_frames
    assert (np.diff(times) > 0).all()
    assert times[0] == 0 and (max_frames == 1 or times[-1] == duration)


@pytest.mark.parametrize("arguments, rule", [
    ((0.0, 8), "duration must be positive"), ((float("nan"), 8), "duration must be positive"),
    ((1.0, 0), "max_frames must be >= 1"), ((1.0, 8, 0.0), "fps must be positive")])
def test_impossible_sampling_is_refused(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        video.sample_seconds(*arguments)


@pytest.mark.parametrize("video_fps, annotation_fps", [
    (30, 4), (30, 0), (30, 15), (25, 2), (15, 2), (25 / 1.001, 2), (0.9, 1), (7.5, 8)])
def test_tracking_without_a_common_rate_is_refused(video_fps, annotation_fps):
    with pytest.raises(ValueError, match="tracking clip needs a rate"):
        video.tracking_seconds(5.0, 8, video_fps, annotation_fps)


@pytest.mark.parametrize("video_fps, like", [
    (30 / 1.001, 30), (60 / 1.001, 60), (120 / 1.001, 120), (240 / 1.001, 240), (59.91, 60), (29.98, 30),
    (24 / 1.001, 24), (15 / 1.001, 15)])
def test_rates_of_cameras_allow_what_the_whole_rate_allows(video_fps, like):
    assert video.tracking_rates(video_fps, 1) == video.tracking_rates(like, 1)


@pytest.mark.parametrize("video_fps, annotation_fps, rates", [
    (7.5, 1, [1, 2, 3, 4, 5, 6, 7]), (12.5, 2, [2, 4, 6, 8, 10]), (28.6, 2, [2, 4, 6, 8, 10]), (2.4, 2, [2])])
def test_a_rate_that_is_not_whole_only_bounds_the_rates_allowed(video_fps, annotation_fps, rates):
    assert video.tracking_rates(video_fps, annotation_fps) == rates


# Times to frames


def golden_times(case):
    if case["kind"] == "vfr":
        return case["frame_pts"]
    return [float(number / fractions.Fraction(case["fps"])) for number in range(case["num_frames"])]


def test_frames_shown_are_those_of_the_reference():
    for case in GOLDENS["decode"]:
        contents = index_of(golden_times(case), case["end"])
        duration = video.clip_span(contents, case["clip"])[1]
        times = video.sample_seconds(duration, case["max_frames"], case["max_fps"])
        np.testing.assert_allclose(times, case["timestamps"], atol=1e-6)
        assert video.frames_at(contents, times, case["clip"]).tolist() == case["frame_indices"], case


GOLDEN_FILES = {  # name: (golden selector, how to write it)
    "30": lambda case: case.get("fps") == "30" and case["num_frames"] == 300,
    "30000/1001": lambda case: case.get("fps") == "30000/1001",
    "2": lambda case: case.get("fps") == "2",
    "one": lambda case: case.get("num_frames") == 1,
    "vfr": lambda case: case["kind"] == "vfr"}


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_decoded_frames_are_those_of_the_reference(name, tmp_path):
    cases = [case for case in GOLDENS["decode"] if GOLDEN_FILES[name](case)]
    path = tmp_path / "golden.mp4"
    if cases[0]["kind"] == "vfr":
        unit = fractions.Fraction(1, 16000)
        films.write(path, 11, ticks=[round(second / unit) for second in cases[0]["frame_pts"]], unit=unit)
    else:
        films.write(path, cases[0]["num_frames"], fps=cases[0]["fps"])
    for case in cases:
        contents = video.index(path)
        assert contents.begin == case["begin"]
        limits = {"max_frames": case["max_frames"], "fps": case["max_fps"], "clip": case["clip"]}
        if name == "vfr":  # the encoder changes the last frame's duration; the choice must follow `end`
            limits["seconds"] = np.array(case["timestamps"])
        else:
            assert contents.end == pytest.approx(case["end"], abs=1e-6)
        frames = video.read(path, **limits)
        np.testing.assert_allclose(frames.seconds, case["timestamps"], atol=1e-6)
        assert [films.number_of(picture) for picture in frames.pixels] == case["frame_indices"], case


def test_a_clip_must_lie_in_the_video():
    contents = index_of([0.0, 1.0, 2.0], 3.0)
    for clip in [(2.0, 1.0), (1.0, 1.0), (3.0, 4.0), (-0.5, 1.0)]:
        with pytest.raises(ValueError, match="clip must satisfy 0 <= start < end"):
            video.clip_span(contents, clip)
    assert video.clip_span(contents, (1.0, 9.0)) == (1.0, 2.0)


def test_times_outside_the_stream_show_its_first_or_last_frame():
    contents = index_of([5.0, 6.0, 7.0], 8.0)
    assert video.frames_at(contents, [-9.0, 0.0, 0.999, 1.0, 3.0, 99.0]).tolist() == [0, 0, 0, 1, 2, 2]


def random_index(rng):
    """Returns (index, exact seconds since its first frame) of a video of any rate, unit and start."""
    rate = fractions.Fraction(int(rng.choice([1, 10, 24, 25, 30, 60, 120, 240])))
    rate *= fractions.Fraction(*map(int, rng.choice([(1, 1), (1000, 1001)])))
    unit = fractions.Fraction(1, int(rng.choice([1000, 12800, 90000, 1_000_000])))
    begin = int(rng.choice([0, 1, rng.integers(10**6), rng.integers(10**13)]))
    ticks = [begin + round(number / rate / unit) for number in range(rng.integers(2, 2000))]
    length = (ticks[-1] - begin) * unit + 1 / rate
    contents = index_of([float(tick * unit) for tick in ticks], float(begin * unit + length))
    contents = dataclasses.replace(contents, ticks=np.array(ticks), unit=unit, length=length)
    return contents, [(tick - begin) * unit for tick in ticks]


@pytest.mark.slow(8)
def test_a_time_that_falls_on_a_frame_shows_that_frame():
    rng = np.random.default_rng(0)
    for _ in range(300):
        contents, exact = random_index(rng)
        start = int(rng.integers(0, max(1, int(exact[-1] * 10)))) / 10 if rng.random() < 0.7 else 0.0
        clip, begin = (start, start + 1e6) if start else None, fractions.Fraction(repr(start))
        wanted = [number for number, second in enumerate(exact) if second >= begin]
        for seconds in ([float(exact[number] - begin) for number in wanted],
                        [float(exact[number]) - start for number in wanted],         # rounded twice
                        [round(float(exact[number] - begin), 6) for number in wanted]):
            assert video.frames_at(contents, seconds, clip).tolist() == wanted
        before = np.array(seconds[1:]) - 2e-6
        assert video.frames_at(contents, before, clip).tolist() == wanted[:-1]


@pytest.mark.parametrize("clip, duration", [
    ((1.2, 2.2), 1.0), ((0.1, 0.4), 0.3), ((2.2, 9.0), 0.8), ((0, 3), 3.0)])
def test_the_duration_of_a_clip_is_that_of_the_numbers_as_written(clip, duration):
    assert video.clip_span(index_of([0.0, 1.0, 2.0], 3.0), clip)[1] == duration


def test_a_film_that_starts_late_is_sampled_as_one_that_does_not(tmp_path):
    plain = video.read(films.write(tmp_path / "plain.ts", 60, between=0), max_frames=99, fps=10)
    for shift in (90_000, 123_457, 8_000_000_001):
        path = films.write(tmp_path / "late.ts", 60, between=0, shift=shift)
        late = video.read(path, max_frames=99, fps=10)
        assert late.seconds.tolist() == plain.seconds.tolist()
        assert [films.number_of(one) for one in late.pixels] == [*range(0, 60, 3), 59]


# Decoding


def test_sparse_reading_equals_decoding_everything(film):
    with av.open(str(film)) as container:
        everything = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    contents = video.index(film)
    rng = np.random.default_rng(0)
    for _ in range(10):
        chosen = np.sort(rng.choice(90, rng.integers(1, 12)))
        frames = video.read(film, max_frames=1, seconds=contents.seconds[chosen] + 0.01)
        np.testing.assert_array_equal(frames.pixels, np.stack([everything[frame] for frame in chosen]))


def test_times_may_come_in_any_order_and_repeat(film):
    seconds = np.array([2.5, 0.0, 1.1, 1.1, 0.4]) + 0.01
    frames = video.read(film, max_frames=1, seconds=seconds)
    assert [films.number_of(picture) for picture in frames.pixels] == [75, 0, 33, 33, 12]
    assert frames.seconds.tolist() == seconds.tolist()


def test_packets_between_keyframes_are_left_out_of_decoding(film, monkeypatch):
    decoded = []
    real = video._decode

    def counting(reader, runs):
        decoded.extend(run.last - run.first + 1 for run in runs)
        return real(reader, runs)

    monkeypatch.setattr(video, "_decode", counting)
    video.read(film, max_frames=1, seconds=np.array([0.01, 2.01]))
    assert len(decoded) == 2 and sum(decoded) < 30


def test_files_too_large_to_hold_are_read_again_with_the_same_result(film, monkeypatch):
    expected = video.read(film, max_frames=16)
    monkeypatch.setattr(video_file, "HELD_BYTES", 1000)
    frames = video.read(film, max_frames=16)
    np.testing.assert_array_equal(frames.pixels, expected.pixels)


def test_frames_resized_while_decoding_equal_frames_resized_afterwards(film):
    full, small = video.read(film, max_frames=8), video.read(film, max_frames=8, size=(20, 36))
    resized = [pixels_lib.resize(picture, 20, 36) for picture in full.pixels]
    np.testing.assert_array_equal(small.pixels, resized)
    assert (small.width, small.height) == (full.width, full.height) == (64, 32)
    assert small.fps == 30 and small.duration == 3.0


@pytest.mark.parametrize("name, how", [
    ("film.ts", {}), ("film.mkv", {}), ("film.avi", {}), ("film.mov", {"between": 4}), ("film.h264", {}),
    ("mpeg4.avi", {"codec": "mpeg4"}), ("film.m2v", {"codec": "mpeg2video"}),
    ("open.mp4", {"options": {"x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=12"}}),
    ("film.webm", {"codec": "libvpx-vp9", "between": 0}),
    ("one_key.mp4", {"keys": 500, "between": 0})])
def test_containers_codecs_and_reordering_change_nothing(name, how, tmp_path):
    path = films.write(tmp_path / name, 40, **how)
    contents = video.index(path)
    assert len(contents.seconds) == 40
    for chosen in [np.arange(0, 40, 7), np.arange(11, 14), np.array([39]), np.array([12, 25])]:
        seconds = contents.seconds[chosen] - contents.begin + 1e-3
        frames = video.read(path, max_frames=1, seconds=seconds)
        assert [films.number_of(picture) for picture in frames.pixels] == chosen.tolist()


def test_a_stream_that_starts_late_is_counted_from_its_start(tmp_path):
    path = films.write(tmp_path / "late.ts", 30, shift=90_000)
    contents = video.index(path)
    assert contents.begin > 0.9 and contents.duration == pytest.approx(1.0, abs=1e-4)
    frames = video.read(path, max_frames=9)
    assert [films.number_of(picture) for picture in frames.pixels] == [0, 15, 29]
    assert frames.seconds == pytest.approx([0, 0.5, 1.0], abs=1e-4)


def test_frames_cut_off_by_an_edit_list_are_not_shown(tmp_path):
    path = films.write(tmp_path / "edited.mp4", 30, shift=-5 * 512, unit=fractions.Fraction(1, 15360),
                 ticks=[512 * number for number in range(30)], between=0)
    frames = video.read(path, max_frames=9)
    assert [films.number_of(picture) for picture in frames.pixels] == [5, 20, 29]


def test_a_rotation_flag_turns_the_picture_upright(tmp_path):
    plain = video.read(films.write(tmp_path / "plain.mp4", 3), max_frames=2)
    turned = video.read(films.write(tmp_path / "turned.mp4", 3, rotation=90), max_frames=2)
    assert (turned.width, turned.height) == (32, 64)
    np.testing.assert_array_equal(turned.pixels, np.rot90(plain.pixels, 1, axes=(1, 2)))


def test_a_film_of_one_frame_is_shown_at_its_start_and_end(tmp_path):
    frames = video.read(films.write(tmp_path / "one.mp4", 1), max_frames=128)
    assert frames.seconds == pytest.approx([0, 1 / 30]) and frames.fps == 30
    assert [films.number_of(picture) for picture in frames.pixels] == [0, 0]


def camera(path, rate, count, missing=()):
    """Writes numbered frames at a rate, except those in `missing`."""
    kept, unit = [number for number in range(count) if number not in missing], 1 / fractions.Fraction(rate)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=1 / unit, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in kept:
            frame = av.VideoFrame.from_ndarray(films.numbered(number), format="rgb24")
            frame.pts, frame.time_base = number, unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path, kept


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("rate, missing", [
    ("30000/1001", ()), ("60000/1001", ()), ("120000/1001", ()), ("30", (31,)), ("30", (7, 31, 32, 77, 78)),
    ("60000/1001", (40, 41, 42, 43)), ("23.7", ())])
@pytest.mark.parametrize("tracking_fps", [1, 2])
def test_tracks_are_shown_at_their_rate_in_films_of_any_rate(rate, missing, ending, tracking_fps, tmp_path):
    path, kept = camera(tmp_path / f"film.{ending}", rate, 120, missing)
    frames = video.read(path, max_frames=64, tracking_fps=tracking_fps)
    dense = round(1 / frames.seconds[1])
    assert dense % tracking_fps == 0 and dense <= 10
    np.testing.assert_array_equal(frames.seconds, np.arange(len(frames.seconds)) / dense)
    assert frames.seconds[-1] < frames.duration <= frames.seconds[-1] + 1 / dense
    contents = video.index(path)
    shown = np.searchsorted(contents.elapsed, frames.seconds + 1e-6, side="right") - 1
    assert [films.number_of(one) for one in frames.pixels] == [kept[place] for place in shown]


@pytest.mark.parametrize("seconds, rate", [
    ([0.0], 1.0), ([0.0, 0.1], 10.0), ([0.0, 0.1, 1.1], 1.0), ([0.0, 0.1, 0.2, 0.5, 0.6], 10.0)])
def test_the_nominal_rate_is_that_of_frames_without_a_gap(seconds, rate):
    assert index_of(seconds, 9.0).nominal_fps == pytest.approx(rate)


def test_a_film_of_25_frames_is_refused_for_two_points_a_second_also_with_a_frame_missing(tmp_path):
    for missing in ((), (17,)):
        path, _ = camera(tmp_path / "film.mp4", "25", 50, missing)
        assert len(video.read(path, max_frames=64, tracking_fps=1).seconds) == 10
        with pytest.raises(ValueError, match="tracking clip needs a rate"):
            video.read(path, max_frames=64, tracking_fps=2)
