"""What a prepared folder holds: one record in bytes, one JSON for each shard, and the manifest.

    NAME-00003-of-00012.array_record   records, encoded as below
    NAME-00003-of-00012.json           a Shard: written after the shard, so that it marks a whole one
    broken.jsonl                       what was left out: id, source, stage and reason, one a line
    manifest.json                      a Manifest: written last, so that it marks a whole folder

A record is uint32 (little endian), the length of a JSON object; the object; the contents of its media, one
after the other. The object has the `key` of the record, the `record` as in annotations.jsonl, and for each
medium in `media` its name there and what follows of it.
"""

import collections
import dataclasses
import fractions
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from molmo2_jax import config
from molmo2_jax.inputs import held_file
from molmo2_jax.inputs import kept_video

VERSION = 1
MANIFEST, BROKEN = "manifest.json", "broken.jsonl"
REFERENCE, COPY, FRAMES = "reference", "copy", "frames"
MEDIA = (REFERENCE, COPY, FRAMES)
_LENGTH = struct.Struct("<I")
_VIDEO_FIELDS = ("starts", "width", "height", "begin", "duration", "fps", "nominal_fps", "rule")


# Records


def encode(key: str, record: Mapping[str, Any],
           media: Mapping[str, held_file.HeldFile | kept_video.KeptVideo]) -> bytes:
    """Returns the bytes of a record; `media` are those that go into it, by their names in the record."""
    entries, contents = [], []
    for name, medium in media.items():
        entry, content = _entry(medium)
        entries.append({"name": name} | entry)
        contents += content
    head = json.dumps({"key": key, "record": record, "media": entries}, ensure_ascii=False,
                      separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(head)), head, *contents))


