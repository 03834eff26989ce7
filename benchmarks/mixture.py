"""Start, memory and rate of sources of up to millions of records, against parsing all records at the start.

  python -m benchmarks.mixture [--large] [--folder=/tmp/molmo2_mixture]

Writes seeded sets of 1,000, 1e5 and 1e6 records (--large: and 5e6, 6 GB) of 20 points in an image, as lines
of annotations.jsonl and as shards of 500 records. Each row is a process of its own, with two worker
processes:

  cold           seconds from the settings to the first example, without an index or any file in memory
  warm           the same with both
  first batch    seconds to the first batch, warm, which includes the start of the workers
  main, worker   most MiB resident during this, more than in a process after its imports, and than in the
                 largest worker of a set of 1,000 records
  pickle         KiB that each worker receives
  records/core-s records read and parsed per second of a core, in random order
  numbers/s      numbers per second that the order maps to records

"lines" and "shards" are the two kinds of source. "parsed" is the peer: it parses all lines at the start and
keeps the examples, which go to every worker.
"""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
from absl import app
from absl import flags
from PIL import Image

from data_pipelines import pipeline
from data_pipelines import records
from data_pipelines import sources
from data_pipelines.prepared import making
from data_pipelines.prepared import writing
from data_pipelines.sources import lines
from data_pipelines.sources import shard_format
from data_pipelines.stream import order as orders
from molmo2_jax import config as configs
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import tokenizer as tokenizers

_FOLDER = flags.DEFINE_string("folder", "/tmp/molmo2_mixture", "Where the sets are kept.")
_LARGE = flags.DEFINE_bool("large", False, "Also 5e6 records.")
SMALLEST, PARSED, SIZES, LARGEST = 1_000, 100_000, (100_000, 1_000_000), 5_000_000
POINTS, IMAGES, DISTINCT = 20, 64, 4096
RECORDS = 500                     # of a shard
READ, NUMBERS = 3_000, 100_000    # records and numbers whose rates are measured
WORKERS, MIB = 2, 2**20


def draw(folder: pathlib.Path, number: int, seed: int = 0) -> None:
    """Writes a data folder of `number` distinct records, made of DISTINCT annotations, unless it is there."""
    target = folder / lines.FILE
    if target.exists():
        return
    (folder / "media").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for image in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / f"media/{image}.png")
    bodies = []
    for _ in range(DISTINCT):
        points = [{"x": round(x, 2), "y": round(y, 2), "id": place}
                  for place, (x, y) in enumerate(rng.uniform(0, 24, (POINTS, 2)).tolist())]
        bodies.append(json.dumps({"type": "points", "label": "cup", "mode": "point_count",
                                  "points": points})[1:])
    partial = target.with_name("partial")
    with open(partial, "w", encoding="utf-8") as file:
        for place in range(number):
            file.write(f'{{"images": ["media/{place % IMAGES}.png"], "size": [[32, 24]], "annotations": '
                       f'[{{"prompt": "Point to cup {place}.", {bodies[place % DISTINCT]}]}}\n')
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def _encoded(line: bytes, key: str) -> making.Made:
    """Returns a prepared record without decoding its media, so that a million of them take minutes."""
    return making.Made(shard_format.encode(key, json.loads(line), {}), {})


