"""Folders of models that point by choosing visual tokens, in MolmoPoint's released layout."""

import collections
import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import config as hf_config
from molmo2_jax.hf import processor
from molmo2_jax.hf import remote_code
from molmo2_jax.hf import shards
from molmo2_jax.hf import source
from molmo2_jax.hf import verify
from molmo2_jax.hf import weights
from molmo2_jax.inputs import tokenizer as tokenizers
from tests import packs
from tests.hf import test_config
from tests.hf import test_verify

INPUTS = config_lib.InputConfig(max_crops=3, max_frames=16, max_images=2)
PRESETS = (config_lib.molmo_point_8b, config_lib.molmo_point_vid_4b)


def small(style="qwen3", has_output=False, **pointer):
    base = packs.random_config(style, 1)
    return dataclasses.replace(
        base, connector=dataclasses.replace(base.connector, has_output=has_output),
        text=dataclasses.replace(base.text, additional_vocab_size=128),
        pointer=config_lib.PointerConfig(**{"width": 12} | pointer))


def export(folder, config, params=None, tokenizer=None, **options):
    params = packs.random_params(config) if params is None else params
    return checkpoint.export_checkpoint(params, config, INPUTS, tokenizer, folder, **options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def table_of(config):
    """Returns {tensor: shape} as the table of a model gives it."""
    shapes = {path: leaf.shape for path, leaf in weights.abstract_params(config).items()}
    found = {}
    for entry in weights.entries(config, "legacy"):
        found |= dict(zip(entry.tensors, source.tensor_shapes(entry, shapes), strict=True))
    return found


def published(D, F, V, layers, q, kv):
    """Returns {tensor: shape} of a released model. q, kv: rows of queries, and of keys."""
    block = lambda n: f"model.transformer.blocks.{n}"
    found = {"model.transformer.wte.embedding": (V, D), "model.transformer.wte.new_embedding": (128, D),
             "model.transformer.ln_f.weight": (D,), "lm_head.output_embeddings": (V, D),
             "lm_head.new_output_embeddings": (128, D)}
    for n in range(layers):
        found |= {f"{block(n)}.{name}.weight": shape for name, shape in {
            "attn_norm": (D,), "ff_norm": (D,), "self_attn.att_proj": (q + 2 * kv, D),
            "self_attn.attn_out": (D, q), "self_attn.q_norm": (128,), "self_attn.k_norm": (128,),
            "mlp.ff_proj": (2 * F, D), "mlp.ff_out": (D, F)}.items()}
    found |= {"model.vit.patch_embedding.weight": (1152, 588), "model.vit.patch_embedding.bias": (1152,),
              "model.vit.positional_embedding": (729, 1152)}
    for n in range(25):
        for name, shape in {"attention_norm": (1152,), "ffn_norm": (1152,),
                            **{f"attention.w{x}": (1152, 1152) for x in "qkvo"},
                            "feed_forward.w1": (4304, 1152), "feed_forward.w2": (1152, 4304)}.items():
            prefix = f"model.vit.transformer.resblocks.{n}.{name}"
            found |= {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}
    linear = {f"connector.image_pooling_2d.w{x}": (1152, 2304) for x in "qkv"} | {
        "build_vit_embedding": (D, 2304), "point_predictor.patch_q": (512, D),
        "point_predictor.patch_k": (512, D), "point_predictor.subpatch_q": (512, D),
        "point_predictor.subpatch_k": (512, 2304), "point_predictor.subpatch_loc_k": (9, D)}
    for name, shape in linear.items():
        found |= {f"model.{name}.weight": shape, f"model.{name}.bias": shape[:1]}
    return found | {
        "model.connector.image_projector.w1.weight": (F, 1152),
        "model.connector.image_projector.w2.weight": (D, F),
        "model.connector.image_projector.w3.weight": (F, 1152),
        "model.point_predictor.x_norm.weight": (D,),
        "model.point_predictor.add_no_point_class_embed.vector": (512,)}


@pytest.mark.parametrize("make, sizes", zip(PRESETS, [
    (4096, 12288, 151936, 36, 4096, 1024), (2560, 9728, 151936, 36, 4096, 1024)]))
def test_every_name_and_shape_is_that_of_the_released_model(make, sizes):
    wanted = published(*sizes)
    assert len(wanted) == 719
    assert table_of(make()) == wanted


def test_every_parameter_is_named_once():
    config = config_lib.molmo_point_8b()
    parts = collections.Counter((path, entry.layer) for entry in weights.entries(config, "legacy")
                                for path in entry.paths)
    assert set(parts.values()) == {1}
    assert {path for path, _ in parts} == set(weights.abstract_params(config))
    with pytest.raises(ValueError, match="transformers has no model that points"):
        list(weights.entries(config, "native"))


@pytest.mark.parametrize("make", PRESETS)
def test_config_json_is_that_of_the_released_model_and_is_read_back(make):
    config = make()
    values = hf_config.write(config)
    ids = {"image_start_token_id": 151936, "image_end_token_id": 151937, "image_patch_id": 151938,
           "image_high_res_id": 151938, "image_col_id": 151939, "low_res_image_start_token_id": None,
           "image_non_indexable_patch_id": 151942, "frame_start_token_id": 151943,
           "frame_end_token_id": 151944, "patch_token_id": 151947, "subpatch_token_id": 151948,
           "location_token_id": 151949}
    pointing = {"patch_location": "3x3", "no_more_points_class": True, "patch_embed_dim": 512,
                "patch_embedding_kind": "image_feature0", "embed_selected_vit_patch": "linear",
                "embed_location": False, "layer_norm_x": True, "norm_logits": True, "mask_patches": "always",
                "mask_subpatches": "inference", "mask_repeats": "inference",
                "token_prediction_rotary": "one_d", "token_prediction_rotary_theta": 50000}
    other = {"model_type": "molmo_point", "architectures": ["MolmoPointForConditionalGeneration"],
             "use_frame_special_tokens": True, "tie_word_embeddings": False, "use_cache": True,
             "initializer_range": 0.02, "dtype": "float32"}
    sections = {name: values.pop(name) for name in ("vit_config", "adapter_config", "text_config")}
    assert values == ids | pointing | other
    assert sections["adapter_config"]["positional_embeddings"] is None
    assert sections["adapter_config"]["attention_pooling_out_layer"] is False
    assert sections["adapter_config"]["model_type"] == "molmo_point"
    assert sections["text_config"].get("tie_word_embeddings", False) is config.text.tied_head
    assert sections["text_config"]["max_position_embeddings"] == 37376
    wanted = test_config.without_init(config)
    wanted = dataclasses.replace(wanted, text=dataclasses.replace(
        wanted.text, tied_head=config.text.tied_head))
    assert hf_config.read(values | sections) == wanted


@pytest.mark.parametrize("section, field, value, message", [
    (None, "patch_embedding_kind", "linear", "patch_embedding_kind must be 'image_feature0', got 'linear'"),
    (None, "patch_location", None, "patch_location must be '3x3', got None"),
    (None, "embed_selected_vit_patch", None, "embed_selected_vit_patch must be 'linear', got None"),
    (None, "embed_location", True, "embed_location must be False, got True"),
    (None, "token_prediction_rotary", "two_d", "token_prediction_rotary must be 'one_d', got 'two_d'"),
    (None, "no_more_points_class", False, "no_more_points_class must be True, got False"),
    (None, "layer_norm_x", False, "layer_norm_x must be True, got False"),
    (None, "norm_logits", False, "norm_logits must be True, got False"),
    (None, "mask_patches", None, "mask_patches must be 'always' or 'inference', got None"),
    (None, "patch_token_id", 7, "patch_token_id must be"),
    (None, "image_low_res_id", 7, "unknown in the top level: image_low_res_id"),
    (None, "surprise", 1, "unknown in the top level: surprise"),
    (None, "quantization_config", {"bits": 4}, "quantization_config must be absent, since only unquantised"),
    (None, "quantization", {"bits": 4}, "quantization must be absent, since only unquantised weights"),
    (None, "patch_embed_dim", 13, "width must be even"),
    ("adapter_config", "positional_embeddings", 16, "adapter_config.positional_embeddings must be null"),
    ("text_config", "layer_norm_eps", 1e-5, "layer_norm_eps of text_config must be 1e-06, .* got 1e-05")])
def test_what_would_change_scores_is_refused(section, field, value, message):
    values = hf_config.write(config_lib.molmo_point_8b())
    (values if section is None else values[section])[field] = value
    with pytest.raises(ValueError, match=message):
        hf_config.read(values)


def test_an_absent_field_has_the_default_of_the_released_class():
    values = hf_config.write(config_lib.molmo_point_8b())
    for field in ("patch_embedding_kind", "no_more_points_class", "token_prediction_rotary"):
        del values[field]
    del values["adapter_config"]["positional_embeddings"]
    with pytest.raises(ValueError) as error:
        hf_config.read(values)
    for words in ("patch_embedding_kind must be 'image_feature0', got 'linear'",
                  "no_more_points_class must be True, got False",
                  "positional_embeddings must be null, got 16",
                  "token_prediction_rotary must be 'one_d', got True"):
        assert words in str(error.value)


def test_what_its_readers_cannot_compute_is_not_written():
    config = small()
    few = dataclasses.replace(config, text=dataclasses.replace(config.text, additional_vocab_size=16))
    with pytest.raises(ValueError, match="additional_vocab_size and norm_eps must be 128 and 1e-06"):
        hf_config.write(few)
    with pytest.raises(ValueError, match="has_output must be True to be exported without a pointer"):
        hf_config.write(dataclasses.replace(config, pointer=None))


@pytest.mark.parametrize("style", packs.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_output", [False, True])
def test_import_undoes_export_to_the_bit(style, dtype, has_output, tmp_path):
    config = small(style, has_output, theta=70.0, score_scale=3.5, loss_weight="one",
                   raw_location_reference=True)
    params = packs.random_params(config)
    export(tmp_path / "a", config, params, dtype=dtype, max_shard_bytes=3e4)
    again, found, inputs = checkpoint.import_checkpoint(tmp_path / "a", dtype=dtype)
    same(again, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else x.dtype),
                             params))
    assert inputs == INPUTS and found.pointer == config.pointer
    assert found.text.tied_head == config.text.tied_head and found.connector.has_output == has_output


