"""One line of annotations.jsonl -> the bytes of one prepared record, or why there are none.

The record that will be read in training is what is checked: its media, in the form in which they go into the
shard, are decoded, its annotations are held against them, and the tokens and crops of the sequence counted.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import formats
from data_pipelines import records
from data_pipelines.sources import shard_format
from data_pipelines.stream import ledger
from molmo2_jax import config
from molmo2_jax import files
from molmo2_jax import types
from molmo2_jax.inputs import held_file
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.inputs import video

EXCLUDED = "excluded"    # a stage, besides the ledger's reasons


class Made(NamedTuple):
    """The bytes of a record, and its numbers: seconds, frames per second, pixels, tokens, crops, ..."""
    data: bytes
    numbers: dict[str, float]


class Refused(NamedTuple):
    """Why a record is left out; `stage` is one of ledger's reasons, or EXCLUDED."""
    stage: str
    reason: str


class _Refusal(ValueError):
    def __init__(self, stage: str, error: BaseException):
        super().__init__(" ".join(str(error).split()) or type(error).__name__)
        self.stage = stage


@contextlib.contextmanager
def _refusing(stage: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, EOFError, MemoryError) as error:
        if files.storage_cause(error):  # a full disk is no fault of a record
            raise
        raise _Refusal(stage, error) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes prepared records; pickled into the processes that do.

    folder: of the data, local or in a bucket. exclude: names of media that must be left out, with or without
    folder and suffix. model, inputs, tokenizer: by which records are checked and counted.
    """
    folder: str
    settings: shard_format.Settings
    model: config.Molmo2Config
    inputs: config.InputConfig
    tokenizer: tokenizers.Tokenizer
    exclude: frozenset[str] = frozenset()

    def __call__(self, line: bytes, key: str) -> Made | Refused:
        try:
            return self._make(line, key)
        except _Refusal as refusal:
            return Refused(refusal.stage, str(refusal).removeprefix(f"{key}: "))

    def _make(self, line: bytes, key: str) -> Made:
        with _refusing(ledger.LINE):
            record, example = self._parse(line, key)
        for medium in records.listed(record, self.exclude):
            raise _Refusal(EXCLUDED, ValueError(f"{medium}: is on the list of media to leave out"))
        with _refusing(ledger.MEDIA):
            media = self._media(record, example)
            data = shard_format.encode(key, record, media)
            example = records.parse_record(record, self.folder, key=key, source=example.source,
                                           held=shard_format.decode(data)[2] or self._remote(record))
            crops, seen = self._see(example)
        with _refusing(ledger.ANNOTATION):
            branches = formats.to_branches(example, media=seen, rng=np.random.default_rng(0),
                                           asking=formats.Asking())
            result = sequences.build(crops, branches, self.tokenizer)
        return Made(data, _numbers(data, result, seen, example))

    def _parse(self, line: bytes, key: str) -> tuple[dict[str, Any], types.Example]:
        record = records.parse_json(line)
        return record, records.parse_record(record, self.folder, key=key, source=self.settings.name,
                                            held=self._remote(record))

    def _remote(self, record: Any) -> dict[str, held_file.HeldFile]:
        """Returns the media of a record in a bucket, which no decoder opens by its name."""
        if not files.is_remote(self.folder):
            return {}
        names = records.media(record) if isinstance(record, dict) else []
        paths = {name: files.path(self.folder) / name for name in names if isinstance(name, str)}
        return {name: held_file.HeldFile(name, path.read_bytes()) for name, path in paths.items()
                if path.is_file()}

    def _media(self, record, example) -> dict[str, Any]:
        """Returns what goes into the shard of the media of a record, by their names."""
        if self.settings.media == shard_format.REFERENCE:
            return {}
        if example.video is not None and self.settings.media == shard_format.FRAMES:
            return {record["video"]: self._keep(record["video"], example)}
        paths = example.images if example.video is None else (example.video,)
        return {name: held_file.HeldFile(name, pathlib.Path(os.fspath(path)).read_bytes())
                for name, path in zip(records.media(record), paths, strict=True)}

    def _keep(self, name: str, example: types.Example):
        settings = self.settings
        assert settings.max_side is not None and settings.quality is not None  # __post_init__ saw to it
        return video.keep(example.video, name=name, max_frames=settings.max_frames, fps=settings.max_fps,
                          max_side=settings.max_side, quality=settings.quality, clip=example.clip,
                          tracking_fps=example.tracking_fps, max_tracking_fps=settings.max_tracking_fps,
                          max_seconds=self.inputs.max_read_seconds)

    def _see(self, example) -> tuple[types.Crops | None, types.Media]:
        """Returns crops and media by the largest number of frames that training may ask for."""
        settings = self.settings
        inputs = dataclasses.replace(self.inputs, max_frames=max(settings.max_frames),
                                     max_fps=settings.max_fps, max_tracking_fps=settings.max_tracking_fps)
        return media_lib.see(example, self.model, inputs, self.tokenizer)


def _numbers(data: bytes, result: types.Sequence, media: types.Media, example) -> dict[str, float]:
    numbers = {"record_bytes": float(len(data)), "tokens": float(len(result.tokens)),
               "crops": float(len(result.patches)), "visual_tokens": float(len(result.pooled)),
               "annotations": float(len(example.annotations))}
    if media.sizes:
        numbers["width"], numbers["height"] = map(float, media.sizes[0])
        numbers["images" if media.seconds is None else "frames"] = float(
            len(media.sizes) if media.seconds is None else len(media.seconds))
    if media.seconds is not None:
        numbers["seconds"], numbers["frames_per_second"] = media.duration, media.fps
    return numbers
