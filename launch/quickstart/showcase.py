"""The content of the quickstart's report: answers drawn on held-out media, a tracked clip, one packed row.

The examples are the first in the held-out file for each number of objects, not the best ones.
"""

import contextlib
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import annotations
from data_pipelines import formats
from data_pipelines import pipeline
from launch import run
from launch.quickstart import scoreboard
from launch.support import questions
from molmo2_jax import config as config_lib
from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import points
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.inputs import video
from molmo2_jax.monitor import metrics
from molmo2_jax.render import pictures
from molmo2_jax.render import report
from molmo2_jax.render import tree

SHOWN = {"video": 6, "image": 3, "words": 3}   # answers of each kind in the report
TRACKS = 2
SIDE = 224                # pixels, shorter side of a drawn frame
MOST_FRAMES = 3           # of one answer
ANIMATION_FPS = 12.0
HEADLINES = ("point_f1", "track_jf", "count_accuracy", "choice_accuracy", "qa_accuracy")


def as_rows(examples: Sequence[types.Example], answered: Sequence[evaluate.Answered]) -> list[dict]:
    """Returns answers as plain values: example number, annotation number, question, answer."""
    places = {id(example): number for number, example in enumerate(examples)}
    return [{"example": places[id(one.example)],
             "annotation": _place(one.example.annotations, one.question.about),
             "question": one.question.turns[-1], "answer": one.text} for one in answered]


def _place(annotations: Sequence, wanted: Any) -> int:
    return next(number for number, one in enumerate(annotations) if one is wanted)


class Case(NamedTuple):
    """One answer with its question, annotation and example."""
    example: types.Example
    annotation: annotations.Annotation
    place: int              # index of the annotation in the example
    question: str
    answer: str

    @property
    def kind(self) -> str:
        if isinstance(self.annotation, annotations.Tracks):
            return "tracks"
        if isinstance(self.annotation, annotations.Points) and self.annotation.mode != "count":
            return "video" if self.example.video else "image"
        return "words"

    @property
    def variety(self) -> Any:
        """What the cases in the report should differ in: the number of objects, or the type of question."""
        one = self.annotation
        objects = one.points if isinstance(one, annotations.Points) else (
            one.tracks if isinstance(one, annotations.Tracks) else ())
        return len(objects) or one.type


def cases(examples: Sequence[types.Example], rows: Sequence[Mapping]) -> list[Case]:
    """Returns the rows of `as_rows` joined with their examples."""
    return [Case(examples[row["example"]], examples[row["example"]].annotations[row["annotation"]],
                 row["annotation"], row["question"], row["answer"]) for row in rows]


def choose(found: Sequence[Case], kind: str, most: int) -> list[Case]:
    """Returns the first cases of a kind, taken in turn from each variety; no example appears twice."""
    groups: dict[Any, list[Case]] = {}
    for case in found:
        if case.kind == kind:
            groups.setdefault(case.variety, []).append(case)
    ordered = [groups[variety] for variety in sorted(groups, key=str)]
    chosen: dict[int, Case] = {}
    for turn in range(max(map(len, ordered), default=0)):
        for group in ordered:
            for case in group[turn:turn + 1]:
                chosen.setdefault(id(case.example), case)
    return list(chosen.values())[:most]


def shown(case: Case, inputs: config_lib.InputConfig) -> report.Shown:
    """Returns a case as a figure: frames with true and predicted points, and the score."""
    pixels, media = _media(case.example, inputs)
    truth = _truth(case, media)
    wanted, given = (grounded.read(text, media)[0] for text in (truth, case.answer))
    if media.is_video:
        frames = list(_video_frames(case.example, media, wanted, given))
    else:
        frames = [pictures.draw(one, predicted=_marks(given, number), true=_marks(wanted, number),
                                label=f"image {number}" if len(pixels) > 1 else "", short_side=SIDE)
                  for number, one in enumerate(pixels, 1)]
    return report.Shown(question=case.question, answer=case.answer, truth=truth, frames=frames,
                        score=_score(case, media))


