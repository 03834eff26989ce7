"""A decoder or a ViT from which training starts: equal activations, and other models are refused."""

import dataclasses
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest
import safetensors.numpy

from molmo2_jax import config as config_lib
from molmo2_jax.hf import shards
from molmo2_jax.hf import towers
from molmo2_jax.hf import weights
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.model import molmo2
from tests import packs

TOWER_TOLERANCE = 2e-5  # float32; measured 4e-6 on values of size 5


def text_logits(config, flat, tokens):
    """Returns the logits of the decoder alone, other towers at zero."""
    shapes = weights.abstract_params(config)
    params = weights.unflatten({path: flat.get(path, np.zeros(leaf.shape, np.float32))
                                for path, leaf in shapes.items()})
    one = packs.sequence(np.random.default_rng(0), config, None, (len(tokens) - 1,))
    batch = packs.row([dataclasses.replace(one, tokens=tokens)], config, len(tokens), 0, 0)
    return np.asarray(jax.jit(molmo2.Molmo2(config, attention="dense").apply)({"params": params}, batch))[0]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied", "olmo3"])
def test_a_language_model_becomes_the_decoder(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = packs.random_config("olmo" if kind == "olmo3" else kind, 0)
    config = dataclasses.replace(base, text=dataclasses.replace(base.text, yarn=None))
    t = config.text
    sizes = dict(vocab_size=t.vocab_size, hidden_size=t.width, num_hidden_layers=t.num_layers,
                 num_attention_heads=t.num_heads, num_key_value_heads=t.num_kv_heads, head_dim=t.head_dim,
                 intermediate_size=t.mlp_width, rms_norm_eps=1e-6, tie_word_embeddings=t.tied_head,
                 rope_parameters={"rope_type": "default", "rope_theta": t.rope_theta}, pad_token_id=None,
                 bos_token_id=None, eos_token_id=None, initializer_range=0.2)
    if kind == "olmo3":
        heads = dict(num_heads=4, num_kv_heads=2, head_dim=t.width // 4)  # its head width follows
        config = dataclasses.replace(config, text=dataclasses.replace(t, **heads))
        del sizes["head_dim"]
        sizes |= dict(num_attention_heads=4, num_key_value_heads=2,
                      layer_types=["full_attention"] * t.num_layers,
                      rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"),
                                                    sizes["rope_parameters"]))
        model = transformers.Olmo3ForCausalLM(transformers.Olmo3Config(**sizes))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value += 0.3 * torch.randn_like(value)
    model.eval().save_pretrained(tmp_path)
    flat = towers.import_tower(tmp_path, "olmo3" if kind == "olmo3" else "qwen3", config)
    assert {path.split("/")[0] for path in flat} == {"base_embedding", "text"} | (
        set() if t.tied_head else {"head"})
    tokens = np.random.default_rng(0).integers(0, t.vocab_size, 20).astype(np.int32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    assert wanted.std() > 0.1
    np.testing.assert_allclose(text_logits(config, flat, tokens), wanted, atol=TOWER_TOLERANCE, rtol=0)


def test_a_siglip2_checkpoint_becomes_the_vit(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    nano = config_lib.nano()
    v = nano.vision
    model = transformers.SiglipModel(transformers.SiglipConfig(
        text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=32, max_position_embeddings=8, projection_size=v.width),
        vision_config=dict(hidden_size=v.width, intermediate_size=v.mlp_width, image_size=v.image_size,
                           num_hidden_layers=v.num_layers + 2, num_attention_heads=v.num_heads,
                           patch_size=v.patch_size, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    )).eval()
    model.save_pretrained(tmp_path)
    flat = towers.import_tower(tmp_path, "siglip2", nano)
    assert all(path.startswith("vision/") for path in flat)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, v.image_size, v.image_size, 3), np.uint8)
    patches = np.stack([crops_lib.patchify(one[None], v.patch_size)[0] for one in pixels])[None]
    module = molmo2.vision.VisionTransformer(v, nano.connector.taps)
    ours = np.asarray(jax.jit(module.apply)({"params": weights.unflatten(flat)["vision"]}, patches))[0]
    normalised = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        hidden = model.vision_model(normalised, output_hidden_states=True).hidden_states
    wanted = np.concatenate([hidden[tap + 1].numpy() for tap in nano.connector.taps], -1)
    np.testing.assert_allclose(ours, wanted, atol=TOWER_TOLERANCE, rtol=0)


def qwen3_folder(folder, config, **fields):
    """Writes a Qwen3 checkpoint that holds the decoder of `config`."""
    t = config.text
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    rng, tensors = np.random.default_rng(0), {}
    for entry in weights.entries(config, "qwen3"):
        parts = [weights.torch_shape(shapes[path][entry.layer is not None:], entry.layout)
                 for path in entry.paths]
        tensors |= {name: rng.standard_normal(shape, np.float32)
                    for name, shape in zip(entry.tensors, parts)}
    safetensors.numpy.save_file(tensors, folder / shards.SINGLE)
    values = {"model_type": "qwen3", "num_attention_heads": t.num_heads, "rope_theta": t.rope_theta,
              "num_key_value_heads": t.num_kv_heads, "rms_norm_eps": 1e-6, "hidden_act": "silu",
              "tie_word_embeddings": t.tied_head} | fields
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_config_tells_which_tower_a_folder_holds(tmp_path):
    for model_type, tower in [("qwen3", "qwen3"), ("olmo3", "olmo3"), ("siglip", "siglip2"),
                              ("siglip_vision_model", "siglip2")]:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert towers.kind(tmp_path) == tower
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="must be one of .*'qwen3'.*has 'llama'"):
        towers.kind(tmp_path)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("rope_theta", 5e6, "rope_theta must be 10000.0, got 5000000.0"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 5e6}, "rope_parameters.rope_theta must be"),
    ("rms_norm_eps", 1e-5, "rms_norm_eps must be 1e-06, got 1e-05"),
    ("num_attention_heads", 77, "num_attention_heads must be"),
    ("use_sliding_window", True, "use_sliding_window must be False, got True"),
    ("hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
    ("rope_scaling", {"rope_type": "linear", "factor": 4.0},
     "rope_scaling.rope_type must be 'default' or 'yarn', got 'linear'"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
     "rope_scaling.rope_type must scale as the model does .none., got {'factor': 4.0"),
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "got 'dynamic'"),
    ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "must be 1.0, got 0.5"),
    ("rope_parameters", {"rope_theta": 1e4, "mrope_section": [1]}, "unknown in rope_parameters: mrope"),
    ("partial_rotary_factor", 0.25, "partial_rotary_factor must be 1.0, got 0.25"),
    ("layer_types", ["sliding_attention"], "layer_types must be "),
    ("head_dim", 77, "head_dim must be 12, got 77"),
    ("attention_bias", True, "attention_bias must be False"),
    ("final_logit_softcapping", 30.0, "unknown in the top level: final_logit_softcapping"),
    ("quantization_config", {"bits": 4}, "unknown in the top level: quantization_config")])
