"""Decoding on a mesh: the same answers as on one device, and no weight is gathered."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import types
from molmo2_jax.cost import hlo
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.model import molmo2
from tests import test_decode

LOGPROB_TOLERANCE = 1e-4  # sums of 6 log-probabilities, size 12; measured 2e-5
NEW, QUESTIONS, ROWS = 6, 2, 8
CONFIG = dataclasses.replace(
    test_decode.QWEN, text=dataclasses.replace(test_decode.QWEN.text, num_layers=2))


@functools.cache
def prompts():
    """Returns a batch of eight trees of two questions, and what is asked of it."""
    trees = [test_decode.prompt_tree(CONFIG, seed, 1 + seed % 3, (3, 4 + seed)) for seed in range(ROWS)]
    batch = rows_lib.stack([test_decode.row(CONFIG, tree) for tree in trees])
    return batch, test_decode.questions(trees, QUESTIONS, NEW)


@functools.cache
def alone(weights=None):
    """Returns the answers on one device."""
    batch, wanted = prompts()
    params = decode.ready(test_decode.params_of(CONFIG), "float32", False, weights=weights)
    return jax.device_get(decode.generate(molmo2.Molmo2(CONFIG), params, batch, wanted,
                                          eos=test_decode.NO_EOS, num_new=NEW))


def on_mesh(unroll, weights=None, **sizes):
    """Returns the answers on a mesh of the first devices."""
    mesh, model = sharding.mesh_of_first(sharding.MeshConfig(**{"fsdp": 1} | sizes)), molmo2.Molmo2(CONFIG)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state_lib.abstract_params(model, mesh))
    params = decode.ready(test_decode.params_of(CONFIG), "float32", unroll, layout, weights)
    batch, wanted = prompts()
    batch = jax.tree.map(sharding.distribute, batch, sharding.of_batch(mesh, batch))
    with jax.set_mesh(mesh):
        found = decode.generate(model, params, batch, wanted, eos=test_decode.NO_EOS, num_new=NEW)
    # So that every process can read them:
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(found))
    return jax.device_get(found)


# 2 key heads do not divide over 4 devices, 8 rows of 2 to 4 crops do over all.
@pytest.mark.parametrize("sizes, unroll", [
    ({"tensor": 2}, False), ({"data": 2, "tensor": 2}, True), ({"fsdp": 2, "tensor": 2, "context": 2}, True),
    ({"data": 2}, False), ({"fsdp": 2}, False), ({"context": 2}, False), ({"tensor": 4}, False),
    ({"data": 4}, True), ({"fsdp": 4}, True), ({"context": 4}, True), ({"fsdp": 2, "context": 2}, False),
    ({"data": 8}, True), ({"fsdp": 8}, True), ({"tensor": 8}, True), ({"context": 8}, True),
    ({"data": 2, "fsdp": 2, "tensor": 2}, False)])
@pytest.mark.slow(12)
def test_greedy_answers_on_a_mesh_are_those_on_one_device(sizes, unroll):
    found = on_mesh(unroll, **sizes)
    np.testing.assert_array_equal(found.tokens, alone().tokens)
    np.testing.assert_allclose(found.logprob, alone().logprob, rtol=0, atol=LOGPROB_TOLERANCE)
    assert len(np.unique(alone().tokens)) > NEW


# Inputs of some kernels are sharded, and outputs of others: parts of a channel are on several devices.
@pytest.mark.parametrize("sizes", [
    {"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}, {"context": 2, "tensor": 2},
    {"fsdp": 8}])
@pytest.mark.slow(12)
def test_answers_of_8_bits_on_a_mesh_are_those_on_one_device(sizes):
    found = on_mesh(False, "int8", **sizes)
    np.testing.assert_array_equal(found.tokens, alone("int8").tokens)
    np.testing.assert_allclose(found.logprob, alone("int8").logprob, rtol=0, atol=LOGPROB_TOLERANCE)
    assert (alone("int8").logprob != alone().logprob).any()


@pytest.fixture
def compiled_here():
    """A list that gets an entry for each program that this thread compiles or reads from the cache."""
    here, found = threading.get_ident(), []

    def heard(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == here:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield found
    jax.monitoring.unregister_event_duration_listener(heard)


@pytest.mark.slow(8)
def test_a_stream_on_a_mesh_compiles_nothing_after_its_first_chunk(compiled_here):
    mesh, model = sharding.mesh_of_first(sharding.MeshConfig(fsdp=1, tensor=2)), molmo2.Molmo2(CONFIG)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state_lib.abstract_params(model, mesh))
    params = decode.ready(test_decode.params_of(CONFIG), "float32", False, layout)
    batch, wanted = prompts()
    batch = jax.tree.map(sharding.distribute, batch, sharding.of_batch(mesh, batch))
    for program in (decode.begin, decode.advance):
        program.clear_cache()   # other tests compile the same programs
    with jax.set_mesh(mesh):
        sizes, found = [], []
        for answers in decode.stream(model, params, batch, wanted, eos=test_decode.NO_EOS, num_new=NEW,
                                     every=2):
            sizes.append(len(compiled_here))
            found.append(answers)
    np.testing.assert_array_equal(found[-1].tokens, alone().tokens)
    assert len(sizes) == 4 and 0 < sizes[0] < sizes[1] and sizes[1:] == sizes[1:2] * 3


def lowered(mesh, weights=None, prompt_tokens=2048):
    """Returns (lowered decode.advance, abstract parameters, abstract state): widths of the 8B, two layers."""
    config = config_lib.molmo2_8b()
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, num_layers=2),
        vision=dataclasses.replace(config.vision, num_layers=1),
        connector=dataclasses.replace(config.connector, taps=(0,)))
    model = molmo2.Molmo2(config, dtype="bfloat16", remat="none")
    shape = types.RowShape(T=prompt_tokens, M=0, R=0, W=9)
    rows = ROWS
    with jax.set_mesh(mesh):
        params = decode.abstract_stored(state_lib.abstract_params(model, mesh), "bfloat16", weights)
        specs = types.batch_shapes(rows, shape, config.vision.patch_shape)
        batch = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), specs,
                             sharding.of_batch(mesh, specs))
        asked = decode.Questions(*(jax.ShapeDtypeStruct((rows, 1), jnp.int32),) * 3)
        state = jax.eval_shape(functools.partial(
            decode.begin, model, num_new=32, sampling=decode.GREEDY, cache_dtype=None), params, batch, asked,
            0, 0, None)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
                             decode.layout(state, mesh))
        return decode.advance.lower(model, params, state, 32, 0, None, sampling=decode.GREEDY), params, state


@pytest.mark.parametrize("sizes, weights", [
    ({"tensor": 8}, None), ({"fsdp": 2, "tensor": 4}, None), ({"fsdp": 2, "tensor": 2, "data": 2}, None),
    ({"fsdp": 2, "context": 2, "tensor": 2}, None), ({"fsdp": 2, "tensor": 4}, "int8"),
    ({"fsdp": 2, "context": 2, "tensor": 2}, "int8")])
@pytest.mark.slow(6)
def test_decoding_gathers_no_weight(sizes, weights):
    """The smallest kernel of the decoder's layers has 2**22 values; activations of a step are far smaller."""
    mesh = sharding.mesh_of_first(sharding.MeshConfig(**{"fsdp": 1} | sizes))
    program, params, state = lowered(mesh, weights)
    moved = hlo.find_collectives(program.compile().as_text(), mesh.size)
    largest = max(np.prod(shape) for one in moved for shape in one.shapes)
    assert moved and largest <= ROWS * params["base_embedding"].shape[0]  # logits of all rows
    assert largest < 2**22 / 2
