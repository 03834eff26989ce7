"""Times to look at, the frames shown then, and their decoding, against goldens and real files."""

import dataclasses
import fractions
import json
import pathlib

import av
import numpy as np
import pytest
from av.stream import Disposition

from molmo2_jax.inputs import image
from molmo2_jax.inputs import video
from molmo2_jax.inputs import video_file

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "goldens/frame_sampling/cases.json").read_text())
MATCH = 1e-9   # seconds; times of the goldens are printed in full


# Small films in which every frame says its number.

def numbered(number, rows=32, columns=64):
    """Returns uint8[rows, columns, 3] with `number` in 16 black or white blocks over a mottled ground."""
    rng = np.random.default_rng(number)
    picture = rng.integers(90, 130, (rows // 8, columns // 8, 3)).astype(np.uint8)
    picture = picture.repeat(8, 0).repeat(8, 1)
    bits = np.array([(number >> bit & 1) * 255 for bit in range(16)]).reshape(2, 8)
    picture[:16, :] = bits.repeat(8, 0).repeat(columns // 8, 1)[:, :, None]
    return picture


def number_of(picture):
    rows, columns = 8, picture.shape[1] // 8
    blocks = picture[:16].reshape(2, rows, 8, columns, 3)[:, 2:-2, :, 2:-2].mean((1, 3, 4))
    return sum(1 << bit for bit, value in enumerate(blocks.ravel()) if value > 128)


def write(path, count, *, fps=30, keys=12, between=2, codec="libx264", ticks=None, unit=None, rotation=0,
          format=None, shift=0, options=None):
    """Writes `count` numbered frames; `ticks` in `unit` seconds make the rate variable."""
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=fractions.Fraction(fps), options=options or {"bf": str(between)})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = keys, between
        if unit:
            stream.codec_context.time_base = stream.time_base = unit
        if rotation:
            stream.set_display_rotation(rotation)
        packets = []
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            if ticks:
                frame.pts, frame.time_base = ticks[number], unit
            packets += stream.encode(frame)
        for packet in packets + stream.encode(None):
            packet.pts += shift
            packet.dts += shift
            out.mux(packet)
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write(tmp_path_factory.mktemp("films") / "film.mp4", 90, between=3)


def index_of(seconds, end):
    """Returns an index made of presentation times alone, as frames_at needs it."""
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


# From time to frame


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
        write(path, 11, ticks=[round(second / unit) for second in cases[0]["frame_pts"]], unit=unit)
    else:
        write(path, cases[0]["num_frames"], fps=cases[0]["fps"])
    for case in cases:
        contents = video.index(path)
        assert contents.begin == case["begin"]
        limits = {"max_frames": case["max_frames"], "fps": case["max_fps"], "clip": case["clip"]}
        if name == "vfr":  # the encoder gives the last frame another duration; the choice must follow `end`
            limits["seconds"] = np.array(case["timestamps"])
        else:
            assert contents.end == pytest.approx(case["end"], abs=1e-6)
        frames = video.read(path, **limits)
        np.testing.assert_allclose(frames.seconds, case["timestamps"], atol=1e-6)
        assert [number_of(picture) for picture in frames.pixels] == case["frame_indices"], case


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
    """Returns (index, exact seconds since its first frame) of a film of any rate, unit and start."""
    rate = fractions.Fraction(int(rng.choice([1, 10, 24, 25, 30, 60, 120, 240])))
    rate *= fractions.Fraction(*map(int, rng.choice([(1, 1), (1000, 1001)])))
    unit = fractions.Fraction(1, int(rng.choice([1000, 12800, 90000, 1_000_000])))
    begin = int(rng.choice([0, 1, rng.integers(10**6), rng.integers(10**13)]))
    ticks = [begin + round(number / rate / unit) for number in range(rng.integers(2, 2000))]
    length = (ticks[-1] - begin) * unit + 1 / rate
    contents = index_of([float(tick * unit) for tick in ticks], float(begin * unit + length))
    contents = dataclasses.replace(contents, ticks=np.array(ticks), unit=unit, length=length)
    return contents, [(tick - begin) * unit for tick in ticks]


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
    plain = video.read(write(tmp_path / "plain.ts", 60, between=0), max_frames=99, fps=10)
    for shift in (90_000, 123_457, 8_000_000_001):
        late = video.read(write(tmp_path / "late.ts", 60, between=0, shift=shift), max_frames=99, fps=10)
        assert late.seconds.tolist() == plain.seconds.tolist()
        assert [number_of(one) for one in late.pixels] == [*range(0, 60, 3), 59]


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
    assert [number_of(picture) for picture in frames.pixels] == [75, 0, 33, 33, 12]
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
    np.testing.assert_array_equal(small.pixels, [image.resize(picture, 20, 36) for picture in full.pixels])
    assert (small.width, small.height) == (full.width, full.height) == (64, 32)
    assert small.fps == 30 and small.duration == 3.0


@pytest.mark.parametrize("name, how", [
    ("film.ts", {}), ("film.mkv", {}), ("film.avi", {}), ("film.mov", {"between": 4}), ("film.h264", {}),
    ("mpeg4.avi", {"codec": "mpeg4"}), ("film.m2v", {"codec": "mpeg2video"}),
    ("open.mp4", {"options": {"x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=12"}}),
    ("film.webm", {"codec": "libvpx-vp9", "between": 0}),
    ("one_key.mp4", {"keys": 500, "between": 0})])
def test_containers_codecs_and_reordering_change_nothing(name, how, tmp_path):
    path = write(tmp_path / name, 40, **how)
    contents = video.index(path)
    assert len(contents.seconds) == 40
    for chosen in [np.arange(0, 40, 7), np.arange(11, 14), np.array([39]), np.array([12, 25])]:
        seconds = contents.seconds[chosen] - contents.begin + 1e-3
        frames = video.read(path, max_frames=1, seconds=seconds)
        assert [number_of(picture) for picture in frames.pixels] == chosen.tolist()


def test_a_stream_that_starts_late_is_counted_from_its_start(tmp_path):
    path = write(tmp_path / "late.ts", 30, shift=90_000)
    contents = video.index(path)
    assert contents.begin > 0.9 and contents.duration == pytest.approx(1.0, abs=1e-4)
    frames = video.read(path, max_frames=9)
    assert [number_of(picture) for picture in frames.pixels] == [0, 15, 29]
    assert frames.seconds == pytest.approx([0, 0.5, 1.0], abs=1e-4)


def test_frames_cut_off_by_an_edit_list_are_not_shown(tmp_path):
    path = write(tmp_path / "edited.mp4", 30, shift=-5 * 512, unit=fractions.Fraction(1, 15360),
                 ticks=[512 * number for number in range(30)], between=0)
    frames = video.read(path, max_frames=9)
    assert [number_of(picture) for picture in frames.pixels] == [5, 20, 29]


def test_a_rotation_flag_turns_the_picture_upright(tmp_path):
    plain = video.read(write(tmp_path / "plain.mp4", 3), max_frames=2)
    turned = video.read(write(tmp_path / "turned.mp4", 3, rotation=90), max_frames=2)
    assert (turned.width, turned.height) == (32, 64)
    np.testing.assert_array_equal(turned.pixels, np.rot90(plain.pixels, 1, axes=(1, 2)))


def test_a_film_of_one_frame_is_shown_at_its_start_and_end(tmp_path):
    frames = video.read(write(tmp_path / "one.mp4", 1), max_frames=128)
    assert frames.seconds == pytest.approx([0, 1 / 30]) and frames.fps == 30
    assert [number_of(picture) for picture in frames.pixels] == [0, 0]


def camera(path, rate, count, missing=()):
    """Writes numbered frames at a rate, without those that are missing."""
    kept, unit = [number for number in range(count) if number not in missing], 1 / fractions.Fraction(rate)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=1 / unit, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in kept:
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
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
    assert [number_of(one) for one in frames.pixels] == [kept[place] for place in shown]


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
                picture = numbered(number, rows, columns)
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
    assert (late.width, [number_of(one) for one in late.pixels]) == (128, [0, 9, 18])


# Broken files


def audio_only(path, cover=False):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        if cover:
            picture = out.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 32, "rgb24"
            picture.disposition = Disposition.attached_pic
            out.mux(picture.encode(av.VideoFrame.from_ndarray(numbered(1), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return path


def no_frames(path):
    """Writes an mp4 with a video track that holds nothing."""
    write(path, 1)
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
    path = write(tmp_path / "front.mp4", 60, options={"bf": "0", "movflags": "faststart"})
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
