"""config.json: presets survive the round trip, and errors name each field that does not fit."""

import copy
import dataclasses

import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.hf import config as hf_config
from tests import packs

PRESETS = ("molmo2_4b", "molmo2_8b", "molmo2_o_7b", "nano")


def without_init(config):
    """Resets what config.json does not hold: initialisation, and whether the head is tied."""
    default = config_lib.molmo2_8b()
    same = {"init_std": default.text.init_std, "embedding_init_std": default.text.embedding_init_std}
    return dataclasses.replace(
        config, freeze_patch_row=False, text=dataclasses.replace(config.text, tied_head=False, **same),
        connector=dataclasses.replace(config.connector, init_std=default.connector.init_std),
        vision=dataclasses.replace(config.vision, **{
            field.name: getattr(default.vision, field.name) for field in dataclasses.fields(default.vision)
            if field.name.endswith("init_std")}))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_read_back(preset):
    config = getattr(config_lib, preset)()
    assert hf_config.read(hf_config.write(config)) == without_init(config)


@pytest.mark.parametrize("style", packs.STYLES)
@pytest.mark.parametrize("seed", range(5))
def test_random_sizes_are_read_back(style, seed):
    config = packs.random_config(style, seed)
    assert hf_config.read(hf_config.write(config)) == without_init(config)


def test_the_4b_is_written_like_the_released_one():
    values = hf_config.write(config_lib.molmo2_4b(), "bfloat16")
    assert values["image_patch_id"] == 151938 and values["frame_end_token_id"] == 151944
    assert values["use_frame_special_tokens"] is True and values["tie_word_embeddings"] is False
    assert values["vit_config"]["num_hidden_layers"] == 27
    assert values["adapter_config"]["vit_layers"] == [-3, -9]
    text = values["text_config"]
    assert (text["hidden_size"], text["head_dim"], text["rope_theta"]) == (2560, 128, 5e6)
    assert text["rope_scaling"] is None and text["rope_scaling_layers"] is None
    assert "auto_map" not in values and values["dtype"] == "bfloat16"


def test_yarn_applies_to_the_listed_layers_and_without_a_list_to_all():
    values = hf_config.write(config_lib.molmo2_o_7b())
    assert values["text_config"]["rope_scaling_layers"] == [3, 7, 11, 15, 19, 23, 27, 31]
    values["text_config"]["rope_scaling_layers"] = [0, 5]
    assert hf_config.read(values).text.yarn.layers == (0, 5)
    values["text_config"]["rope_scaling_layers"] = None
    assert hf_config.read(values).text.yarn.layers == tuple(range(32))


def test_the_attention_factor_of_yarn_follows_from_its_factor():
    values = hf_config.write(config_lib.molmo2_o_7b())
    del values["text_config"]["rope_scaling"]["attention_factor"]
    assert hf_config.read(values).text.yarn.attention_factor == pytest.approx(1.2079441541679836, abs=1e-15)


@pytest.mark.parametrize(("section", "field", "value", "message"), [
    (None, "surprise", 1, "unknown in the top level: surprise"),
    ("text_config", "sliding_window", 4096, "unknown in text_config: sliding_window"),
    ("text_config", "partial_rotary_factor", 0.5, "text_config.partial_rotary_factor must be 1.0, got 0.5"),
    ("text_config", "rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, "must be 1.0, got"),
    ("text_config", "final_logit_softcapping", 30.0, "unknown in text_config: final_logit_softcapping"),
    ("text_config", "model_type", "llama", "text_config.model_type must be one of .'molmo2_text',., got 'l"),
    ("vit_config", "model_type", "clip", "vit_config.model_type must be one of .'molmo2', 'molmo2_vision'"),
    (None, "quantization_config", {"bits": 4}, "quantization_config must be absent"),
    ("text_config", "qkv_bias", True, "text_config.qkv_bias must be False, got True"),
    ("text_config", "hidden_act", "gelu", "text_config.hidden_act must be 'silu', got 'gelu'"),
    ("text_config", "hidden_size", None, "text_config.hidden_size must be given as int, got None"),
    ("text_config", "hidden_size", "big", "text_config.hidden_size must be of type int, got 'big'"),
    ("text_config", "rms_norm_eps", 1e-5, "text_config.layer_norm_eps and rms_norm_eps must agree"),
    ("text_config", "qk_norm_type", "l2", "qk_norm must be 'qwen3' or 'olmo'"),
    ("text_config", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "must be 'default' or 'yarn'"),
    ("vit_config", "image_num_pos", 730, "vit_config.image_num_pos must be 729, got 730"),
    ("vit_config", "hidden_act", "gelu", "vit_config.hidden_act must be 'gelu_pytorch_tanh'"),
    ("adapter_config", "vit_layers", [-30], "adapter_config.vit_layers must name some of the 27 ViT layers"),
    ("adapter_config", "text_hidden_size", 4, "adapter_config.text_hidden_size must be 4096, got 4"),
    ("adapter_config", "pooling_attention_mask", False, "pooling_attention_mask must be True, got False"),
    (None, "image_patch_id", 7, "image_patch_id must be 151938, got 7"),
    (None, "text_config", [], r"text_config must be an object, got \[\]"),
    (None, "model_type", "molmo", "model_type must be 'molmo2' or 'molmo_point', got 'molmo'")])
def test_a_field_that_is_unknown_or_contradicts_is_named(section, field, value, message):
    values = hf_config.write(config_lib.molmo2_8b())
    (values if section is None else values[section])[field] = value
    with pytest.raises(ValueError, match=message):
        hf_config.read(values)


def test_one_error_lists_all_problems():
    values = copy.deepcopy(hf_config.write(config_lib.nano()))
    values["surprise"], values["image_col_id"] = 1, 2
    values["text_config"]["use_qk_norm"] = False
    with pytest.raises(ValueError, match="use_qk_norm.*image_col_id.*surprise"):
        hf_config.read(values, "x/config.json")


def test_a_model_that_the_format_cannot_represent_is_refused():
    nano = config_lib.nano()
    with pytest.raises(ValueError, match="visual_attention must be 'image_tokens' to be exported.*'causal'"):
        hf_config.write(dataclasses.replace(nano, visual_attention="causal"))
    with pytest.raises(ValueError, match="visual_merge must be 'add' to be exported.*'replace'"):
        hf_config.write(dataclasses.replace(nano, visual_merge="replace"))
    with pytest.raises(ValueError, match="must equal the ViT's width to be exported; got 32 and 64"):
        hf_config.write(dataclasses.replace(nano, connector=dataclasses.replace(nano.connector, num_heads=2)))
