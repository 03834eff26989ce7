"""Captions of videos, judged by statements (Molmo2-CapEval), and moments of videos (QVHighlights).

Source: reference, olmo/data/{molmo2,academic_video}_datasets.py.
"""

import pathlib
from collections.abc import Iterator

from data_pipelines.formats import templates
from data_pipelines.scoring import statements
from data_pipelines.suites import benchmark
from data_pipelines.suites import metrics
from data_pipelines.suites import prompts
from data_pipelines.suites import rows
from molmo2_jax import types

HUB = benchmark.HUB
Benchmark = benchmark.Benchmark
Item = benchmark.Item
MOST_WINDOWS = 5   # of a query; queries with more are left out
MOMENTS = ("Here is a query: {query}. Where are all the segments for the query? Report the segments in "
           "seconds.")


def cap_eval(row: dict, place: rows.Place) -> Iterator[Item]:
    """video_id, source, video_start, video_end, atomic_statements, statement_categories, aggregated_caption.

    A file ID_bounded_decimal_2_START_END holds the clip alone; otherwise the clip is cut from the video.
    """
    name = str(row["video_id"])
    clip = None
    if row["video_start"] is not None and row["video_end"] is not None:
        clip = (float(row["video_start"]), float(row["video_end"]))
        start, end = (str(round(second, 2)) for second in clip)
        bounded = place.media.find(f"{name}_bounded_decimal_2_{start}_{end}")
        if pathlib.Path(bounded).is_file():
            name, clip = pathlib.Path(bounded).name, None
    video = place.media.find(f"{row['source']}/{name}.mp4", name, f"vimeo_{name}", f"{name}.mov")
    found = tuple(statements.Statement(text, category) for text, category in
                  zip(row["atomic_statements"], row["statement_categories"], strict=True))
    yield Item(id=f"{row['video_id']}_{row['video_start']}_{row['video_end']}", cluster=video,
               example=types.Example(annotations=(), video=video, clip=clip, key=place.name),
               prompt=templates.LONG_CAPTION[0].format(medium="video"),
               target=statements.Target(statements=found, caption=row["aggregated_caption"]),
               reference=row["aggregated_caption"])


def qv_highlights(row: dict, place: rows.Place) -> Iterator[Item]:
    """qid, vid, query, relevant_windows [[start, end]] in seconds."""
    windows = [(float(start), float(end)) for start, end in row["relevant_windows"]]
    if 0 < len(windows) <= MOST_WINDOWS:
        video = place.media.find(f"videos/{row['vid']}.mp4", f"{row['vid']}.mp4")
        name = f"{row['qid']}_{row['vid']}"
        listed = ", ".join(f"[{start:g}-{end:g}]" for start, end in windows)
        yield Item(id=name, cluster=video, example=types.Example(annotations=(), video=video, key=name),
                   prompt=prompts.short("video_short_answer", MOMENTS.format(query=row["query"].rstrip("."))),
                   target=tuple(windows), reference=f"Segments: {listed}")


CAPTION = (
    Benchmark(name="cap_eval", title="Molmo2-CapEval", folder="cap_eval", max_new_tokens=2048,
              temperature=0.7, top_p=0.95, needs_judge=True,
              origin=f"{HUB}allenai/Molmo2-CapEval, test, with its vimeo videos; those of BDD100K "
              "(bdd100k/ID.mov) and Ego4D (ego4d/ID.mp4) must be asked for",
              files=("data/test-*.parquet",), rows=rows.each(cap_eval, "data/test-*.parquet"),
              metric=metrics.CAPTIONS, published={"f1": (39.9, 43.2, 40.1)}),
)
MOMENT = (
    Benchmark(name="qv_highlights", title="QVHighlights", folder="qv_highlights", max_new_tokens=64,
              origin="https://github.com/jayleicn/moment_detr, highlight_val_release.jsonl, and its videos",
              files=("highlight_val_release.jsonl",),
              rows=rows.each(qv_highlights, "highlight_val_release.jsonl"), metric=metrics.SEGMENTS),
)