def test_a_tied_head_is_left_out_and_read_either_way(tmp_path):
    config = small("qwen3_tied")
    params = packs.random_params(config)
    folder = export(tmp_path / "a", config, params)
    tensors = safetensors.numpy.load_file(folder / shards.SINGLE)
    assert not any(name.startswith("lm_head") for name in tensors)
    table, new = (tensors[f"model.transformer.wte.{name}"] for name in ("embedding", "new_embedding"))
    whole = tensors | {"lm_head.output_embeddings": table, "lm_head.new_output_embeddings": new}
    safetensors.numpy.save_file(whole, folder / shards.SINGLE)
    again, found, _ = checkpoint.import_checkpoint(folder)
    assert found.text.tied_head
    same(again, params)
    whole["lm_head.new_output_embeddings"] = new + 1
    safetensors.numpy.save_file(whole, folder / shards.SINGLE)
    with pytest.raises(ValueError, match="lm_head.output_embeddings and lm_head.new_output_embeddings must "
                                         "equal the embedding; they differ"):
        checkpoint.import_checkpoint(folder)


def released_like(folder, config, tokenizer=None):
    """Returns a folder like the released ones: random tensors by their published names, remote code."""
    export(folder, config, tokenizer=tokenizer)
    auto_map = {"AutoConfig": "configuration_molmo_point.MolmoPointConfig",
                "AutoModelForImageTextToText": "modeling_molmo_point.MolmoPointForConditionalGeneration"}
    for name in ("configuration_molmo_point.py", "modeling_molmo_point.py"):
        (folder / name).write_text(f"# {name}\n")
    values = json.loads((folder / "config.json").read_text())
    processor.write_json(folder / "config.json", values | {"auto_map": auto_map,
                                                           "transformers_version": "4.57.1"})
    return folder


