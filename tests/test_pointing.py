"""A model that points by choosing visual tokens: from annotations to a trained run and its answers."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from data_pipelines import pipeline
from data_pipelines import sources
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from molmo2_jax import config as config_lib
from molmo2_jax import generate
from molmo2_jax import loss
from molmo2_jax import optim
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import train
from molmo2_jax import types
from molmo2_jax.inputs import grounded
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2
from molmo2_jax.monitor import metrics
from tests import tiny
from tests.data_pipelines import test_pipeline
from tests.model import test_pointer

POINTER = config_lib.PointerConfig(width=16)
MODEL = dataclasses.replace(test_pipeline.MODEL, pointer=POINTER)
INPUTS = test_pipeline.INPUTS
TOWER = optim.Tower(lr=1e-2, warmup=1)
OPTIM = optim.OptimConfig(vit=TOWER, connector=TOWER, llm=TOWER, pointer=TOWER, frozen=())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Returns (a data folder, its tokenizer)."""
    drawn = dataclasses.replace(world_config.quickstart_world(), frame_side=(32, 48))
    folder = tmp_path_factory.mktemp("pointing")
    folder = world_write.write(folder, drawn, 0, 12, "train", progress=False).parent
    return folder, tokenizers.train_small((folder / "annotations.jsonl").read_text().splitlines(), 400)


def batches_of(world, model=MODEL, **fields):
    folder, tokenizer = world
    data = pipeline.DataConfig(**{"train": (str(folder),), "seed": 5, "row_tokens": 512, "row_crops": 12,
                                  "row_visual_tokens": 144, "batch_rows": 2, "num_workers": 0, "prefetch": 0,
                                  "packer": packers.OldestFirst(buffer=4)} | fields)
    return pipeline.make_iterator(data, model, INPUTS, tokenizer)


def test_training_reads_points_as_choices(world):
    iterator = batches_of(world)
    batch = next(iterator)
    iterator.close()
    ids = {name: MODEL.special_id(name) for name in grounded.TOKENS}
    is_token = batch.tokens == ids["<|token_index|>"]
    assert is_token.sum() > 5 and (batch.choice[is_token] >= 0).all()
    assert ((batch.choice != -1) == np.isin(batch.tokens, list(ids.values()))).all()
    chosen = is_token & (batch.choice < types.NO_MORE)
    rows, places = np.nonzero(chosen)
    slots = types.inner(batch.choice[rows, places + 1])
    assert (batch.tokens[rows, places + 1] == ids["<|vit_index|>"]).all()
    patches = batch.pooled[rows, batch.choice[rows, places], slots]
    assert (patches >= 0).all()   # of the example's own crops, wherever it lies in the row
    text = batches_of(world, grammar="text")
    assert (next(text).choice == -1).all()
    text.close()


def test_a_grammar_of_tokens_needs_a_pointer(world):
    with pytest.raises(ValueError, match="'tokens' needs a model with config.PointerConfig; got 'tokens'"):
        batches_of(world, dataclasses.replace(MODEL, pointer=None), grammar="tokens")


