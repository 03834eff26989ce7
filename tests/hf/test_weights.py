"""The rule table: each name once, both directions, and the order of the reference."""

import collections

import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.hf import weights
from tests import packs

PRESETS = ("molmo2_4b", "molmo2_8b", "molmo2_o_7b", "nano")


@pytest.mark.parametrize("spelling", ["legacy", "native"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_and_every_parameter_is_named_once(preset, spelling):
    config = getattr(config_lib, preset)()
    table = list(weights.entries(config, spelling))
    tensors = collections.Counter(name for entry in table for name in entry.tensors)
    assert set(tensors.values()) == {1}
    parts = collections.Counter((path, entry.layer) for entry in table for path in entry.paths)
    shared = {("base_embedding", None): 2} if config.text.tied_head else {}
    assert {part: n for part, n in parts.items() if n > 1} == shared
    shapes = weights.abstract_params(config)
    wanted = {(path, layer) for path, leaf in shapes.items()
              for layer in (range(leaf.shape[0]) if "/layers/" in path else (None,))}
    assert set(parts) == wanted


def test_released_names_and_shapes_are_those_of_the_hub():
    config = config_lib.molmo2_4b()
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    found = {}
    for entry in weights.entries(config, "legacy"):
        parts = [weights.torch_shape(shapes[p][entry.layer is not None:], entry.layout) for p in entry.paths]
        if len(entry.tensors) == 1:
            parts = [(sum(part[0] for part in parts), *parts[0][1:])]
        found |= dict(zip(entry.tensors, parts))
    block, vit = "model.transformer.blocks.35", "model.vision_backbone.image_vit"
    wanted = {
        "model.transformer.wte.embedding": (151936, 2560), "model.transformer.wte.new_embedding": (128, 2560),
        f"{block}.attn_norm.weight": (2560,), f"{block}.self_attn.att_proj.weight": (6144, 2560),
        f"{block}.self_attn.q_norm.weight": (128,), f"{block}.self_attn.attn_out.weight": (2560, 4096),
        f"{block}.mlp.ff_proj.weight": (19456, 2560), f"{block}.mlp.ff_out.weight": (2560, 9728),
        "model.transformer.ln_f.weight": (2560,), "lm_head.weight": (151936, 2560),
        f"{vit}.patch_embedding.weight": (1152, 588), f"{vit}.positional_embedding": (729, 1152),
        f"{vit}.transformer.resblocks.24.feed_forward.w1.weight": (4304, 1152),
        f"{vit}.transformer.resblocks.24.attention.wq.bias": (1152,),
        "model.vision_backbone.image_pooling_2d.wk.weight": (1152, 2304),
        "model.vision_backbone.image_pooling_2d.wo.weight": (1152, 1152),
        "model.vision_backbone.image_projector.w2.weight": (2560, 9728),
        "model.vision_backbone.image_projector.w3.weight": (9728, 1152)}
    assert {name: found[name] for name in wanted} == wanted
    assert not any(name.startswith(f"{vit}.transformer.resblocks.25") for name in found)
    assert len(found) == 2 + 36 * 8 + 2 + 3 + 25 * 16 + 8 + 3


@pytest.mark.parametrize(("layout", "shape"), [
    ("linear", (6, 2, 5)), ("linear", (6, 4)), ("merge", (2, 5, 7)), ("vector", (2, 5)), ("table", (9, 4)),
    ("convolution", (2 * 2 * 3, 7))])
def test_layouts_are_inverted_exactly(layout, shape):
    x = np.arange(np.prod(shape)).reshape(shape)
    there = weights.to_torch(x, layout)
    assert there.shape == weights.torch_shape(shape, layout) and there.shape[0] == weights.rows(shape, layout)
    np.testing.assert_array_equal(weights.from_torch(there, shape, layout), x)


def test_a_linear_layer_multiplies_as_torch_does():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 6)), rng.normal(size=(6, 2, 5))
    np.testing.assert_allclose(np.einsum("ti,ihd->thd", x, kernel).reshape(3, 10),
                               x @ weights.to_torch(kernel, "linear").T)
    heads, out = rng.normal(size=(3, 2, 5)), rng.normal(size=(2, 5, 7))
    np.testing.assert_allclose(np.einsum("thd,hdo->to", heads, out),
                               heads.reshape(3, 10) @ weights.to_torch(out, "merge").T)


def test_a_patch_convolution_reads_rows_columns_colours():
    rng = np.random.default_rng(0)
    pixels, kernel = rng.normal(size=(2, 2, 3)), rng.normal(size=(12, 7))
    convolution = weights.to_torch(kernel, "convolution")
    np.testing.assert_allclose(pixels.reshape(-1) @ kernel, np.einsum("rcx,oxrc->o", pixels, convolution))


def test_flatten_undoes_unflatten():
    params = packs.random_params(packs.random_config("qwen3", 0))
    flat = weights.flatten(params)
    assert set(flat) == set(weights.abstract_params(packs.random_config("qwen3", 0)))
    assert weights.flatten(weights.unflatten(flat)).keys() == flat.keys()
