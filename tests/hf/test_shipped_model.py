"""The trained nano model in assets/ answers alike here and in transformers, on clips it has never seen."""

import pathlib
import types as python_types

import jax
import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import sources
from data_pipelines import synthetic
from molmo2_jax import decode
from molmo2_jax.hf import checkpoint
from molmo2_jax.inputs import media
from molmo2_jax.inputs import packing
from molmo2_jax.inputs import sequence as sequence_lib
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2
from tests.hf import test_transformers as parity

FOLDER = pathlib.Path(__file__).parents[2] / "assets" / "nano"
CLIPS, NEW = 8, 64
# float32, on logits of size 20, at the tokens of the question. What is predicted at visual tokens is never
# read nor trained; a few logits there differ by up to 2e-4.
LOGITS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def shipped():
    params, config, inputs = checkpoint.import_checkpoint(FOLDER)
    return params, config, inputs, tokenizers.Tokenizer.from_file(FOLDER, config.text.vocab_size)


@pytest.fixture(scope="module")
def questions(shipped, tmp_path_factory):
    """Returns [(Sequence, what its video looks like to transformers)]: one question about each clip."""
    _, config, inputs, tokenizer = shipped
    world = synthetic.quickstart_world()
    path = synthetic.write(tmp_path_factory.mktemp("clips"), world, seed=2**20, num_examples=3 * CLIPS,
                           split="heldout", progress=False)
    asked = []
    for example in [one for one in sources.read_jsonl(path) if one.video][:CLIPS]:
        crops, frames = media.see(example, config, inputs, tokenizer)
        branch = formats.to_branches(example, frames_or_sizes=frames, rng=np.random.default_rng(0),
                                     train=False)[0]
        branch = type(branch)(turns=branch.turns[:1])
        one = sequence_lib.build(crops, [branch], tokenizer)
        side = -(-config.vision.grid // config.connector.video_window[0])
        visual = python_types.SimpleNamespace(
            is_video=True, grids=np.array([[len(frames.seconds), side, side]]), num_crops=None)
        asked.append((one, visual))
    assert len(asked) == CLIPS
    return asked


def test_logits_and_64_greedy_tokens_on_8_clips_are_those_of_transformers(shipped, questions):
    params, config, _, _ = shipped
    theirs = parity.load(FOLDER)
    sizes = [(len(one.tokens), len(one.patches), *one.pooled.shape) for one, _ in questions]
    shape = dict(zip("TMRW", map(max, *sizes)))
    batch = packing.stack([packing.join([one], **shape) for one, _ in questions])
    model = molmo2.Molmo2(config, remat="none")
    logits = np.asarray(jax.jit(model.apply)({"params": params}, batch))
    last = np.array([[len(one.tokens) - 1] for one, _ in questions], np.int32)
    asked = decode.Questions(last, np.full_like(last, NEW), last)
    ours = decode.generate(model, params, batch, asked, eos=-1, num_new=NEW)
    for row, (case, answer) in enumerate(zip(questions, np.asarray(ours.tokens)[:, 0])):
        length = len(case[0].tokens)
        question = slice(int(np.flatnonzero(case[0].image >= 0)[-1]) + 1, length)
        np.testing.assert_allclose(logits[row, question], parity.their_logits(theirs, [case])[0][question],
                                   rtol=0, atol=LOGITS_TOLERANCE)
        given = parity.torch_inputs([case])
        del given["position_ids"]
        generated = theirs.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert generated[0, length:].tolist() == answer.tolist()