def test_fields_without_effect_on_shapes_are_compared_with_the_config(field, value, message, tmp_path):
    config = packs.random_config("qwen3", 0)
    assert towers.import_tower(qwen3_folder(tmp_path, config), "qwen3", config)
    with pytest.raises(ValueError, match=f"must hold the qwen3 tower of the model: .*{message}"):
        towers.import_tower(qwen3_folder(tmp_path, config, **{field: value}), "qwen3", config)


# Fields of each decoder's config.json besides its sizes.
PUBLISHED = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
              "bos_token_id": 151643, "eos_token_id": 151645, "initializer_range": 0.02,
              "max_position_embeddings": 262144, "max_window_layers": 36, "rope_scaling": None,
              "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
              "use_cache": True, "use_sliding_window": False},
    "olmo3": {"architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
              "eos_token_id": 100257, "initializer_range": 0.02, "max_position_embeddings": 65536,
              "pad_token_id": 100277, "sliding_window": 4096, "tie_word_embeddings": False,
              "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "use_cache": True}}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 1.2079441541679836}


def test_the_published_decoders_are_those_of_the_presets():
    small, large = config_lib.molmo2_4b(), config_lib.molmo2_o_7b()
    assert not towers.differences(PUBLISHED["qwen3"] | {
        "rope_theta": 5000000, "head_dim": 128, "tie_word_embeddings": True}, "qwen3", small)
    implied = {field: value for field, value in YARN.items() if field != "attention_factor"}
    for ropes in ({"rope_theta": 500000, "rope_scaling": YARN},
                  {"rope_theta": 500000, "rope_scaling": implied},
                  {"rope_parameters": {"full_attention": YARN | {"rope_theta": 5e5},
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}}):
        assert not towers.differences(PUBLISHED["olmo3"] | ropes, "olmo3", large)
    other = PUBLISHED["olmo3"] | {"rope_scaling": YARN | {"factor": 4.0}}
    [found] = towers.differences(other, "olmo3", large)
    assert found.startswith("rope_scaling.rope_type must scale as the model does ({'factor': 8.0")


def test_a_qwen3_decoder_may_have_yarn_if_the_model_has_it_in_all_layers():
    scaled = [config_lib.YarnConfig(layers=layers) for layers in (tuple(range(36)), (3, 7))]
    whole, some = (dataclasses.replace(config_lib.molmo2_4b(), text=dataclasses.replace(
        config_lib.molmo2_4b().text, yarn=yarn)) for yarn in scaled)
    values = PUBLISHED["qwen3"] | {"rope_theta": 5e6, "rope_scaling": YARN}
    assert not towers.differences(values, "qwen3", whole)
    assert len(towers.differences(values, "qwen3", some)) == 1


@pytest.mark.parametrize(("fields", "message"), [
    ({"hidden_act": "gelu"}, "vision_config.hidden_act must be 'gelu_pytorch_tanh', got 'gelu'"),
    ({"layer_norm_eps": 1e-5}, "vision_config.layer_norm_eps must be 1e-06"),
    ({"num_channels": 1}, "vision_config.num_channels must be 3"),
    ({"qkv_bias": False, "rope_theta": 1.0}, "unknown in vision_config: qkv_bias, rope_theta")])
def test_a_vit_with_other_fields_is_refused_by_name(fields, message):
    usual = {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "patch_size": 14,
             "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
             "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3}
    wrap = lambda vision: {"model_type": "siglip", "initializer_factor": 1.0, "text_config": {"any": 1},
                           "transformers_version": "4.49.0", "vision_config": vision}
    model = config_lib.molmo2_4b()
    assert not towers.differences(wrap(usual), "siglip2", model)
    assert not towers.differences(usual, "siglip2", model)
    [found] = towers.differences(wrap(usual | fields), "siglip2", model)
    assert found.startswith(message)


def test_a_tower_of_other_sizes_is_refused(tmp_path):
    config = packs.random_config("qwen3", 0)
    other = dataclasses.replace(config, text=dataclasses.replace(
        config.text, num_layers=config.text.num_layers + 1, vocab_size=config.text.vocab_size + 1))
    with pytest.raises(ValueError, match=r"missing model\.layers.*model\.embed_tokens\.weight is"):
        towers.import_tower(qwen3_folder(tmp_path, config), "qwen3", other)


def siglip2_folder(folder, config):
    """Writes a SigLIP2 checkpoint that holds the ViT of `config`."""
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    rng = np.random.default_rng(1)
    tensors = {name: rng.standard_normal(
        weights.torch_shape(shapes[path][entry.layer is not None:], entry.layout), np.float32)
        for entry in weights.entries(config, "siglip2") for path, name in zip(entry.paths, entry.tensors)}
    safetensors.numpy.save_file(tensors, folder / shards.SINGLE)
    values = {"patch_size": config.vision.patch_size, "num_attention_heads": config.vision.num_heads}
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": values}))
    return folder


def test_two_towers_are_assembled_and_the_rest_is_initialised(tmp_path):
    config = packs.random_config("qwen3", 0)
    for name in ("text", "vision"):
        (tmp_path / name).mkdir()
    folders = qwen3_folder(tmp_path / "text", config), siglip2_folder(tmp_path / "vision", config)
    once, again, other = (weights.flatten(towers.assemble(*folders, config, seed)) for seed in (5, 5, 6))
    given = towers.import_tower(folders[0], "qwen3", config) | towers.import_tower(
        folders[1], "siglip2", config)
    drawn = {path for path in once if path.startswith("connector/")} | {"new_embedding"}
    assert set(once) == set(weights.abstract_params(config)) == drawn | set(given) and not drawn & set(given)
    for path, value in once.items():
        np.testing.assert_array_equal(value, again[path])
        if path in given:
            np.testing.assert_array_equal(value, given[path])
        else:
            assert path.endswith("bias") != bool((np.asarray(value) != np.asarray(other[path])).any()), path
    assert np.std(once["new_embedding"]) == pytest.approx(0.02, rel=0.2)
    with pytest.raises(ValueError, match=r"must be 'qwen3' and 'siglip2'; got \('siglip2', 'qwen3'\)"):
        towers.assemble(*reversed(folders), config, seed=5)
