"""Small data folders, their shards (written without Beam), and the batches that training makes of them."""

import json
import pathlib

import numpy as np

from data_pipelines import pipeline
from data_pipelines.prepared import making
from data_pipelines.prepared import writing
from data_pipelines.sources import lines
from data_pipelines.sources import shard_format
from molmo2_jax.inputs import tokenizer as tokenizers
from tests.data_pipelines import test_pipeline

MODEL, INPUTS = test_pipeline.MODEL, test_pipeline.INPUTS
TOKENIZER = tokenizers.train_small(["Question 0123456789? Answer."] * 3, MODEL.text.vocab_size)


def prepare(folder: pathlib.Path, output: pathlib.Path, tokenizer=TOKENIZER, **how) -> pathlib.Path:
    """Returns `output` with the shards of a data folder, whose records are made in this process.

    how: fields of shard_format.Settings.
    """
    settings = shard_format.Settings(input="", max_frames=(INPUTS.max_frames,),
                                     **{"name": "drawn", "records_per_shard": 6, **how})
    maker = making.Maker(folder=str(folder), settings=settings, model=MODEL, inputs=INPUTS,
                         tokenizer=tokenizer)
    blocks = list(lines.Lines(folder).blocks(settings.records_per_shard))
    plan = writing.Plan(maker=maker, output=str(output), number=len(blocks))
    for block in blocks:
        writing.write_shard(plan, block, maker)
    writing.finish(plan)
    return output


def texts(root: pathlib.Path, number: int, **how) -> pathlib.Path:
    """Returns a prepared folder of records without media."""
    folder = root / "data"
    folder.mkdir()
    (folder / lines.FILE).write_text("".join(json.dumps({"annotations": [{
        "type": "qa", "question": f"Question {place}?", "answer": f"Answer {place}."}]}) + "\n"
        for place in range(number)))
    return prepare(folder, root / "shards", **how)


def data_config(train, **fields) -> pipeline.DataConfig:
    return test_pipeline.data_config("", **{"train": train, **fields})


def batches(train, tokenizer=TOKENIZER, count=6, **fields):
    """Returns the first batches of a run."""
    iterator = pipeline.make_iterator(data_config(train, **fields), MODEL, INPUTS, tokenizer)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def assert_equal(found, wanted) -> None:
    """Asserts that batches are equal to the bit."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for name, array in other._asdict().items():
            np.testing.assert_array_equal(getattr(one, name), array, err_msg=name)
