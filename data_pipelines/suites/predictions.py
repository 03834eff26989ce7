"""Answers to a benchmark as JSON lines, appended while a model answers, so that nothing is asked twice.

One file per benchmark. A line is an answer; the last line with a key counts. A process that is killed while
it writes leaves a torn last line, which is cut off before the next answer is written.

Only one process may write a file at a time.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from data_pipelines.suites import benchmark as benchmarks

FOLDER = "predictions"    # below the output folder of an evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """An answer to one question of a benchmark.

    key: of question, settings and weights; "" in answers of other programs.
    frames: shown of a video; 0 for images. seconds: of reading the media, and this answer's share of the
    device's time.
    """
    benchmark: str
    id: str
    answer: str
    key: str = ""
    prompt: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    frames: int = 0
    is_complete: bool = True
    seconds: float = 0.0

    def line(self) -> str:
        """Returns the line of a file, with its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


_FIELDS = {field.name: field for field in dataclasses.fields(Prediction)}


def key_of(benchmark: str, item: benchmarks.Item, settings: Mapping[str, Any], weights: str) -> str:
    """Returns a digest of all that an answer depends on: question, media, settings and weights.

    Media count by the question's id, so that a data set may be moved.
    """
    example = item.example
    said = [benchmark, item.id, item.prompt, example.clip, example.tracking_fps, len(example.images),
            example.subtitles, settings, weights]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Store:
    """The file of one benchmark's answers."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)

    @classmethod
    def of(cls, folder: str | os.PathLike, benchmark: str) -> "Store":
        """Returns the store of a benchmark in the output folder of an evaluation."""
        return cls(pathlib.Path(folder) / FOLDER / f"{benchmark}.jsonl")

    def read(self) -> dict[str, Prediction]:
        """Returns key -> answer; {} without a file."""
        return {one.key: one for one in read(self.path)} if self.path.exists() else {}

    def append(self, made: Iterable[Prediction]) -> None:
        """Appends answers with one write, and waits until the disk has them."""
        append_lines(self.path, "".join(one.line() for one in made))


def append_lines(path: pathlib.Path, text: str) -> None:
    """Appends whole lines after the last whole line of a file, and waits until the disk has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        _cut_torn_line(path, file)
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(path: pathlib.Path, file) -> None:
    """Cuts the file after its last line end."""
    size = file.tell()
    with open(path, "rb") as existing:
        end, block = size, 1 << 16
        while end:
            start = max(0, end - block)
            existing.seek(start)
            place = existing.read(end - start).rfind(b"\n")
            if place >= 0:
                end = start + place + 1
                break
            end = start
    if end < size:
        file.truncate(end)


def read(path: str | os.PathLike) -> Iterator[Prediction]:
    """Yields the answers of a file in order. Lines that cannot be read are logged; a torn last one is not.

    A line is an object with `id` and `answer`, and `benchmark` unless the file is named after it.
    """
    path = pathlib.Path(path)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield _parsed(json.loads(line), path.stem)
            except ValueError as error:
                if line.endswith(b"\n") and line.strip():
                    logging.warning("%s:%d: left out: %s", path, number, error)


def _parsed(value: Any, benchmark: str) -> Prediction:
    if not isinstance(value, dict) or not {"id", "answer"} <= set(value):
        raise ValueError(f"a prediction must be an object with id and answer; got {str(value)[:80]}")
    fields = {name: one for name, one in value.items() if name in _FIELDS}
    return Prediction(**{"benchmark": benchmark} | fields | {"id": str(value["id"]),
                                                             "answer": str(value["answer"])})


def of_path(path: str | os.PathLike, names: Iterable[str]) -> dict[str, dict[str, Prediction]]:
    """Returns benchmark -> {id: answer} of a file of predictions, or of an evaluation's output folder.

    A file without `benchmark` in its lines belongs to the benchmark it is named after, or to the only one
    of `names`.

    Raises:
      ValueError: there is no such file, or an answer names none of the benchmarks `names`.
    """
    path, names = pathlib.Path(path), list(names)
    files = sorted((path / FOLDER).glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError("predictions must be a file of JSON lines, or the output folder of an evaluation; "
                         f"got {path}")
    found: dict[str, dict[str, Prediction]] = {name: {} for name in names}
    for file in files:
        for one in read(file):
            name = one.benchmark
            if name not in found and one.benchmark == file.stem and len(names) == 1 and not path.is_dir():
                name = names[0]
            if name in found:
                found[name][one.id] = dataclasses.replace(one, benchmark=name)
            elif not path.is_dir():
                raise ValueError(f"a prediction must name its benchmark, one of {', '.join(names)}; "
                                 f"got {one.benchmark!r} for id {one.id!r}")
    return found
