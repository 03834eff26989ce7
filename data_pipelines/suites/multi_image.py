"""Questions about several images: the three benchmarks of the multi-image average.

Source: reference, olmo/data/academic_multi_image_datasets.py.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.scoring import choices
from data_pipelines.suites import benchmark
from data_pipelines.suites import metrics
from data_pipelines.suites import prompts
from data_pipelines.suites import rows
from molmo2_jax import types

HUB = benchmark.HUB
Benchmark = benchmark.Benchmark
Item = benchmark.Item
MOST_IMAGES = 20     # of a question; the rest of up to 62 is not shown
_OPTION = re.compile(r"^([A-Z]):\s?([^\n]+)", re.MULTILINE)


def _item(name: str, images: Sequence[Any], prompt: str, question: str, options: Sequence[str], right: int,
          reference: str, cluster: str = "") -> Item:
    """Returns a question about the first MOST_IMAGES images."""
    return Item(id=name, cluster=cluster or str(images[0]), prompt=prompt,
                target=choices.Target(question, tuple(options), right), reference=reference,
                example=types.Example(annotations=(), images=tuple(images[:MOST_IMAGES]), key=name))


def muir_bench(row: dict, place: rows.Place) -> Iterator[Item]:
    """idx, question and options with "<image>", answer (a letter), image_list."""
    question, *options = prompts.number_images([row["question"], *row["options"]], len(row["image_list"]))
    right = prompts.LETTERS.index(row["answer"])
    yield _item(str(row["idx"]), row["image_list"], prompts.formatted(question, options), question, options,
                right, prompts.lettered(options)[right])


def mmiu(row: dict, place: rows.Place) -> Iterator[Item]:
    """task, question, options ("A: text" lines), output (a letter), input_image_path (list).

    A few answers are letters beyond the options; no answer to these questions is right.
    """
    options = [text for _, text in _OPTION.findall(row["options"])]
    right = prompts.LETTERS.index(row["output"].strip())
    images = [place.media.image(path.removeprefix("./")) for path in row["input_image_path"]]
    lines = prompts.lettered(options)
    yield _item(place.name, images, prompts.formatted(row["question"], options), row["question"], options,
                right, lines[right] if right < len(lines) else "")


def blink(row: dict, place: rows.Place) -> Iterator[Item]:
    """idx, prompt (asked as it is), image_1 ... image_4, choices, answer "(A)"."""
    images = [row[f"image_{number}"] for number in range(1, 5) if row[f"image_{number}"] is not None]
    letter = row["answer"].strip("()")
    yield _item(row["idx"], images, row["prompt"], row["question"], row["choices"],
                prompts.LETTERS.index(letter), letter)


def _of(*percent: float) -> dict:
    return {"accuracy_reference": percent}


MULTI_IMAGE = (
    Benchmark(name="muir_bench", title="MuirBench", folder="muir_bench", max_new_tokens=32,
              origin=f"{HUB}MUIRBENCH/MUIRBENCH, test", files=("data/test-*.parquet",),
              rows=rows.each(muir_bench, "data/test-*.parquet"), metric=metrics.choice("muir_bench"),
              published=_of(60.5, 63.7, None)),
    Benchmark(name="mmiu", title="MMIU", folder="mmiu", max_new_tokens=32,
              origin=f"{HUB}FanqingM/MMIU-Benchmark, test, with its archives of images unpacked into folders "
              "of their names",
              files=("*.parquet | data/test-*.parquet",),
              rows=rows.each(mmiu, "*.parquet", "data/test-*.parquet"), metric=metrics.choice("mmiu"),
              published=_of(55.5, 54.2, None)),
    Benchmark(name="blink", title="BLINK", folder="blink",
              origin=f"{HUB}BLINK-Benchmark/BLINK, val, all fourteen tasks",
              files=("*/val-*.parquet",), rows=rows.each(blink, "*/val-*.parquet"),
              metric=metrics.choice("blink"), published=_of(57.5, 51.3, None)),
)
