"""For the same file and question, launch.generate and the training path produce identical arrays."""

import json
import pathlib

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines import sources
from data_pipelines.stream import preparation
from launch import generate
from launch.support import cli
from launch.support import trained
from molmo2_jax import generate as generate_lib
from tests.launch import commands

flags_as_before = commands.flags_as_before

MODEL = pathlib.Path(__file__).parents[2] / "assets/nano"
QUESTION, ANSWER = "Point to the red circle.", "There are none."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for name, size in (("wide.png", (50, 300, 3)), ("small.jpg", (40, 40, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    with av.open(str(folder / "clip.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=7)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(20):
            picture = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return folder


def asked(monkeypatch, *arguments):
    """Returns the tree that launch.generate passes to the model."""
    trees = []

    def run(self, prompts, *rest, **named):
        trees.extend(prompt.tree for prompt in prompts)
        return [[generate_lib.Answer(text=ANSWER)]]

    monkeypatch.setattr(generate_lib.Answerer, "run", run)
    with pytest.raises(SystemExit) as caught:
        cli.start(generate.main, ["generate", f"--model={MODEL}", f"--prompt={QUESTION}", *arguments])
    assert not caught.value.code
    return trees[0]


def trained_on(folder, record):
    """Returns the sequence that training builds from a line of annotations.jsonl."""
    chat = {"type": "chat", "turns": [QUESTION, ANSWER]}
    (folder / "annotations.jsonl").write_text(json.dumps({**record, "annotations": [chat]}))
    source = trained.load(str(MODEL))
    example, = sources.examples(folder)
    return preparation.prepare(example, source.model, source.inputs, source.tokenizer,
                               np.random.default_rng(0))


@pytest.mark.parametrize("record", [{"video": "clip.mp4"}, {"images": ["wide.png"]},
                                    {"images": ["small.jpg", "wide.png"]}], ids=lambda record: str(record))
def test_generation_and_training_see_the_same_arrays(record, folder, monkeypatch, capsys):
    files = [record["video"]] if "video" in record else record["images"]
    flag = "video" if "video" in record else "image"
    tree = asked(monkeypatch, *(f"--{flag}={folder / name}" for name in files))
    sequence = trained_on(folder, record)
    np.testing.assert_array_equal(sequence.patches, tree.patches)
    np.testing.assert_array_equal(sequence.pooled, tree.pooled)
    count = len(tree.tokens)
    assert count < len(sequence.tokens) and len(tree.pooled) > 0
    for name in ("tokens", "positions", "image"):
        np.testing.assert_array_equal(getattr(sequence, name)[:count], getattr(tree, name), err_msg=name)
    assert (sequence.weights[:count - 1] == 0).all() and (sequence.weights[count - 1:] > 0).all()
    assert ANSWER in capsys.readouterr().out