def shown_track(case: Case, inputs: config_lib.InputConfig) -> report.Shown:
    """Returns a tracked clip as a contact sheet and an animation."""
    _, media = _media(case.example, inputs)
    truth = _truth(case, media)
    wanted, given = (_by_time(grounded.read(text, media)[1]) for text in (truth, case.answer))
    times = [time for time in sorted(wanted) if time <= media.duration + 0.05] or [0.0]
    stills = _frames_at(case.example, times)
    sheet = pictures.track(stills, [given.get(time, {}) for time in times],
                           true=[wanted.get(time, {}) for time in times],
                           labels=[f"{time:.1f} s" for time in times], short_side=SIDE)
    seconds = np.arange(0, media.duration, 1 / ANIMATION_FPS)
    moving = pictures.track(_frames_at(case.example, seconds),
                            [_between(given, second) for second in seconds],
                            labels=[f"{second:.1f} s" for second in seconds], short_side=2 * SIDE)
    return report.Shown(
        question=case.question, answer=case.answer, truth=truth, score=_score(case, media),
        frames=[pictures.contact_sheet(sheet, columns=min(3, len(sheet)))], animation=moving,
        seconds=1 / ANIMATION_FPS,
        caption="Right: the times at which the model gave points; rings are the true positions. Left: the "
                "clip, with points interpolated between these times. Score: J&F.")


def _media(example: types.Example, inputs: config_lib.InputConfig
           ) -> tuple[Sequence[np.ndarray], types.Media]:
    """Returns frames or images at their original size, and the media that answers refer to."""
    if example.video:
        frames = video.read(example.video, max_frames=inputs.max_frames, fps=inputs.max_fps,
                            clip=example.clip, tracking_fps=example.tracking_fps,
                            max_tracking_fps=inputs.max_tracking_fps)
        return frames.pixels, frames.media
    pixels = [pixels_lib.load(path) for path in example.images]
    return pixels, types.Media(sizes=tuple(one.shape[1::-1] for one in pixels))


def _frames_at(example: types.Example, times: Sequence[float]) -> np.ndarray:
    """Returns uint8[N, H, W, 3], the frames of the example's clip at `times`, seconds from its start."""
    return video.read(example.video, max_frames=len(times), seconds=np.asarray(times),
                      clip=example.clip).pixels


def _truth(case: Case, media: types.Media) -> str:
    found = formats.format_example(case.example, media=media, rng=np.random.default_rng(0),
                                   asking=formats.PLAIN)
    return found.branches[found.annotations.index(case.place)].turns[-1]


def _score(case: Case, media: types.Media) -> float | None:
    """Returns the headline score of this answer."""
    question = generate.Question(turns=(case.question,), about=case.annotation)
    one = evaluate.Answered(example=case.example, media=media, question=question,
                            answer=generate.Answer(text=case.answer))
    scores = questions.score([one])
    return next((value for ending in HEADLINES for name, value in scores.items()
                 if name.endswith(ending)), None)


def _video_frames(example, media, wanted, given) -> Iterator[np.ndarray]:
    """Yields the frames at all times in the truth or the answer; the first frame if there are none."""
    named = {point.index for point in (*wanted, *given) if 0 <= point.index <= media.duration + 0.05}
    times = sorted(named)[:MOST_FRAMES] or [0.0]
    frames = _frames_at(example, times)
    for time, pixels in zip(times, frames, strict=True):
        yield pictures.draw(pixels, predicted=_marks(given, time), true=_marks(wanted, time),
                            label=f"{time:.1f} s", short_side=SIDE)


def _marks(found: Sequence[points.Point], index: float) -> list[pictures.Mark]:
    return [(point.id, point.x, point.y) for point in found if point.index == index]


def _by_time(found: Sequence[points.Tracked]) -> dict[float, dict[str, tuple[float, float]]]:
    return {one.seconds: one.points for one in found}


def _between(tracked: Mapping[float, Mapping[str, tuple[float, float]]], second: float) -> dict:
    """Returns id -> (x, y), linearly interpolated in time, of the tracks that exist at this second."""
    places: dict[str, list] = {}
    for time in sorted(tracked):
        for name, (x, y) in tracked[time].items():
            places.setdefault(name, []).append((time, x, y))
    columns = {name: np.array(rows).T for name, rows in places.items()}
    return {name: (float(np.interp(second, times, xs)), float(np.interp(second, times, ys)))
            for name, (times, xs, ys) in columns.items() if times[0] <= second <= times[-1]}