def decode(data: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Returns (key, record, media by name) of encode's bytes.

    Raises:
      ValueError: they are something else.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        place = _LENGTH.size + length
        head = json.loads(data[_LENGTH.size:place])
        media = {}
        for entry in head["media"]:
            size = sum(entry["bytes"])
            media[entry["name"]] = _medium(entry, data[place:place + size])
            place += size
        key, record = head["key"], head["record"]
    except (struct.error, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"a prepared record must be a JSON object and its media; got {len(data)} bytes "
                         f"({type(error).__name__}: {error})") from error
    config.require(place == len(data), f"a prepared record must be of {place} bytes", len(data))
    return key, record, media


def _entry(medium) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    if isinstance(medium, held_file.HeldFile):
        return {"bytes": [len(medium.content)]}, (medium.content,)
    length = medium.length and [medium.length.numerator, medium.length.denominator]
    stops = [None if math.isinf(stop) else stop for stop in medium.stops]  # JSON knows no infinity
    fields = {name: getattr(medium, name) for name in _VIDEO_FIELDS}
    return {"bytes": list(map(len, medium.jpegs)), "frames": fields | {"stops": stops, "length": length}
            }, medium.jpegs


def _medium(entry: Mapping[str, Any], content: bytes) -> held_file.HeldFile | kept_video.KeptVideo:
    config.require(len(content) == sum(entry["bytes"]), "media must be whole", len(content))
    if "frames" not in entry:
        return held_file.HeldFile(entry["name"], content)
    fields, jpegs, place = dict(entry["frames"]), [], 0
    for size in entry["bytes"]:
        jpegs.append(content[place:place + size])
        place += size
    fields["length"] = fields["length"] and fractions.Fraction(*fields["length"])
    fields["stops"] = tuple(math.inf if stop is None else stop for stop in fields["stops"])
    return kept_video.KeptVideo(name=entry["name"], jpegs=tuple(jpegs),
                                **fields | {"starts": tuple(fields["starts"])})


# Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """How one number is distributed over records. bins: how many lie in [2^k, 2^(k+1)), by k; zero and less
    are in "0"."""
    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    bins: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, values: Iterable[float]) -> "Numbers":
        """Returns the distribution of some numbers."""
        values = list(values)
        bins = collections.Counter(f"2^{math.floor(math.log2(value))}" if value > 0 else "0"
                                   for value in values)
        return cls(count=len(values), total=math.fsum(values), least=min(values, default=math.inf),
                   most=max(values, default=-math.inf), bins=_sorted(bins))

    def __add__(self, other: "Numbers") -> "Numbers":
        bins = collections.Counter(self.bins) + collections.Counter(other.bins)
        return Numbers(count=self.count + other.count, total=self.total + other.total,
                       least=min(self.least, other.least), most=max(self.most, other.most),
                       bins=_sorted(bins))

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold, with the mean."""
        if not self.count:
            return {"count": 0}
        return dataclasses.asdict(self) | {"mean": self.total / self.count}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Numbers":
        """Returns what to_json was called on."""
        return cls(**{name: one for name, one in value.items() if name != "mean"})


def _sorted(bins: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(bins.items(), key=lambda one: int(one[0].removeprefix("2^")) if "^" in one[0]
                       else -math.inf))


# Shards and the manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A record that is in no shard. stage: what refused it, one of ledger's reasons or "excluded"."""
    id: str
    source: str
    stage: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard: its records, bytes and content, what it left out of the input's records from `first` on.

    settings: their hash. numbers: of the records, by what is counted.
    """
    file: str
    first: int
    given: int
    count: int
    bytes: int
    sha256: str
    settings: str
    left_out: tuple[LeftOut, ...]
    numbers: Mapping[str, Numbers]

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        stages = collections.Counter(one.stage for one in self.left_out)
        return dataclasses.asdict(self) | {
            "numbers": {name: one.to_json() for name, one in self.numbers.items()},
            "left_out_by_stage": dict(sorted(stages.items()))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Shard":
        """Returns what to_json was called on.

        Raises:
          ValueError: it is something else.
        """
        fields = {name: one for name, one in value.items() if name != "left_out_by_stage"}
        try:
            fields["left_out"] = tuple(LeftOut(**one) for one in fields["left_out"])
            fields["numbers"] = {name: Numbers.from_json(one) for name, one in fields["numbers"].items()}
            return cls(**fields)
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"must be the JSON of a shard; got {sorted(value)} ({error})") from error


def shard_name(name: str, number: int, count: int) -> str:
    """Returns NAME-sssss-of-NNNNN."""
    return f"{name}-{number:05}-of-{count:05}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the bytes of the shards; compared when a folder is prepared further.

    name: of the data set. input: what its records are (SHA-256). exclude: names of media to leave out
      (SHA-256), or "". media: one of MEDIA. max_frames, max_fps, max_tracking_fps: sampling rules by which
      videos are read, and whose frames are kept. max_side, quality: of kept frames; None for other media.
    model: whose tokens and crops are counted (SHA-256 of its config and tokenizer).
    """
    name: str
    input: str
    records_per_shard: int
    media: str = REFERENCE
    max_frames: tuple[int, ...] = (128,)
    max_fps: float = 2.0
    max_tracking_fps: int = 10
    max_side: int | None = None
    quality: int | None = None
    exclude: str = ""
    model: str = ""
    version: int = VERSION

    def __post_init__(self):
        config.require(bool(self.name) and "/" not in self.name, "name must be that of a file", self.name)
        config.require(self.media in MEDIA, f"media must be one of {', '.join(MEDIA)}", self.media)
        config.require(self.records_per_shard >= 1, "records_per_shard must be >= 1", self.records_per_shard)
        config.require(min(self.max_frames, default=0) >= 1, "max_frames must be >= 1",
                       self.max_frames)
        config.require(self.max_fps > 0, "max_fps must be > 0 frames per second", self.max_fps)
        config.require(self.max_tracking_fps >= 1, "max_tracking_fps must be >= 1 frame per second",
                       self.max_tracking_fps)
        is_kept = self.media == FRAMES
        config.require((self.max_side is not None and self.quality is not None) == is_kept,
                       "max_side and quality must be given with kept frames alone",
                       (self.media, self.max_side, self.quality))
        config.require(not is_kept or self.max_side >= 1, "max_side must be >= 1 pixel", self.max_side)
        config.require(not is_kept or 1 <= self.quality <= 100, "quality must lie in [1, 100]", self.quality)

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return dataclasses.asdict(self) | {"max_frames": list(self.max_frames)}

    @property
    def digest(self) -> str:
        """A hash of all settings."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Returns what differs in saved settings, as "NAME = VALUE, now VALUE"."""
        here = self.to_json()
        return [f"{name} = {saved.get(name)!r}, now {here.get(name)!r}"
                for name in sorted({*here, *saved}) if here.get(name) != saved.get(name)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A shard as the manifest lists it."""
    file: str
    count: int
    bytes: int
    sha256: str


def manifest(settings: Settings, media_folder: str, shards: Iterable[Shard]) -> dict[str, Any]:
    """Returns the manifest of a folder whose shards are all written, in order, as JSON.

    media_folder: what names of media are relative to; itself relative to the prepared folder, if it can be.
    """
    entries, stages, numbers = [], collections.Counter(), collections.defaultdict(Numbers)
    for shard in shards:
        entries.append(dataclasses.asdict(Entry(file=shard.file, count=shard.count, bytes=shard.bytes,
                                                sha256=shard.sha256)))
        stages.update(one.stage for one in shard.left_out)
        for name, one in shard.numbers.items():
            numbers[name] += one
    return {"version": VERSION, "name": settings.name, "count": sum(one["count"] for one in entries),
            "left_out": dict(sorted(stages.items())), "media_folder": media_folder,
            "settings": settings.to_json(), "digest": settings.digest,
            "statistics": {name: one.to_json() for name, one in sorted(numbers.items())}, "shards": entries}


def entries(manifest: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Returns the shards of a manifest.

    Raises:
      ValueError: it is of another version, or something else.
    """
    config.require(manifest.get("version") == VERSION, f"a manifest must be of version {VERSION}",
                   manifest.get("version"))
    try:
        return tuple(Entry(**one) for one in manifest["shards"])
    except (TypeError, LookupError) as error:
        raise ValueError(f"a manifest must list its shards; got {sorted(manifest)} ({error})") from error
