"""The benchmarks of the paper's tables, by name, and suites of them.

One row of a table per benchmark: where its files are, how they are read, asked and scored, and what was
published (benchmark.Benchmark). `load` returns the benchmarks that a name stands for; `Benchmark.read` the
questions; results.score scores answers. Nothing here needs a model or a device.
"""

import difflib
from collections.abc import Iterable

from data_pipelines.suites import images
from data_pipelines.suites import multi_image
from data_pipelines.suites import pointing
from data_pipelines.suites import tracking
from data_pipelines.suites import video_choice
from data_pipelines.suites import videos
from data_pipelines.suites.benchmark import Benchmark
from data_pipelines.suites.benchmark import Item
from data_pipelines.suites.benchmark import Missing

__all__ = ["AVERAGES", "BENCHMARKS", "SUITES", "Benchmark", "Item", "Missing", "load"]

SUITES: dict[str, tuple[Benchmark, ...]] = {
    "short_video": video_choice.SHORT, "long_video": video_choice.LONG,
    "video_count": pointing.VIDEO_COUNT, "video_point": pointing.VIDEO_POINT, "track": tracking.TRACK,
    "caption": videos.CAPTION, "image": images.IMAGE, "multi_image": multi_image.MULTI_IMAGE,
    "point": pointing.POINT,
}
SUITES["molmo2"] = tuple(one for suite in SUITES.values() for one in suite)   # the paper's table
# Further benchmarks of the published suite, without a figure in that table.
SUITES |= {"more_image": images.MORE_IMAGE, "screen": pointing.SCREEN, "moment": videos.MOMENT,
           "more_count": pointing.BURST, "more_caption": video_choice.CAPTIONING}

BENCHMARKS: dict[str, Benchmark] = {one.name: one for suite in SUITES.values() for one in suite}

# Why names that one might ask for are no benchmarks here.
ABSENT = {
    "burst_vc": "the questions of BURST-VC are not public; burst_count makes such questions of the tracks of "
                "BURST",
    "mevis_valid": "MeViS valid has no public ground truth: its server scores masks on all frames. "
                   "mevis_valid_u is scored here",
    "tap_vid": "TAP-Vid asks for single points in every frame, and an answer has a point or two per second; "
               "data_pipelines.scoring.tap_vid scores the tracks of other programs",
}

# The averages of the paper: suite -> percentages of benchmark.MODELS.
AVERAGES: dict[str, tuple[float, float, float]] = {
    "short_video": (69.3, 69.9, 68.1), "long_video": (64.5, 64.1, 59.2), "image": (80.4, 81.7, 79.7),
    "multi_image": (57.8, 56.4, 53.5)}


def load(names: str | Iterable[str]) -> tuple[Benchmark, ...]:
    """Returns the benchmarks of suites and of single benchmarks, each once, in the order given.

    names: one name, or several; a text may also be several with commas.

    Raises:
      ValueError: a name is neither a suite nor a benchmark, or a benchmark that cannot be scored here.
    """
    found: dict[str, Benchmark] = {}
    for name in names.split(",") if isinstance(names, str) else names:
        name = name.strip()
        for absent, why in ABSENT.items() if name not in BENCHMARKS else ():
            if name.startswith(absent):
                raise ValueError(f"a benchmark must be one that files on disk can score; got {name!r}: {why}")
        if name not in SUITES and name not in BENCHMARKS:
            near = difflib.get_close_matches(name, [*SUITES, *BENCHMARKS], n=1)
            raise ValueError(f"a suite must be one of {', '.join(SUITES)}, or a benchmark of "
                             f"{', '.join(BENCHMARKS)}; got {name!r}"
                             + (f"; did you mean {near[0]!r}?" if near else ""))
        for one in SUITES.get(name) or (BENCHMARKS[name],):
            found[one.name] = one
    return tuple(found.values())
