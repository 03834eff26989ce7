"""What training would leave out is listed, a sentence for each thing, and good records have none."""

import fractions
import json
import pathlib

import numpy as np
from PIL import Image

from data_pipelines import checking
from data_pipelines import sources
from data_pipelines import synthetic
from molmo2_jax import config
from molmo2_jax.inputs import tokenizer as tokenizers

NANO = pathlib.Path(__file__).parents[2] / "assets/nano"
MODEL = config.nano()
INPUTS = config.InputConfig(max_crops=1, high_res_crops=1, overlap_margins=(1, 1))
QA = {"type": "qa", "question": "What is it?", "answer": "A dot."}


def points(**point):
    return {"type": "points", "label": "dot", "points": [point]}


def test_each_record_is_held_against_its_media(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.mp4").write_text("no video")
    synthetic.encode(tmp_path / "c.mp4", np.zeros((4, 32, 32, 3), np.uint8), np.arange(5),
                     fractions.Fraction(1, 4), 4)
    records = [
        {"images": ["a.png"], "annotations": [QA, points(x=39, y=29)]},
        {"images": ["a.png"], "annotations": [QA, points(x=41, y=29)]},
        {"video": "b.mp4", "annotations": [QA]},
        {"video": "c.mp4", "annotations": [QA, points(time=9, x=1, y=1), points(time=0.5, x=1, y=1)]}]
    path = tmp_path / "annotations.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = tokenizers.Tokenizer.from_file(NANO, MODEL.text.vocab_size)
    good, outside, unreadable, late = checking.problems(sources.read_jsonl(path), MODEL, INPUTS, tokenizer)
    assert good == [] and len(outside) == len(unreadable) == len(late) == 1
    assert outside[0].startswith("annotations.jsonl:2: annotations[1]: a point must lie inside")
    assert unreadable[0].startswith("annotations.jsonl:3: ") and "b.mp4" in unreadable[0]
    assert late[0].startswith("annotations.jsonl:4: annotations[1]: must have a point at a time that is")
