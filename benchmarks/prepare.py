"""launch.prepare: its throughput, and whether runs that are killed write what one left alone does.

  python -m benchmarks.prepare speed --folder=/tmp/speed --videos=64
  python -m benchmarks.prepare rows --folder=/tmp/rows --rows=200000
  python -m benchmarks.prepare kills --folder=/tmp/kills --kills=50

`kills` starts the command over and over, on a data folder and on published rows, with one process and with
several, ends it by SIGKILL at a random moment while it works, alone or with all its processes, and compares
every file with those of a run that was left alone; the exit status says whether all are equal. `speed` prints
videos and MB per second of a core with one worker process and with two, `rows` published rows and memory.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import av
import numpy as np

from molmo2_jax.inputs import video

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 300   # seconds that any wait may take
NOT_COMPARED = {".lock"}
IMAGES = 500  # that rows of points are about


@dataclasses.dataclass
class Run:
    """The command over one input, into one output folder.

    given: the flags of its input. last: the file that is written last. files: pattern of those that are
    written before, by many of which a moment is drawn.
    """
    given: tuple[str, ...]
    output: pathlib.Path
    flags: tuple[str, ...] = ()
    last: str = "manifest.json"
    files: str = "*-of-*.json"
    many: int = 3

    @classmethod
    def of_data(cls, data: pathlib.Path, output: pathlib.Path,
                flags: tuple[str, ...] = ("--records_per_shard=5", "--media=copy")) -> "Run":
        """Writes the shards of a data folder."""
        return cls((f"--data={data}",), output, flags)

    @classmethod
    def of_rows(cls, rows: pathlib.Path, output: pathlib.Path) -> "Run":
        """Converts the rows that `points` wrote."""
        (output / "media").mkdir(parents=True, exist_ok=True)
        for number in range(IMAGES):
            (output / f"media/{number:04}.jpg").write_bytes(b"x")
        return cls(("--task=pixmo_points", f"--published={rows}/*.jsonl"), output, last="annotations.jsonl",
                   files=".annotations.jsonl.*.partial/*", many=200)

    def start(self, workers: int = 1) -> subprocess.Popen:
        """Starts it as a group of processes."""
        beam = ["--", f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "launch.prepare", *self.given, f"--output={self.output}", *self.flags,
                 *(beam if workers > 1 else [])], cwd=ROOT, stdout=log, stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)

    @property
    def log(self) -> pathlib.Path:
        return self.output.with_suffix(".log")

    def finish(self, workers: int = 1) -> None:
        """Runs it to its end. Raises RuntimeError with the end of its log if it fails."""
        status = self.start(workers).wait(LIMIT)
        if status:
            raise RuntimeError(f"launch.prepare must end with 0; got {status}\n"
                               f"{self.log.read_text()[-4000:]}")

    def written(self) -> set[pathlib.Path]:
        """Returns the shards or parts that are done."""
        return set(self.output.glob(self.files))

    def is_done(self) -> bool:
        return (self.output / self.last).exists()

    def content(self) -> dict[str, bytes]:
        """Returns all files, those of a process that was killed left out."""
        return {path.name: path.read_bytes() for path in self.output.iterdir()
                if path.is_file() and path.name not in NOT_COMPARED and not path.name.endswith(".partial")}


def draw(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Writes a data folder of `count` drawn films and images; returns it."""
    from data_pipelines.world import config
    from data_pipelines.world import write
    world = dataclasses.replace(config.quickstart_world(), frame_side=(32, 48))
    return write.write(folder, world, 0, count, "train", progress=False).parent


