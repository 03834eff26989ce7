"""Rows and frames per second of the data pipeline with 0, 1 and 2 worker processes, and its time by stage.

  python -m benchmarks.loader [--folder=/tmp/molmo2_films] [--rows=24] [--frames=32]

The data set: videos of 360 and 720 lines and images, each with three questions, in the recipe's geometry
(crops of 378 x 378 pixels). Shares are of CPU time, taken without workers, each stage without those it calls.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
import time

import numpy as np
from absl import app
from absl import flags
from PIL import Image

from benchmarks import films
from data_pipelines import pipeline
from molmo2_jax import config as configs
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import pixels as pixels_lib
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import sequence
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.inputs import video

_FOLDER = flags.DEFINE_string("folder", "/tmp/molmo2_films", "Where films are kept.")
_ROWS = flags.DEFINE_integer("rows", 24, "Rows measured of each setting.")
_FRAMES = flags.DEFINE_integer("frames", 32, "Most frames of a film.")
ROW_TOKENS, ROW_CROPS, WARM_ROWS = 8192, 64, 1
STAGES = {  # name in the table: what is timed
    "decode": [(video, "read"), (pixels_lib, "load")],
    "resize": [(pixels_lib, "resize")],
    "crops": [(crops_lib, "crops_of_frames"), (crops_lib, "crops_of_images")],
    "tokenise": [(tokenizers.Tokenizer, "encode"), (sequence, "build"), (sequence, "truncate")],
    "pack": [(packers.Packer, "push")],
    "copy": [(rows_lib, "join"), (rows_lib, "stack")],
}


def data_set(folder: pathlib.Path) -> str:
    """Returns a new folder with annotations.jsonl and its media."""
    rng = np.random.default_rng(0)
    records = []
    questions = [{"type": "qa", "question": f"What is thing number {number}?", "answer": "A thing."}
                 for number in range(3)]
    for rows, keys, seconds in ((360, 60, 10), (360, 250, 10), (720, 60, 10), (360, 60, 60)):
        source = films.film(pathlib.Path(_FOLDER.value), rows, keys, seconds)
        shutil.copyfile(source, folder / source.name)
        records.append({"video": source.name, "annotations": questions})
    for number in range(2):
        picture = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((640, 480)).save(folder / f"{number}.jpg")
        records.append({"images": [f"{number}.jpg"], "annotations": questions})
    lines = [json.dumps(record) for record in records]
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


class Stages:
    """CPU seconds of each stage, excluding the stages that it calls."""

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._open: list[float] = []  # seconds of the stages inside each one that runs

    def timed(self, name: str, function):
        def call(*arguments, **named):
            self._open.append(0.0)
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                took = time.process_time() - start
                self.seconds[name] += took - self._open.pop()
                if self._open:
                    self._open[-1] += took
        return call

    @contextlib.contextmanager
    def watching(self):
        places = [(name, owner, attribute, getattr(owner, attribute))
                  for name, functions in STAGES.items() for owner, attribute in functions]
        for name, owner, attribute, function in places:
            setattr(owner, attribute, self.timed(name, function))
        try:
            yield self
        finally:
            for _, owner, attribute, function in places:
                setattr(owner, attribute, function)


def run(data: pipeline.DataConfig, model, inputs, tokenizer) -> tuple[float, float, int]:
    """Returns seconds, CPU seconds of this process, and crops of _ROWS rows."""
    iterator = pipeline.make_iterator(data, model, inputs, tokenizer)
    try:
        for _ in range(WARM_ROWS):
            next(iterator)
        start, cpu, crops = time.perf_counter(), time.process_time(), 0
        for _ in range(_ROWS.value):
            batch = next(iterator)
            crops += int(batch.patches.any(axis=(2, 3)).sum())
        return time.perf_counter() - start, time.process_time() - cpu, crops
    finally:
        iterator.close()


def main(_) -> None:
    model = dataclasses.replace(configs.nano(), vision=configs.VisionConfig())
    inputs = configs.InputConfig(max_frames=_FRAMES.value)
    words = "What is thing number 0123456789. A thing."
    tokenizer = tokenizers.train_small([words] * 3, model.text.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        data = pipeline.DataConfig(train=(data_set(pathlib.Path(folder)),), seed=0, row_tokens=ROW_TOKENS,
                                   row_crops=ROW_CROPS, batch_rows=1, prefetch=0, num_workers=0)
        stages = Stages()
        with stages.watching():
            seconds, cpu, crops = run(data, model, inputs, tokenizer)
        results = {0: (seconds, crops)}
        for workers in (1, 2):
            more = dataclasses.replace(data, num_workers=workers, prefetch=2)
            seconds, _, crops = run(more, model, inputs, tokenizer)
            results[workers] = seconds, crops
    print("| workers | rows/s | frames and crops/s | ratio to none |\n|---|---|---|---|")
    for workers, (seconds, crops) in results.items():
        ratio = crops / seconds * results[0][0] / results[0][1]
        print(f"| {workers} | {_ROWS.value / seconds:.2f} | {crops / seconds:.1f} | {ratio:.2f} |")
    total = sum(stages.seconds.values())
    print("\n|", " | ".join(stages.seconds), "|\n" + "|---" * len(stages.seconds) + "|")
    print("|", " | ".join(f"{value / total:.1%}" for value in stages.seconds.values()), "|")
    print(f"\n{results[0][1] / cpu:.1f} frames and crops per CPU second without workers")


if __name__ == "__main__":
    app.run(main)