def test_no_array_of_a_step_has_the_visual_tokens_along_one_side_and_the_tokens_along_another():
    shape = types.RowShape(T=16_384, M=16, R=16_384, W=9)
    config = dataclasses.replace(tiny.MODEL, pointer=POINTER)
    settings = train.TrainConfig(steps=1, dtype="float32", remat="full", residual_dropout=0.0)
    step = functools.partial(train.gradients, molmo2.Molmo2(config), settings)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                         types.batch_shapes(1, shape, config.vision.patch_shape, True))
    params = test_pointer.params_of(config)
    with jax.set_mesh(tiny.mesh()):
        state = state_lib.TrainState(np.int32(0), params, (), jax.random.key(0))
        program = jax.jit(step).lower(state, batch).as_text()
    shapes = {tuple(map(int, found.split("x")[:-1])) for found in re.findall(r"tensor<((?:\d+x)+)", program)}
    longest = {tuple(sorted((1, *shape))[-2:]) for shape in shapes}
    assert (128, shape.R + 1) in longest   # scores of a chunk of points
    assert not [pair for pair in longest if pair[0] >= shape.T // 3]   # a row has up to T / 3 points


@pytest.mark.slow(60)
def test_a_run_learns_resumes_and_answers_with_points(world, tmp_path):
    config = train.TrainConfig(steps=24, dtype="float32", remat="none", residual_dropout=0.0, log_every=1,
                               save_every=12)
    fit = functools.partial(train.fit, model_config=MODEL, optimiser=OPTIM, mesh=tiny.mesh(), quiet=True)
    iterator = batches_of(world)
    result = fit(config=config, batches=iterator, workdir=str(tmp_path / "whole"))
    iterator.close()
    def lines_of(name):
        return [{name: value for name, value in line.items() if not metrics.is_timed(name)}
                for line in metrics.read(tmp_path / name / "metrics.jsonl")]

    whole = lines_of("whole")
    for kind in ("patch", "subpatch", "location"):
        first, last = (np.mean([line[f"{kind}_loss"] for line in part]) for part in (whole[:4], whole[-4:]))
        assert last < first, kind
    assert whole[-1]["grad_norm_pointer"] > 0 and 0 <= whole[-1]["patch_accuracy"] <= 1
    for steps in (12, 24):
        iterator = batches_of(world)
        fit(config=dataclasses.replace(config, steps=steps), batches=iterator, workdir=str(tmp_path / "two"))
        iterator.close()
    assert [line["step"] for line in lines_of("two")] == list(range(1, 25))
    assert lines_of("two")[0] == whole[0]   # later rates depend on the number of steps

    folder, tokenizer = world
    answerer = generate.Answerer(result.state.params, MODEL, INPUTS, tokenizer, max_new_tokens=40)
    example = next(one for one in sources.examples(folder) if one.video is not None)
    questions = ["Point to the red circle.", "Point to the blue square."]
    answers = answerer.answer(example, questions)
    pieces = ["", ""]
    for piece in answerer.stream(example, questions, every=3):
        pieces[piece.question] += piece.text
    assert pieces == [one.text for one in answers]
    for one in answers:
        assert len(one.points) == one.text.count("<|vit_loc:") - one.text.endswith("|>")
        again = answerer.answer(example, [generate.Question(turns=(questions[0], one.text, questions[1]))])
        assert again[0].text   # an answer with choices may stand in a conversation


@pytest.mark.slow(60)
def test_micro_batches_and_meshes_give_the_gradients_of_one_device():
    config = dataclasses.replace(tiny.MODEL, pointer=POINTER)
    model, rng = molmo2.Molmo2(config), np.random.default_rng(1)
    rows = [[test_pointer.pointing(rng, config, kind) for kind in ("video", "images")] for _ in range(4)]
    shape = types.RowShape(T=160, M=16, R=48, W=9)
    batch = rows_lib.stack([rows_lib.join(one, shape, config.vision.patch_shape, has_choices=True)
                            for one in rows])
    params = test_pointer.params_of(config)
    found = {}
    for accumulate, sizes in ((1, (1, 1, 1, 1)), (2, (2, 1, 1, 1)), (1, (1, 2, 2, 2))):
        settings = train.TrainConfig(steps=1, dtype="float32", loss_chunk=16, residual_dropout=0.0,
                                     accumulate=accumulate)
        compute = train.gradients if accumulate == 1 else train.accumulated_gradients
        mesh = tiny.mesh(*sizes)
        with jax.set_mesh(mesh):
            state = state_lib.TrainState(np.int32(0), params, (), jax.random.key(0))
            placed = jax.device_put(batch, sharding.of_batch(mesh, batch))
            found[sizes] = jax.device_get(jax.jit(functools.partial(compute, model, settings))(state, placed))
    measured, gradients = found.pop((1, 1, 1, 1))
    assert {"patch_loss", "subpatch_loss", "location_loss", "patch_accuracy"} <= set(measured)
    numbers = loss.total_of(batch, config).choices
    assert float(numbers[0]) > 20
    flat = traverse_util.flatten_dict(gradients)
    for other_measured, other in found.values():
        for name in measured:
            # Where two scores are nearly equal, rounding decides which is the highest: one choice may differ.
            atol = 1.01 / numbers.min() if name.endswith("_accuracy") else 0
            np.testing.assert_allclose(
                other_measured[name], measured[name], rtol=1e-5, atol=atol, err_msg=name)
        for path, one in flat.items():
            # A bias of keys has no gradient but rounding, which is that of its kernel.
            is_of_keys = path[-2:] in (("k", "bias"), ("sub_k", "bias"))
            like = flat[(*path[:-1], "kernel")] if is_of_keys else one
            np.testing.assert_allclose(traverse_util.flatten_dict(other)[path], one, rtol=1e-7,
                                       atol=1e-5 * max(abs(like).max(), 1e-4), err_msg=str(path))
