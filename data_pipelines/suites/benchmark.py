"""A benchmark as one table row: where its files come from, how it is asked, how answers are scored."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from molmo2_jax import types

HUB = "huggingface.co/datasets/"
MODELS = ("Molmo2-4B", "Molmo2-8B", "Molmo2-O-7B")   # the columns of published figures


class Missing(ValueError):
    """The files of a benchmark are absent; the message says which, where they must be and who has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a benchmark, as it is asked and judged.

    id: unique in its benchmark, and independent of where the files are.
    cluster: the video (or image) it is about. Confidence intervals draw clusters, not questions.
    example: the media, without annotations.
    prompt: the text of the user, with its prefix.
    target: what the benchmark's metric judges an answer by; large ones are functions that read it.
    reference: an answer that is fully right, in the model's grammar; "" where there is none.
    """
    id: str
    cluster: str
    example: types.Example
    prompt: str
    target: Any
    reference: str = ""


Row = dict[str, float]


def as_they_are(means: Mapping[str, float]) -> Row:
    """Returns the means unchanged: the `derive` of scores that are plain means."""
    return dict(means)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """How answers to a benchmark are scored, by the functions of data_pipelines.scoring.

    each: (item, answer) -> scores of one answer, 0 to 1, with `valid` for whether it could be read. A score
      may be missing, then it is not averaged over that answer.
    headline: name of the score by the clean rule. published: the one by the rule of published figures.
    derive: means over answers -> scores, for scores that are not plain means.
    """
    each: Callable[[Item, str], Row]
    headline: str
    published: str
    derive: Callable[[Mapping[str, float]], Row] = as_they_are


class Read(NamedTuple):
    """The questions of a benchmark, and one error for each row that could not be used."""
    items: list[Item]
    errors: list[ValueError]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published benchmark.

    title: as in the paper's tables. origin: who publishes it, which split is read, and on what terms.
    folder: of its files, below the folder of all benchmarks.
    files: patterns of files that must exist in it, of the publisher's own layout; "A | B": one of these.
    rows: folder -> its questions, and an error for each row that does not fit.
    max_new_tokens: longest answer. is_high_res: single images are cut into up to InputConfig.high_res_crops
      crops, as in the published evaluation.
    temperature, top_p: of sampling; 0 is greedy.
    needs_judge: statements are judged by another model or from a record.
    published: score -> percentages of MODELS, None where none is published.
    """
    name: str
    title: str
    origin: str
    folder: str
    files: tuple[str, ...]
    rows: Callable[[pathlib.Path], Iterable[Item | ValueError]]
    metric: Metric
    max_new_tokens: int = 12
    is_high_res: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    needs_judge: bool = False
    published: Mapping[str, tuple[float | None, float | None, float | None]] = dataclasses.field(
        default_factory=dict)

    def check(self, root: pathlib.Path) -> None:
        """Checks that the benchmark's files are below the folder of all benchmarks.

        Raises:
          Missing: some are not.
        """
        folder = pathlib.Path(root) / self.folder
        lacking = [pattern for pattern in self.files
                   if not any(_has(folder, one.strip()) for one in pattern.split("|"))]
        if lacking:
            raise Missing(f"{self.name} ({self.title}) needs {', '.join(lacking)} in {folder}; "
                          f"their source: {self.origin}")

    def read(self, root: pathlib.Path, limit: int | None = None) -> Read:
        """Returns the questions; at most the first `limit` of them.

        Raises:
          Missing: the files are absent. ValueError: no row can be used.
        """
        self.check(root)
        items: dict[str, Item] = {}
        errors: list[ValueError] = []
        for found in self.rows(pathlib.Path(root) / self.folder):
            if isinstance(found, ValueError):
                errors.append(found)
            elif found.id in items:
                errors.append(ValueError(f"{self.name}: ids must be unique; got {found.id!r} twice"))
            else:
                items[found.id] = found
            if len(items) == limit:
                break
        if not items:
            raise ValueError(f"{self.name}: no row of {pathlib.Path(root) / self.folder} can be used: "
                             f"{errors[0] if errors else 'there is none'}")
        return Read(list(items.values()), errors)


def _has(folder: pathlib.Path, pattern: str) -> bool:
    return next(iter(folder.glob(pattern)), None) is not None


def published_of(benchmark: Benchmark, name: str) -> Sequence[float | None]:
    """Returns the published percentages of MODELS for a score; None for each that is not published."""
    return benchmark.published.get(name, (None,) * len(MODELS))
