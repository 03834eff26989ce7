"""The trained models in assets/ give equal answers here and in transformers, on unseen clips."""

import pathlib

import jax
import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import sources
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from molmo2_jax import decode
from molmo2_jax import types
from molmo2_jax.hf import checkpoint
from molmo2_jax.inputs import media
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import sequence as sequence_lib
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2

peer = pytest.importorskip("molmo2_jax.hf.peer")

ASSETS = pathlib.Path(__file__).parents[2] / "assets"
WORLDS = {"nano": world_config.quickstart_world(), "nano_full": world_config.full_world()}
CLIPS, NEW = 8, 64
# Of our float32 logits, of size 31, from transformers' in float64; measured 5.8e-5. Its float32 logits are
# further from its float64 ones, 7.4e-5.
LOGITS_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=WORLDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def shipped(name):
    params, config, inputs = checkpoint.import_checkpoint(ASSETS / name)
    return params, config, inputs, tokenizers.Tokenizer.from_file(ASSETS / name, config.text.vocab_size)


@pytest.fixture(scope="module")
def questions(name, shipped, tmp_path_factory):
    """Returns one Sequence per clip: a question about it."""
    _, config, inputs, tokenizer = shipped
    path = world_write.write(tmp_path_factory.mktemp("clips"), WORLDS[name], seed=2**20,
                             num_examples=3 * CLIPS, split="heldout", progress=False)
    asked = []
    for example in [one for one in sources.examples(path.parent) if one.video][:CLIPS]:
        crops, seen = media.see(example, config, inputs, tokenizer)
        branch = formats.to_branches(example, media=seen, rng=np.random.default_rng(0),
                                     asking=formats.PLAIN)[0]
        branch = type(branch)(turns=branch.turns[:1])
        asked.append(sequence_lib.build(crops, [branch], tokenizer))
    assert len(asked) == CLIPS
    return asked


@pytest.mark.slow(9)
def test_logits_and_64_greedy_tokens_on_8_clips_are_those_of_transformers(name, shipped, questions):
    params, config, _, _ = shipped
    theirs = peer.load(ASSETS / name)
    sizes = [(len(one.tokens), len(one.patches), *one.pooled.shape) for one in questions]
    shape = types.RowShape(*map(max, *sizes))
    batch = rows_lib.stack([rows_lib.join([one], shape) for one in questions])
    model = molmo2.Molmo2(config, remat="none")
    logits = np.asarray(jax.jit(model.apply)({"params": params}, batch))
    last = np.array([[len(one.tokens) - 1] for one in questions], np.int32)
    asked = decode.Questions(last, np.full_like(last, NEW), last)
    ours = decode.generate(model, params, batch, asked, eos=-1, num_new=NEW)
    for one, answer in zip(questions, np.asarray(ours.tokens)[:, 0]):
        assert peer.answers(theirs, one, config, NEW) == answer.tolist()
    theirs.double()
    for row, one in enumerate(questions):
        np.testing.assert_allclose(logits[row, :len(one.tokens)], peer.logits(theirs, [one], config)[0],
                                   rtol=0, atol=LOGITS_TOLERANCE)


def test_the_shipped_models_are_small():
    sizes = [path.stat().st_size for name in WORLDS for path in (ASSETS / name).iterdir()]
    assert sum(sizes) <= 8e6
