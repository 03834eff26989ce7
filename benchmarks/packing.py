"""Fill of rows and cost of choosing them: our rule against the reference's, on the same streams.

  python -m benchmarks.packing --examples=4000 --seed=0 --seed=1

Prints one line per stream and rule, the rules in turn within one process:

  efficiency   max(tokens / T, crops / M) / rows, of emitted rows. `limit` is an upper bound for any packer
               on the stream: an example with all crops of a row shares it with text alone
  tokens, crops   mean fill of rows
  examples, annotations   mean per row; annotations are drawn with the examples
  ms / row     time in the rule, thread time; ratio: to that of the table
  table        the knapsack as the reference solves it, with a full float32 table. Same rows, other times
  wait         longest stay in the buffer, in rows

Streams are drawn from the kinds of the recipe's mixtures (data_pipelines/tasks.py): sizes follow from the
real tilings and frame times, durations, image sizes and lengths of texts from distributions. With --goldens
also from the folder of recorded streams: as they are, and resampled to --examples.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np

from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import video

MODEL = config.molmo2_8b()
SIZES = ((480, 640), (640, 480), (768, 1024), (1080, 1920), (1200, 800), (336, 336))
SHARES = {"demo": 0.15, "video_academic": 0.20, "image_academic": 0.25, "tracking": 0.15,
          "video_pointing": 0.15, "image_pointing": 0.10, "nlp": 0.0995, "hardcodes": 0.0005}
STAGES = {"pretrain": (16, 2560, 16), "sft": (128, 16384, 128), "long_context": (384, 36864, 384)}


@dataclasses.dataclass(frozen=True)
class Size:
    """Tokens, crops and annotations of an example."""
    tokens: int
    crops: int
    annotations: int = 1


@dataclasses.dataclass(frozen=True)
class Stream:
    """sizes: of the examples, in order. T, M: budgets of a row."""
    name: str
    sizes: Sequence[Size]
    T: int
    M: int
    buffer: int = 48
    image_weight: float = 30.0
    emit_full_crops_alone: bool = False


def draw(rng: np.random.Generator, shares: dict[str, float], inputs: config.InputConfig, T: int) -> Size:
    """Returns an example of the mixture, cut to T tokens."""
    kind = rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values()))
    root, crops, text = _KINDS[kind](rng, inputs)
    annotations = 1 if kind in ("nlp", "tracking", "captions") else 1 + min(int(rng.geometric(0.3)), 12)
    length = sum(int(rng.lognormal(np.log(text), 0.7)) + 12 for _ in range(annotations))
    return Size(min(1 + root + length, T), crops, annotations)


def _image(rng, max_crops: int, inputs) -> tuple[int, int]:
    """Returns tokens and crops of an image."""
    rows, columns = crops_lib.tiling(*SIZES[rng.integers(len(SIZES))], max_crops, MODEL, inputs)
    high, wide = (-(-(19 * tiles + 8) // 2) for tiles in (rows, columns))
    return 200 + high * (wide + 1), 1 + rows * columns


def _images(rng, inputs, text: int) -> tuple[int, int, int]:
    count = 1 if rng.random() < 0.85 else int(rng.integers(2, 6))
    sizes = [_image(rng, inputs.max_crops, inputs) for _ in range(count)]
    return sum(tokens + 3 * (count > 1) for tokens, _ in sizes), sum(crops for _, crops in sizes), text


def _video(rng, inputs, median: float, longest: float, text: int) -> tuple[int, int, int]:
    duration = min(max(rng.lognormal(np.log(median), 0.8), 1.0), longest)
    return *_frames(video.sample_seconds(duration, inputs.max_frames)), text


def _frames(seconds) -> tuple[int, int]:
    return sum(84 + len(f"{one:.1f}") + (place > 0) for place, one in enumerate(seconds)), len(seconds)


def _track(rng, inputs) -> tuple[int, int, int]:
    duration = min(max(rng.lognormal(np.log(12), 0.6), 2.0), 60.0)
    seconds = video.tracking_seconds(duration, inputs.max_frames, 30, int(rng.integers(1, 3)))
    return *_frames(seconds), 250


def _demo(rng, inputs) -> tuple[int, int, int]:
    return _video(rng, inputs, 60, 1200, 300) if rng.random() < 0.35 else _images(rng, inputs, 200)


def _pointing(rng, inputs) -> tuple[int, int, int]:
    return *_image(rng, inputs.high_res_crops if rng.random() < 0.3 else inputs.max_crops, inputs), 80


_KINDS: dict[str, Callable] = {
    "demo": _demo, "video_academic": lambda rng, inputs: _video(rng, inputs, 25, 900, 40),
    "image_academic": lambda rng, inputs: _images(rng, inputs, 40), "tracking": _track,
    "video_pointing": lambda rng, inputs: _video(rng, inputs, 20, 63, 90), "image_pointing": _pointing,
    "nlp": lambda rng, inputs: (0, 0, 700), "hardcodes": lambda rng, inputs: _images(rng, inputs, 60),
    "captions": lambda rng, inputs: (*_image(rng, inputs.max_crops, inputs), 450)}


def drawn(name: str, number: int, seed: int) -> Stream:
    """Returns a stream of the stage `name`: pretrain, sft or long_context."""
    rng = np.random.default_rng(seed)
    frames, T, M = STAGES[name]
    shares = {"captions": 0.6, "image_pointing": 0.3, "nlp": 0.1} if name == "pretrain" else SHARES
    inputs = config.InputConfig(max_frames=frames, high_res_crops=8 if name == "pretrain" else 24)
    return Stream(name, [draw(rng, shares, inputs, T) for _ in range(number)], T, M,
                  image_weight=1.0 if name == "pretrain" else 30.0)


def recorded(path: pathlib.Path, number: int, seed: int) -> list[Stream]:
    """Returns the recorded streams, and the first of them resampled to `number` examples."""
    streams = []
    for place, case in enumerate(json.loads(path.read_text())["streams"]):
        sizes = [Size(*size) for size in case["examples"]]
        streams.append(Stream(f"recorded {place}", sizes, case["max_tokens"], case["max_images"],
                              case["buffer_size"], case["image_weight"], case["shortcut_max_len_images"]))
    order = np.random.default_rng(seed).integers(len(streams[0].sizes), size=number)
    first = streams[0]
    sizes = [first.sizes[place] for place in order]
    return [*streams, dataclasses.replace(first, name="recorded 0, long", sizes=sizes)]


def sequence_of(size: Size) -> types.Sequence:
    """Returns a sequence of this size without contents."""
    empty = np.broadcast_to(np.int32(0), size.tokens)
    return types.Sequence(
        tokens=empty, targets=empty, weights=empty, positions=empty, branch=empty, image=empty,
        patches=np.broadcast_to(np.uint8(0), (size.crops, 0, 0)), pooled=np.zeros((0, 1), np.int32))


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A rule that records the time it takes."""
    rule: packers.Rule
    times: list[float] = dataclasses.field(default_factory=list)

    def is_ready(self, *args) -> bool:
        return self.rule.is_ready(*args)

    def stands_alone(self, *args) -> bool:
        return self.rule.stands_alone(*args)

    def choose(self, *args) -> list[int]:
        start = time.thread_time()
        chosen = self.rule.choose(*args)
        self.times.append(time.thread_time() - start)
        return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(packers.Knapsack):
    """The same rule, solved with a table of all capacities for every number of items."""

    def choose(self, tokens, crops, waits, max_tokens, max_crops) -> list[int]:
        step = self._step(max_tokens)
        steps, size = [-(-t // step) for t in tokens], -(-max_tokens // step)
        best = np.zeros((len(steps) + 1, size + 1, max_crops + 1), np.float32)
        for item, (t, c) in enumerate(zip(steps, crops, strict=True)):
            best[item + 1] = best[item]
            value = np.float32(tokens[item] * self.text_weight + c * self.image_weight)
            with_item = best[item, :size + 1 - t, :max_crops + 1 - c] + value
            best[item + 1, t:, c:] = np.maximum(best[item, t:, c:], with_item)
        chosen, t, c = [], size, max_crops
        for item in range(len(steps) - 1, -1, -1):
            if best[item + 1, t, c] != best[item, t, c]:
                chosen.append(item)
                t, c = t - steps[item], c - crops[item]
        return chosen


@dataclasses.dataclass(frozen=True)
class Result:
    rows: int
    tokens: float       # share of the budget, mean of rows
    crops: float
    examples: float     # per row
    annotations: float
    milliseconds: float  # per row that the rule chose
    longest_wait: int

    @property
    def efficiency(self) -> float:
        return max(self.tokens, self.crops)


def pack(stream: Stream, rule: packers.Rule) -> Result:
    """Returns the result of a rule on a stream, without what is left in the buffer."""
    timed = _Timed(rule)
    packer, rows = packers.Packer(timed, stream.T, stream.M), []
    for number, size in enumerate(stream.sizes):
        row = packer.push(sequence_of(size), number)
        rows += [row] if row else []
    used = [stream.sizes[number] for row in rows for _, number in row]
    return Result(
        len(rows), sum(min(one.tokens, stream.T) for one in used) / stream.T / len(rows),
        sum(one.crops for one in used) / max(stream.M, 1) / len(rows), len(used) / len(rows),
        sum(one.annotations for one in used) / len(rows), 1e3 * sum(timed.times) / max(len(timed.times), 1),
        packer.state()["longest_wait"])


def limit(stream: Stream) -> float:
    """Returns an efficiency that no packer exceeds on an endless stream of these examples.

    An example with so many crops that even the smallest visual one does not fit into the same row can share
    its row only with text; the others need as many rows as their tokens or crops fill. Two examples of more
    than half a row's tokens cannot share a row.
    """
    visual = [one for one in stream.sizes if one.crops]
    smallest = min((one.crops for one in visual), default=0)
    large = [one for one in visual if one.crops + smallest > stream.M]
    others = [one for one in visual if one.crops + smallest <= stream.M]
    text = sum(one.tokens for one in stream.sizes if not one.crops)
    room = sum(max(stream.T - one.tokens, 0) for one in large)
    tokens = sum(one.tokens for one in others) + max(text - room, 0)
    rows = len(large) + max(tokens / stream.T, sum(one.crops for one in others) / max(stream.M, 1))
    rows = max(rows, sum(2 * one.tokens > stream.T for one in stream.sizes))
    whole = max(sum(min(one.tokens, stream.T) for one in stream.sizes) / stream.T,
                sum(one.crops for one in stream.sizes) / max(stream.M, 1))
    return min(whole / rows, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--goldens", type=pathlib.Path, default="tests/goldens/packer/cases.json")
    arguments = parser.parse_args()
    print("| stream | rule | rows | efficiency | limit | tokens | crops | examples | annotations | ms / row "
          "| ratio | wait |")
    print("|" + "---|" * 12)
    for seed in arguments.seed or [0]:
        streams = [drawn(name, arguments.examples, seed) for name in ("pretrain", "sft", "long_context")]
        for stream in [*streams, *recorded(arguments.goldens, arguments.examples, seed)]:
            _print(stream)


def _print(stream: Stream) -> None:
    """Prints a line for each rule; the buffer of ours is at most twice the reference's."""
    default = packers.OldestFirst()
    values = {"buffer": stream.buffer, "image_weight": stream.image_weight,
              "emit_full_crops_alone": stream.emit_full_crops_alone}
    rules = (Table(**values), packers.Knapsack(**values),
             dataclasses.replace(default, buffer=default.buffer * stream.buffer // 48))
    results = [pack(stream, rule) for rule in rules]
    assert results[0].rows == results[1].rows and results[0].tokens == results[1].tokens
    for rule, result in zip(rules, results, strict=True):
        cells = (stream.name, f"{type(rule).__name__} {rule.buffer}", result.rows, f"{result.efficiency:.1%}",
                 f"{limit(stream):.1%}", f"{result.tokens:.1%}", f"{result.crops:.1%}",
                 f"{result.examples:.1f}", f"{result.annotations:.1f}", f"{result.milliseconds:.2f}",
                 f"{result.milliseconds / results[0].milliseconds:.2f}", result.longest_wait)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
