"""Matrices in 8 bits: error, axes of the factors, products, gradients, shardings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax.hf import weights
from molmo2_jax.model import layers
from molmo2_jax.model import molmo2
from molmo2_jax.model import quantized
from tests import test_decode
from tests import tiny

TOLERANCE = 2e-6  # float32, products of size 1: factors are multiplied after the sum instead of before


@pytest.mark.parametrize("shape, axes", [((6, 5), (0,)), ((3, 6, 2, 5), (1,)), ((3, 2, 5, 6), (1, 2))])
def test_every_element_is_within_half_a_step_of_its_channel(shape, axes):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = quantized.quantize(matrix, axes)
    assert found.values.dtype == jnp.int8 and found.scale.dtype == jnp.float32 and found.shape == shape
    assert found.scale.shape == tuple(np.delete(shape, axes))
    np.testing.assert_array_equal(np.abs(found.values).max(axes), quantized.LARGEST)
    step = np.expand_dims(found.scale, axes)
    assert (np.abs(quantized.dequantize(found, axes) - matrix) <= 0.501 * step).all()


def test_a_channel_of_zeros_stays_zero_and_nan_is_not_hidden():
    matrix = np.ones((4, 3), np.float32)
    matrix[:, 0], matrix[1, 1] = 0, np.nan
    found = quantized.quantize(matrix, (0,))
    np.testing.assert_array_equal(found.values[:, 0], 0)
    np.testing.assert_array_equal(np.isnan(found.scale), [False, True, False])


@pytest.mark.parametrize("name", ["molmo2_8b", "nano"])
def test_factors_belong_to_the_outputs_of_every_kernel(name):
    """Torch's matrices are [outputs, inputs]."""
    config = getattr(config_lib, name)()
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    seen = 0
    for entry in weights.entries(config, "legacy"):
        for path in entry.paths:
            if not path.endswith(("kernel", "head")):
                continue
            whole = shapes[path]
            one = whole if entry.layer is None else whole[1:]
            axes = quantized.summed_axes(path)
            assert math.prod(whole[axis] for axis in axes) == weights.torch_shape(one, entry.layout)[1], path
            seen += decode.is_in_8_bits(path)
    assert seen == 7 * config.text.num_layers + (not config.text.tied_head)


@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("path, shape, axes", [
    ("q/kernel", (6, 2, 5), ("embed", "heads", "head_dim")),
    ("o/kernel", (2, 5, 6), ("heads", "head_dim", "embed"))])
def test_a_layer_computes_with_8_bits_what_it_does_with_their_matrix(path, shape, axes, is_in_place):
    rng = np.random.default_rng(0)
    summed = quantized.summed_axes(path)
    layer = layers.Linear(shape, axes, len(summed), is_in_place=is_in_place)
    x = rng.normal(size=(2, 3, *shape[:len(summed)])).astype(np.float32)
    kernel = quantized.quantize(rng.normal(size=shape).astype(np.float32) / 3, summed)
    run = lambda kernel, x: layer.apply({"params": {"kernel": kernel}}, x)
    wanted = functools.partial(run, quantized.dequantize(kernel, summed))
    np.testing.assert_allclose(run(kernel, x), wanted(x), rtol=0, atol=TOLERANCE)
    gradients = [jax.grad(lambda x, run=run: jnp.square(run(x)).sum())(x)
                 for run in (functools.partial(run, kernel), wanted)]
    np.testing.assert_allclose(*gradients, rtol=0, atol=20 * TOLERANCE)
    with pytest.raises(errors.ScopeParamShapeError):
        run(quantized.Int8(kernel.values[:1], kernel.scale), x)


@pytest.mark.slow(6)
def test_the_whole_model_answers_with_8_bits_as_with_their_matrices():
    def rounded(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = quantized.summed_axes(path)
        if not decode.is_in_8_bits(path):
            return leaf
        return quantized.dequantize(quantized.quantize(leaf, axes), axes)

    params = test_decode.params_of(test_decode.QWEN)
    tree = test_decode.prompt_tree(test_decode.QWEN, 0, 2, (3, 5))
    answers = [decode.generate(
        molmo2.Molmo2(test_decode.QWEN), decode.ready(given, "float32", False, weights=how),
        test_decode.row(test_decode.QWEN, tree), test_decode.questions([tree], 2, 6),
        eos=test_decode.NO_EOS, num_new=6) for given, how in (
            (params, "int8"), (jax.tree_util.tree_map_with_path(rounded, params), None))]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
    np.testing.assert_allclose(answers[0].logprob, answers[1].logprob, rtol=0,
                               atol=test_decode.LOGPROB_TOLERANCE)


def test_factors_are_sharded_as_the_outputs_of_their_matrix():
    mesh = sharding.mesh_of_first(sharding.MeshConfig(fsdp=2, tensor=4))
    params = state.abstract_params(molmo2.Molmo2(tiny.MODEL), mesh)
    found = decode.abstract_stored(params, "bfloat16", "int8")
    attention = found["text"]["layers"]["attn"]
    assert attention["q"]["kernel"].values.dtype == jnp.int8
    for name in ("q", "o"):
        spec = [*params["text"]["layers"]["attn"][name]["kernel"].sharding.spec, None, None, None, None][:4]
        kept = spec[:1] + (spec[2:] if name == "q" else spec[3:])
        assert [*attention[name]["kernel"].scale.sharding.spec] == kept
    assert found["base_embedding"].dtype == jnp.bfloat16 and found["new_embedding"].dtype == jnp.bfloat16
    assert found["vision"]["layers"]["q"]["kernel"].dtype == jnp.bfloat16
    whole = decode.stored_bytes(params, "bfloat16")
    in_8_bits = [leaf for leaf in jax.tree.leaves(found) if leaf.dtype == jnp.int8]
    factors = [leaf for leaf in jax.tree.leaves(found, is_leaf=quantized.is_int8) if quantized.is_int8(leaf)]
    saved = sum(leaf.size for leaf in in_8_bits) - 4 * sum(leaf.scale.size for leaf in factors)
    assert decode.stored_bytes(params, "bfloat16", "int8") == whole - saved < whole