def draw_shards(folder: pathlib.Path) -> pathlib.Path:
    """Returns a folder with the shards of a drawn set, written unless they are there."""
    output = folder.with_name(f"{folder.name}_shards")
    if (output / shard_format.MANIFEST).exists():
        return output
    model, index = configs.nano(), lines.Lines(folder)
    settings = shard_format.Settings(name="drawn", input=writing.sha256(folder / lines.FILE),
                                     records_per_shard=RECORDS)
    maker = making.Maker(folder=str(folder), settings=settings, model=model, inputs=configs.InputConfig(),
                         tokenizer=tokenizer(model))
    plan = writing.Plan(maker=maker, output=str(output), number=-(-len(index) // RECORDS))
    for block in index.blocks(RECORDS):
        writing.write_shard(plan, block, _encoded)
    writing.finish(plan)
    return output


def tokenizer(model: configs.Molmo2Config) -> tokenizers.Tokenizer:
    return tokenizers.train_small(["Point to cup 0123456789."] * 3, model.text.vocab_size)


class Parsed:
    """The peer: a source that parses all records at the start and holds them."""

    def __init__(self, folder: str, *, name: str = "", cache: str | None = None):
        del cache
        self.name = name
        self._examples = [one for one in sources.each(lines.Lines(folder, name=name))
                          if not isinstance(one, records.BrokenRecord)]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int):
        return self._examples[index]

    def key(self, index: int) -> str:
        return self._examples[index].key


KINDS = {"parsed": Parsed, "lines": sources.open_source, "shards": sources.open_source}


def place(root: pathlib.Path, kind: str, number: int) -> pathlib.Path:
    """Returns the folder of a set."""
    return root / (f"{number}_shards" if kind == "shards" else str(number))


def resident(pid: int | str = "self") -> float:
    """Returns the resident MiB of a process, shared pages included; 0 if it has ended."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(found[0]) / 1024 if found else 0.0


def workers_of(pid: int) -> list[int]:
    """Returns the worker processes that a process has started."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


class Watch:
    """A thread that samples the most MiB that this process and the largest of its workers have resident."""

    def __init__(self):
        self.main = self.worker = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(0.05):
            self.main = max(self.main, resident())
            self.worker = max([self.worker, *map(resident, workers_of(os.getpid()))])

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


def forget(folder: pathlib.Path) -> None:
    """Removes the index of a set, and its files from the memory of the system."""
    (folder / lines.INDEX).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def make_dataset(folder: pathlib.Path) -> pipeline.Batches:
    """Returns batches of a set, for a nano model."""
    model = configs.nano()
    data = pipeline.DataConfig(train=(str(folder),), seed=0, row_tokens=4096, row_crops=64, batch_rows=1,
                               packer=packers.OldestFirst(buffer=8), prefetch=0, num_workers=WORKERS)
    return pipeline.make_dataset(data, model, configs.InputConfig(), tokenizer(model))


def first_example(folder: pathlib.Path) -> tuple[pipeline.Batches, float]:
    start = time.perf_counter()
    dataset = make_dataset(folder)
    note, _ = dataset.preparer(0)
    assert not note.reason, note
    return dataset, time.perf_counter() - start


def measure(kind: str, folder: pathlib.Path) -> dict[str, float]:
    """Returns the figures of one kind of source and one set."""
    sources.open_source = KINDS[kind]  # as pipeline finds it
    make_dataset(place(folder.parent, kind, SMALLEST)).preparer(0)  # what only the first use costs
    before, watch = resident(), Watch()
    forget(folder)
    dataset, cold = first_example(folder)
    if kind == "parsed":
        warm = cold  # there is nothing that a second start would find
    else:
        del dataset
        dataset, warm = first_example(folder)
    start = time.perf_counter()
    iterator = iter(dataset)
    next(iterator)
    first = time.perf_counter() - start
    for _ in range(3):
        next(iterator)
    iterator.close()
    source = dataset.preparer.sources[0]
    rate = parse_rate(source) if kind != "parsed" else READ / parse_seconds(folder)
    watch.stop()
    return {"records": len(source), "cold": cold, "warm": warm, "first_batch": first + warm,
            "main": watch.main - before, "worker": watch.worker,
            "pickle": len(pickle.dumps(dataset.preparer, pickle.HIGHEST_PROTOCOL)) / 1024,
            "records_per_second": rate, "numbers_per_second": order_rate(len(source))}


def parse_rate(source: sources.Source) -> float:
    """Returns records per second of a core, read in random order."""
    places = np.random.default_rng(1).integers(len(source), size=READ).tolist()
    start = time.process_time()
    for place in places:
        source[place]
    return READ / (time.process_time() - start)


def parse_seconds(folder: pathlib.Path) -> float:
    """Returns the core seconds in which the peer reads READ records."""
    small = folder.parent / str(SMALLEST)
    start = time.process_time()
    for _ in range(READ // SMALLEST):
        Parsed(str(small))
    return time.process_time() - start


def order_rate(size: int) -> float:
    """Returns numbers per second."""
    order = orders.Order([size], [(0, (1.0,))], seed=0)
    order(0)
    start = time.perf_counter()
    for number in range(NUMBERS):
        order(number)
    return NUMBERS / (time.perf_counter() - start)


def show(kind: str, found: dict[str, float], smallest: float) -> None:
    print(f"| {kind} | {found['records']:,} | {found['cold']:.2f} | {found['warm']:.2f} | "
          f"{found['first_batch']:.2f} | {found['main']:.0f} | {max(found['worker'] - smallest, 0):.0f} | "
          f"{found['pickle']:,.0f} | {found['records_per_second']:,.0f} | "
          f"{found['numbers_per_second']:,.0f} |", flush=True)


def main(arguments: list[str]) -> None:
    root = pathlib.Path(_FOLDER.value)
    if arguments[1:]:  # one measurement, in its own process
        kind, number = arguments[1:]
        print(json.dumps(measure(kind, place(root, kind, int(number)))))
        return
    sizes = (*SIZES, *([LARGEST] if _LARGE.value else []))
    for number in (SMALLEST, *sizes):
        draw(root / str(number), number)
        draw_shards(root / str(number))

    def run(kind: str, number: int) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.mixture", f"--folder={root}", kind, str(number)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    print("| source | records | cold, s | warm, s | first batch, s | main, MiB | worker, MiB | pickle, KiB | "
          "records/core-s | numbers/s |\n" + "|---" * 10 + "|")
    peer = run("parsed", PARSED)
    show("parsed", peer, run("lines", SMALLEST)["worker"])
    ratios = {}
    for kind in ("lines", "shards"):
        smallest = run(kind, SMALLEST)["worker"]
        for number in sizes:
            found = run(kind, number)
            show(kind, found, smallest)
            if number == PARSED:
                ratios[kind] = {name: peer[name] / max(found[name], 1e-9)
                                for name in ("cold", "warm", "main", "pickle")}
    for kind, found in ratios.items():
        print(f"parsed / {kind}, at 100,000 records: "
              + ", ".join(f"{name} {ratio:,.0f}" for name, ratio in found.items()))


if __name__ == "__main__":
    app.run(main)
