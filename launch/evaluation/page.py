"""A page with the table of an evaluation, and the worst answers of each benchmark drawn on their media."""

import html
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import suites
from data_pipelines.scoring import regions
from data_pipelines.suites import benchmark as benchmarks
from data_pipelines.suites import predictions
from data_pipelines.suites import results
from data_pipelines.suites import tables
from molmo2_jax import types
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import video
from molmo2_jax.render import document
from molmo2_jax.render import pictures
from molmo2_jax.render import report

WORST = 6             # answers of each benchmark
MOST_FRAMES = 3       # of one answer
SIDE = 224            # pixels, shorter side of a drawn frame
_LONGEST = 600        # characters of a question


def write(path: pathlib.Path, made: Sequence[results.Result], about: Mapping[str, Any],
          shown: Mapping[str, Sequence[report.Shown]]) -> None:
    """Writes the page; shown: the worst answers by benchmark."""
    sections = [document.section("Scores", _table(made))]
    sections += [document.section(f"{suites.BENCHMARKS[name].title}: the worst answers",
                                  report.cards(figures)) for name, figures in shown.items()]
    facts = {name: str(value) for name, value in about.items() if name != "weights"}
    summary = "Scores with intervals, published figures beside them, and the answers that scored least."
    path.write_text(document.html_of("Evaluation", summary, facts, sections), encoding="utf-8")


def worst(benchmark: benchmarks.Benchmark, items: Sequence[benchmarks.Item], rows: results.Rows,
          answers: Mapping[str, predictions.Prediction]) -> list[report.Shown]:
    """Returns the answers that scored least and below 1, the first of equals, as figures."""
    scored = [(results.value_of(benchmark.metric, rows[item.id]), number)
              for number, item in enumerate(items) if item.id in rows]
    return [_shown(items[number], answers[items[number].id], value)
            for value, number in sorted(scored)[:WORST] if value < 1]


def _table(made: Sequence[results.Result]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in tables.HEAD)
    body = "".join("<tr>" + "".join(
        f"<th>{html.escape(cell)}</th>" if not column else f'<td class="number">{html.escape(cell)}</td>'
        for column, cell in enumerate(row)) + "</tr>" for row in tables.cells(made))
    empty = "".join(f"<li>{html.escape(one.reason)}</li>" for one in made if one.reason)
    return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            f'<p class="legend">{html.escape(tables.LEGEND.replace("*", ""))}</p>'
            + (f"<ul>{empty}</ul>" if empty else ""))


def _shown(item: benchmarks.Item, answer: predictions.Prediction, value: float) -> report.Shown:
    """Returns an answer as a figure; media that cannot be drawn are left out, and said."""
    caption = f"{suites.BENCHMARKS[answer.benchmark].title}, {item.id}"
    try:
        frames = list(_frames(item, answer.answer))
    except (ValueError, OSError) as error:
        frames, caption = [], f"{caption}; not drawn: {error}"
    question = item.prompt if len(item.prompt) <= _LONGEST else f"{item.prompt[:_LONGEST]}…"
    return report.Shown(question=question, answer=answer.answer, truth=item.reference, score=value,
                        frames=frames, caption=caption)


def _frames(item: benchmarks.Item, answer: str) -> Iterator[np.ndarray]:
    """Yields frames with the answer's points as crosses and those of a right answer as rings."""
    example = item.example
    if example.video is None:
        stills = [pixels_lib.load(one) for one in example.images[:MOST_FRAMES]]
        media = types.Media(sizes=tuple((one.shape[1], one.shape[0]) for one in stills))
        given, wanted = (grounded.read(text, media)[0] if stills else ()
                         for text in (answer, item.reference))
        for number, pixels in enumerate(stills, 1):
            yield pictures.draw(pixels, predicted=_marks(given, number), true=_marks(wanted, number),
                                masks=_region(item, pixels), short_side=SIDE)
        return
    shown = video.read(example.video, max_frames=MOST_FRAMES, clip=example.clip)
    given, wanted = (grounded.read(text, shown.media)[0] for text in (answer, item.reference))
    times = sorted({point.index for point in (*wanted, *given) if 0 <= point.index <= shown.duration})
    if times:
        chosen = [times[place] for place in np.linspace(0, len(times) - 1, min(MOST_FRAMES, len(times)),
                                                        dtype=int)]
        shown = video.read(example.video, max_frames=MOST_FRAMES, clip=example.clip,
                           seconds=np.array(chosen))
    for second, pixels in zip(shown.seconds, shown.pixels, strict=True):
        yield pictures.draw(pixels, predicted=_marks(given, second), true=_marks(wanted, second),
                            label=f"{second:.1f} s", short_side=SIDE)


def _region(item: benchmarks.Item, pixels: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Returns the mask that points must be in, where a right answer is no list of points (Point-Bench)."""
    target = item.target() if callable(item.target) and not item.reference else None
    is_mask = isinstance(target, regions.MaskTarget) and target.mask.shape == pixels.shape[:2]
    return [("1", target.mask)] if is_mask else []


def _marks(points, index: float) -> list[pictures.Mark]:
    return [(point.id, point.x, point.y) for point in points if abs(point.index - index) < 0.05]
