"""Records, shards and settings as bytes and JSON, and back."""

import dataclasses
import fractions
import json
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from data_pipelines.sources import shard_format
from molmo2_jax.inputs import held_file
from molmo2_jax.inputs import kept_video

SETTINGS = shard_format.Settings(name="cups", input="abc", records_per_shard=8)
FILES = st.builds(held_file.HeldFile, st.just(""), st.binary(max_size=50))
SECONDS = st.floats(0, 1e6)
VIDEOS = st.builds(
    kept_video.KeptVideo, name=st.just(""), jpegs=st.tuples(st.binary(max_size=9), st.binary(max_size=9)),
    starts=st.tuples(SECONDS, SECONDS), stops=st.tuples(SECONDS, st.just(math.inf)),
    width=st.integers(1, 9), height=st.integers(1, 9), begin=SECONDS, duration=SECONDS,
    length=st.none() | st.fractions(0, 100), fps=SECONDS, nominal_fps=SECONDS, rule=st.text())
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def named(media):
    return {name: held_file.HeldFile(name, one.content) if isinstance(one, held_file.HeldFile)
            else dataclasses.replace(one, name=name) for name, one in media.items()}


@hypothesis.given(TEXTS, st.dictionaries(TEXTS, TEXTS), st.dictionaries(TEXTS, FILES | VIDEOS, max_size=3))
def test_decoding_undoes_encoding(key, record, media):
    media = named(media)
    data = shard_format.encode(key, record, media)
    assert shard_format.decode(data) == (key, record, media)
    assert shard_format.encode(*shard_format.decode(data)) == data


@hypothesis.given(st.data())
def test_a_record_cut_anywhere_is_refused(data):
    whole = shard_format.encode("a:1", {"images": ["a"]}, {"a": held_file.HeldFile("a", b"content")})
    place = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError):
        shard_format.decode(whole[:place])
    with pytest.raises(ValueError, match=f"must be of {len(whole)} bytes"):
        shard_format.decode(whole + b"?")


@hypothesis.given(st.lists(st.integers(-3, 10**6)), st.lists(st.integers(-3, 10**6)))
def test_the_sum_of_statistics_is_that_of_all_numbers(some, others):
    one, other = shard_format.Numbers.of(some), shard_format.Numbers.of(others)
    assert one + other == shard_format.Numbers.of(some + others)
    assert sum((one + other).bins.values()) == len(some) + len(others)
    if some:
        assert shard_format.Numbers.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_bins_are_ordered_and_say_their_lower_edge():
    numbers = shard_format.Numbers.of([1000, 3, 0, 0.3, 2])
    assert list(numbers.bins.items()) == [("0", 1), ("2^-2", 1), ("2^1", 2), ("2^9", 1)]


def test_a_shard_is_read_from_its_json():
    left_out = shard_format.LeftOut(id="a:1", source="cups", stage="media", reason="is empty")
    shard = shard_format.Shard(file="f", first=0, given=3, count=2, bytes=9, sha256="1", settings="2",
                               left_out=(left_out,), numbers={"tokens": shard_format.Numbers.of([3, 4])})
    value = json.loads(json.dumps(shard.to_json()))
    assert value["left_out_by_stage"] == {"media": 1}
    assert shard_format.Shard.from_json(value) == shard
    for wrong in ({}, {**value, "left_out": [{}]}, {**value, "more": 1}):
        with pytest.raises(ValueError, match="must be the JSON of a shard"):
            shard_format.Shard.from_json(wrong)


@pytest.mark.parametrize("how, rule", [
    ({"name": ""}, "name must be that of a file"), ({"name": "a/b"}, "name must be that of a file"),
    ({"media": "films"}, "media must be one of reference, copy, frames; got 'films'"),
    ({"records_per_shard": 0}, "records_per_shard must be >= 1"), ({"max_frames": ()}, "max_frames must be"),
    ({"max_frames": (8, 0)}, "max_frames must be >= 1"), ({"max_fps": 0.0}, "max_fps must be > 0"),
    ({"max_tracking_fps": 0}, "max_tracking_fps must be >= 1"),
    ({"max_side": 10, "quality": 90}, "must be given with kept frames alone"),
    ({"media": "frames"}, "must be given with kept frames alone"),
    ({"media": "frames", "max_side": 0, "quality": 90}, "max_side must be >= 1 pixel"),
    ({"media": "frames", "max_side": 10, "quality": 101}, r"quality must lie in \[1, 100\]")])
def test_settings_are_checked(how, rule):
    with pytest.raises(ValueError, match=rule):
        dataclasses.replace(SETTINGS, **how)


def test_every_setting_changes_the_digest_and_is_named():
    other = {"name": "mugs", "input": "d", "records_per_shard": 9, "media": "copy", "max_frames": (8,),
             "max_fps": 1.0, "max_tracking_fps": 2, "exclude": "e", "model": "m", "version": 2}
    for name, value in other.items():
        changed = dataclasses.replace(SETTINGS, **{name: value})
        assert changed.digest != SETTINGS.digest
        (text,) = changed.differences(SETTINGS.to_json())
        assert text.startswith(f"{name} = ")
    assert SETTINGS.differences(json.loads(json.dumps(SETTINGS.to_json()))) == []
    assert set(other) == {field.name for field in dataclasses.fields(SETTINGS)} - {"max_side", "quality"}


def test_a_manifest_of_another_version_is_refused():
    manifest = shard_format.manifest(SETTINGS, "..", [])
    assert shard_format.entries(manifest) == ()
    with pytest.raises(ValueError, match="must be of version 1; got 2"):
        shard_format.entries({**manifest, "version": 2})
    with pytest.raises(ValueError, match="must list its shards"):
        shard_format.entries({"version": 1})


def test_a_length_is_exact():
    video = kept_video.KeptVideo(
        name="a", jpegs=(b"1",), starts=(0.0,), stops=(math.inf,), width=1, height=1, begin=0.1,
        duration=1001 / 30000, length=fractions.Fraction(1001, 30000), fps=29.97, nominal_fps=29.97, rule="")
    assert shard_format.decode(shard_format.encode("", {}, {"a": video}))[2]["a"] == video