def test_remote_code_is_passed_on(tmp_path):
    config = small()
    folder = released_like(tmp_path / "released", config)
    params, found, inputs = checkpoint.import_checkpoint(folder)
    kept = tmp_path / "run" / remote_code.NAME
    remote_code.write(remote_code.read(folder), kept)
    out = checkpoint.export_checkpoint(params, found, inputs, None, tmp_path / "out", code_from=kept)
    assert (out / "modeling_molmo_point.py").read_text() == "# modeling_molmo_point.py\n"
    assert "AutoConfig" in json.loads((out / "config.json").read_text())["auto_map"]
    for name in (shards.SINGLE, "processor_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_the_tokenizer_has_the_ids_of_choices_and_is_read_without_them(tmp_path):
    config = small()
    tokenizer = tokenizers.train_small(["a b"], 400)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=400))
    folder = export(tmp_path / "a", config, tokenizer=tokenizer)
    added = {one["content"]: one["id"]
             for one in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    assert added["<EXTRA_TOKENS_POINT_0>"] == 414 and added["<EXTRA_TOKENS_POINT_113>"] == 527
    assert added["<POINT_0>"] == 528 and added["<POINT_31199>"] == 528 + 31199
    assert "<EXTRA_TOKENS_POINT_114>" not in added and "<POINT_31200>" not in added
    again = tokenizers.Tokenizer.from_file(folder, 400)
    assert again.special == tokenizer.special and again.reserved == tokenizer.reserved
    assert again.encode_text("<POINT_7> a") == tokenizer.encode_text("<POINT_7> a")


def test_the_processor_writes_low_resolution_tokens_in_overviews(tmp_path):
    config = small()
    folder = export(tmp_path / "a", config)
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    assert values["use_low_res_token_for_global_crops"] is True
    processor.write_json(path, values | {"use_low_res_token_for_global_crops": False})
    with pytest.raises(ValueError, match="use_low_res_token_for_global_crops must be True, got False"):
        checkpoint.read_config(folder)


@pytest.mark.parametrize("style", [
    "qwen3", *(pytest.param(style, marks=pytest.mark.slow(15)) for style in ("qwen3_tied", "olmo"))])
@pytest.mark.slow(21)
def test_verify_passes_and_names_what_it_cannot_check(style, tmp_path):
    pytest.importorskip("transformers")
    nano = test_verify.small()
    olmo = dict(qk_norm="olmo", norm_after=True) if style == "olmo" else {}
    config = dataclasses.replace(
        nano, connector=dataclasses.replace(nano.connector, has_output=False),
        text=dataclasses.replace(nano.text, tied_head=style == "qwen3_tied", **olmo),
        pointer=config_lib.PointerConfig(width=12))
    tokenizer = tokenizers.train_small(test_verify.TEXTS, config.text.vocab_size)
    params = packs.random_params(config)
    folder = checkpoint.export_checkpoint(params, config, test_verify.INPUTS, tokenizer, tmp_path / "a")
    original = verify.Original(params, config, test_verify.INPUTS, tokenizer)
    checks = verify.verify(folder, original)
    assert [check.name for check in checks if check.status == "skipped"] == ["remote code: scores of choices"]
    assert not [check for check in checks if check.status == "FAIL"], verify.table(checks)
    assert [check.name for check in checks][-4:] == [
        f"logits of the base vocabulary: {kind}" for kind in ("text", "image", "video", "several images")]
    tensors = safetensors.numpy.load_file(folder / shards.SINGLE)
    swapped = "model.connector.image_projector.w1.weight", "model.connector.image_projector.w3.weight"
    damaged = tensors | dict(zip(swapped, [tensors[name] for name in swapped[::-1]]))
    safetensors.numpy.save_file(damaged, folder / shards.SINGLE)
    assert [check.name for check in verify.verify(folder, original) if check.status == "FAIL"] == [
        "same as the original"]
    values = json.loads((folder / "config.json").read_text())
    del values["patch_embed_dim"]
    processor.write_json(folder / "config.json", values)
    failed = [check.detail for check in verify.verify(folder, with_logits=False) if check.status == "FAIL"]
    assert any("lacks patch_embed_dim" in words for words in failed)