def packed_row(config: run.RunConfig, tokenizer: tokenizers.Tokenizer) -> tuple[str, np.ndarray]:
    """Returns the first row of the last lesson: an SVG of its message trees, and its attention mask."""
    data = config.data
    if data.lessons:
        data = dataclasses.replace(data, lessons=(), train=tuple(
            (folder, rates[-1] if isinstance(rates, tuple) else rates) for folder, rates in data.train))
    data = dataclasses.replace(data, num_workers=0)
    with contextlib.closing(pipeline.make_iterator(data, config.model, config.inputs, tokenizer)) as batches:
        batch = next(batches)
    return tree.tree_svg(batch, 0, tokenizer.decode), tree.mask_picture(batch, 0)


def write(path: pathlib.Path, config: run.RunConfig, workdir: pathlib.Path, examples: Sequence[types.Example],
          rows: Sequence[Mapping], summary: scoreboard.Summary, commands: str) -> None:
    """Writes report.html."""
    found = cases(examples, rows)
    tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer, config.model.text.vocab_size)
    svg, mask = packed_row(config, tokenizer)
    lines = metrics.read(str(workdir / "metrics.jsonl"))
    report.write_report(path, report.Report(
        title="Molmo2 in minutes: what the quickstart learnt",
        summary="A small model with the complete architecture, trained from scratch on drawn clips and "
                f"images. Below are its scores and answers on {len(examples)} held-out clips and images: the "
                "first ones of the file, not the best.",
        facts=_facts(config, lines, summary), metrics=_metrics(summary), curves=_curves(lines),
        answers=[shown(case, config.inputs) for kind, most in SHOWN.items()
                 for case in choose(found, kind, most)],
        tracks=[shown_track(case, config.inputs) for case in choose(found, "tracks", TRACKS)],
        row_svg=svg, row_mask=mask, command=commands))


def _facts(config: run.RunConfig, lines: Sequence[Mapping], summary) -> dict[str, str]:
    train, total, memory = scoreboard.costs(summary)
    seen = np.mean([line["examples"] for line in lines]) * config.train.steps
    return {"training": train, "total": total, "peak memory at most": memory,
            "steps": f"{config.train.steps:,}", "examples seen": f"about {round(seen, -2):,.0f}"}


def _metrics(summary) -> list[report.Metric]:
    rows = [report.Metric(name=words, trained=_or_nan(summary[name]), untrained=summary["untrained"][name],
                          goal=goal) for name, (words, goal) in scoreboard.SCORES.items()]
    return [*rows, report.Metric(name="training loss", trained=_or_nan(summary["loss"]),
                                 untrained=summary["untrained"]["loss"], unit="nats")]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _curves(lines: Sequence[Mapping]) -> dict[str, dict[str, report.Curve]]:
    def curve(name):
        return [(line["step"], line[name]) for line in lines]

    return {"loss per token (weighted)": {"loss": curve("loss")},
            "share of tokens predicted correctly (weighted)": {"accuracy": curve("accuracy")}}


def commands(workdir: str, examples: Sequence[types.Example], spelt: Callable[[str], str]) -> str:
    """Returns commands to try next, one per line; `spelt` shortens a path."""
    clip = next(example for example in examples if example.video)
    label = next(one.label for one in clip.annotations if hasattr(one, "label"))
    python = spelt(sys.executable)
    ask = f"{python} -m launch.generate --model={workdir} --video={spelt(clip.video)}"
    return "\n".join((
        f"{ask} --prompt={shlex.quote(f'Point to the {label}.')} --render=out.png",
        f"{ask} --prompt={shlex.quote(f'Track the {label}.')} --render=out.gif",
        f"{ask} --prompt={shlex.quote(f'How many {label} are there in the video?')} --json",
        f"{python} -m launch.evaluate --model={workdir} --data={workdir}/data/heldout"))