def points(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Writes `count` rows of points about IMAGES images, in four files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for file in range(4):
        with (folder / f"rows-{file}.jsonl").open("w") as out:
            for number in range(file, count, 4):
                places = [{"x": round(rng.random() * 100, 1), "y": round(rng.random() * 100, 1)}
                          for _ in range(5)]
                out.write(json.dumps({"image_sha256": f"{rng.randrange(IMAGES):04}", "points": places,
                                      "label": f"thing {number}", "collection_method": "pointing"}) + "\n")
    return folder


def kill_once(run: Run, rng: random.Random) -> str:
    """Starts a run, kills it at a random moment of its work, and returns what was done; "" if it ended before
    that."""
    workers, is_group = rng.choice((1, 1, 2)), rng.random() < 0.5
    before = run.written()
    process = run.start(workers)
    target = rng.randrange(run.many)
    until = time.monotonic() + LIMIT
    while process.poll() is None and not _is_working(run, before, target):
        if time.monotonic() > until:
            raise RuntimeError(f"the moment to kill never came\n{run.log.read_text()[-4000:]}")
        time.sleep(0.003)
    time.sleep(rng.random() * 0.2)
    if process.poll() is not None:
        return ""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if is_group else process.kill()
    process.wait()
    return f"{workers} workers, {'all' if is_group else 'main'}: {len(run.written() - before)} files"


def _is_working(run: Run, before: set[pathlib.Path], target: int) -> bool:
    """Returns whether `target` files are done that were not there before, or, of 0, one is being written."""
    return len(run.written() - before) >= target if target else any(run.output.glob(".*.partial"))


def kill_often(make: Callable[[pathlib.Path], Run], folder: pathlib.Path, kills: int, seed: int,
               wanted: dict[str, bytes]) -> list[str]:
    """Kills runs `kills` times, over as many output folders as it takes; returns the names of those that
    differ from `wanted`. make: returns a run into a folder."""
    rng, done, number, differing = random.Random(seed), 0, 0, []
    while done < kills:
        run = make(folder / f"killed_{number}")
        number += 1
        while done < kills and not run.is_done():
            what = kill_once(run, rng)
            if what:
                done += 1
                print(f"{done:3} {run.output.name}: {what}", flush=True)
        run.finish()
        if run.content() != wanted:
            differing.append(run.output.name)
    return differing


def _kills(options) -> int:
    data, rows = draw(options.folder / "data", options.records), points(options.folder / "rows", 10_000)
    failed = False
    for name, make in (("shards", functools.partial(Run.of_data, data)),
                       ("records", functools.partial(Run.of_rows, rows))):
        (options.folder / name).mkdir()
        alone = make(options.folder / name / "alone")
        alone.finish()
        differing = kill_often(make, options.folder / name, options.kills, options.seed, alone.content())
        print(f"{name} after {options.kills} kills: " + ("equal in every byte" if not differing
                                                         else f"DIFFERENT: {differing}"))
        failed |= bool(differing)
    return failed


def _speed(options) -> int:
    data = options.folder / "data"
    megabytes, shown = _film(data)
    print(f"a film of {megabytes:.2f} MB, 640 x 360 pixels, 12 seconds, of which {shown} frames are shown")
    for media in options.media or ("reference", "copy", "frames"):
        for workers in (1, 2):
            name = options.folder / f"{media}_{workers}"
            start, _ = _cost(data, name.with_suffix(".start"), media, 1, workers)
            seconds, written = _cost(data, name, media, options.videos, workers)
            rate = (options.videos - 1) / (seconds - start)
            print(f"{media:9} {workers} workers {rate:6.2f} videos and {rate * megabytes:6.2f} MB per "
                  f"core-second, after {start:.1f} core-seconds of start-up; "
                  f"{written / options.videos:.2f} MB written per video", flush=True)
    return 0


def _rows(options) -> int:
    costs = []
    for count in (1, options.rows):
        rows = points(options.folder / f"rows_{count}", count)
        before = _core_seconds()
        Run.of_rows(rows, options.folder / f"out_{count}").finish()
        costs.append(_core_seconds() - before)
        megabytes = sum(path.stat().st_size for path in rows.iterdir()) / 1e6
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"{count} rows, {megabytes:.1f} MB: {costs[-1]:.1f} core-seconds, {peak:.0f} MiB", flush=True)
    rate = (options.rows - 1) / (costs[1] - costs[0])
    print(f"{rate:,.0f} rows per core-second beyond the start")
    return 0


def _core_seconds() -> float:
    """Returns the user and system time of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cost(data: pathlib.Path, output: pathlib.Path, media: str, count: int, workers: int
          ) -> tuple[float, float]:
    """Returns the core-seconds of preparing the film `count` times, and the MB that were written."""
    annotation = {"type": "qa", "question": "What?", "answer": "That."}
    line = json.dumps({"video": "film.mp4", "annotations": [annotation]})
    (data / "annotations.jsonl").write_text(f"{line}\n" * count)
    before = _core_seconds()
    run = Run.of_data(data, output, (f"--media={media}", "--records_per_shard=16"))
    run.finish(workers)
    seconds = _core_seconds() - before
    return seconds, sum(path.stat().st_size for path in run.output.glob("*.array_record")) / 1e6


def _film(data: pathlib.Path) -> tuple[float, int]:
    """Writes data/film.mp4 (H.264, 24 frames/s); returns its MB and how many frames training asks for."""
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 256, (90, 160, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(data / "film.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"g": "48"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(12 * 24):
            picture = np.roll(ground, (number, 2 * number), (0, 1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return (data / "film.mp4").stat().st_size / 1e6, len(video.sample_seconds(12.0, 128))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "rows", "kills"))
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--records", type=int, default=60)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--media", action="append", help="of speed; may be repeated (default: all)")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"--folder must be new; got {options.folder}")
    options.folder.mkdir(parents=True)
    sys.exit({"kills": _kills, "rows": _rows, "speed": _speed}[options.what](options))


if __name__ == "__main__":
    main()
