"""The checks of a folder: ours passes all of them, and each kind of damage fails its own check."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import compare
from molmo2_jax.hf import shards
from molmo2_jax.hf import verify
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import tokenizer as tokenizers
from tests import packs

INPUTS = config_lib.InputConfig(max_crops=4, max_frames=4, overlap_margins=(2, 2))
TEXTS = ["Point to the red circle. How many blue squares are there in 0.5 s? Image 1 2 3"] * 4
WITHOUT_TRANSFORMERS = ["files", "config.json", "fields for the remote code and vLLM",
                        "names and shapes of tensors", "dtypes", "token ids", "remote code"]


def small():
    """Returns the nano model with fewer and narrower layers."""
    nano = config_lib.nano()
    return dataclasses.replace(
        nano, vision=dataclasses.replace(nano.vision, num_layers=2, width=32, num_heads=2, mlp_width=40),
        connector=dataclasses.replace(nano.connector, taps=(1, 0), num_heads=2, mlp_width=40),
        text=dataclasses.replace(nano.text, num_layers=2, width=32, head_dim=8, mlp_width=40))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns (Original, folder in bfloat16 and several shards)."""
    config = small()
    tokenizer = tokenizers.train_small(TEXTS, config.text.vocab_size)
    params = packs.random_params(config)
    folder = checkpoint.export_checkpoint(params, config, INPUTS, tokenizer,
                                          tmp_path_factory.mktemp("made") / "hf", dtype="bfloat16",
                                          max_shard_bytes=1e5)
    return verify.Original(params, config, INPUTS, tokenizer), folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "hf")


def statuses(checks):
    return {check.name: check.status for check in checks}


def test_our_folder_passes_every_check_and_equals_its_original(made):
    pytest.importorskip("transformers")
    original, folder = made
    checks = verify.verify(folder, original)
    failed = [check for check in checks if check.status != "ok" and check.name != "transformers: processor"]
    assert not failed, verify.table(checks)
    assert [check.name for check in checks] == [
        *WITHOUT_TRANSFORMERS, "same as the original", "transformers: config",
        "transformers: tokenizer and chat template", "transformers: processor", "logits: ours",
        "transformers: tensors", "logits: text", "logits: image", "logits: video", "logits: several images"]
    assert verify.table(checks).splitlines()[-1].startswith(f"{len(checks) - 1} ok, 0 FAIL")


def test_the_rule_of_vllm_passes_too_and_its_logits_are_written(made, tmp_path):
    pytest.importorskip("transformers")
    original, folder = made
    checks = verify.verify(folder, is_vllm=True, logits_to=tmp_path / "deep" / "logits.npz")
    assert not [check for check in checks if check.status == "FAIL"], verify.table(checks)
    [ours] = [check for check in checks if check.name == "logits: ours"]
    assert "replace the embedding of <im_patch>, whose largest value is 1." in ours.detail
    tokenizer, config = original.tokenizer, original.config
    cases = compare.examples(config, INPUTS, tokenizer)
    written = np.load(tmp_path / "deep" / "logits.npz")
    kept, _, _ = checkpoint.import_checkpoint(folder)
    wanted = compare.our_logits(kept, compare.as_vllm(config), [one for one, _ in cases.values()])
    usual = compare.our_logits(kept, config, [one for one, _ in cases.values()])
    for (kind, (one, stills)), logits, other in zip(cases.items(), wanted, usual):
        np.testing.assert_array_equal(written[f"{kind}/tokens"], one.tokens)
        np.testing.assert_array_equal(written[f"{kind}/logits"], logits)
        assert (np.abs(logits - other).max() > 1e-3) == (kind != "text")
        assert sum(name.startswith(f"{kind}/still") for name in written) == len(stills)
    frames = crops_lib.patchify(written["video/frames"], config.vision.patch_size)
    np.testing.assert_array_equal(frames, cases["video"][0].patches)


def edit(folder, file, change):
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def drop(file, *path):
    def damage(folder):
        def change(values):
            for key in path[:-1]:
                values = values[key]
            del values[path[-1]]
        edit(folder, file, change)
    return damage


def put(file, value, *path):
    def damage(folder):
        def change(values):
            for key in path[:-1]:
                values = values[key]
            values[path[-1]] = value
        edit(folder, file, change)
    return damage


def swap_special_tokens(folder):
    def change(values):
        for token in values["added_tokens"]:
            swapped = {"<im_start>": "<im_end>", "<im_end>": "<im_start>"}
            token["content"] = swapped.get(token["content"], token["content"])
    edit(folder, "tokenizer.json", change)


def cast_one(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    tensors = safetensors.numpy.load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name].astype(np.float32)
    safetensors.numpy.save_file(tensors, path)


FIELDS, TENSORS = "fields for the remote code and vLLM", "names and shapes of tensors"


@pytest.mark.parametrize(("damage", "check", "words"), [
    (lambda folder: (folder / "chat_template.jinja").unlink(), "files", "missing chat_template.jinja"),
    (put("config.json", 1, "surprise"), "config.json", "unknown in the top level: surprise"),
    (put("config.json", 7, "image_patch_id"), "config.json", "image_patch_id must be 514, got 7"),
    (drop("config.json", "vit_config", "image_num_pos"), FIELDS, "vit_config lacks image_num_pos"),
    (drop("config.json", "use_cache"), FIELDS, "config.json lacks use_cache"),
    (put("config.json", False, "use_frame_special_tokens"), FIELDS, "use_frame_special_tokens must be true"),
    (put("processor_config.json", False, "use_frame_special_tokens"), FIELDS,
     "use_frame_special_tokens must be false as in processor_config.json"),
    (drop("processor_config.json", "use_single_crop_col_tokens"), FIELDS, "lacks use_single_crop_col_tokens"),
    (drop("video_preprocessor_config.json", "sampling_fps"), FIELDS, "lacks sampling_fps"),
    (lambda folder: max(folder.glob("*.safetensors")).unlink(), TENSORS, "every shard of the index"),
    (put("config.json", 41, "text_config", "intermediate_size"), TENSORS, "ff_proj.weight is"),
    (cast_one, "dtypes", "all tensors must be bfloat16 like the first"),
    (put("config.json", "float32", "dtype"), "dtypes", "dtype of config.json must be 'bfloat16'"),
    (put(shards.INDEX, 1, "metadata", "total_size"), "dtypes", "total_size of model.safetensors.index"),
    (swap_special_tokens, "token ids", "special tokens with consecutive ids"),
    (put("generation_config.json", 3, "eos_token_id"), "token ids", "eos_token_id of generation_config.json"),
    (put("generation_config.json", 3, "pad_token_id"), "token ids", "must be the pad_token_id 3"),
    (put("tokenizer_config.json", "right", "padding_side"), "token ids", "padding_side must be 'left'"),
    (put("config.json", {"AutoConfig": "a.B"}, "auto_map"), "remote code", "lacks a.py")])
def test_each_damage_fails_its_own_check(damage, check, words, folder):
    damage(folder)
    failed = [one for one in verify.verify(folder, with_logits=False) if one.status == "FAIL"]
    assert failed and failed[0].name == check and words in failed[0].detail, failed


def test_a_bit_that_differs_from_the_original_is_found(made, folder):
    original, _ = made
    path = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    [failed] = [one for one in verify.verify(folder, original, with_logits=False) if one.status == "FAIL"]
    assert failed.name == "same as the original" and failed.detail.endswith(" differs")


def test_other_settings_than_the_originals_are_named(made):
    original, folder = made
    other = original._replace(
        inputs=dataclasses.replace(INPUTS, max_frames=9),
        config=dataclasses.replace(original.config, text=dataclasses.replace(
            original.config.text, rope_theta=5.0)),
        params=original.params | {"ghost": np.zeros(2)})
    [failed] = [one for one in verify.verify(folder, other, with_logits=False) if one.status == "FAIL"]
    assert failed.detail == ("ghost is missing; model.text.rope_theta is 1000000.0 instead of 5.0; "
                             "inputs.max_frames is 4 instead of 9")


def test_a_folder_saved_by_transformers_fails_the_check_of_released_names(made, tmp_path):
    peer = pytest.importorskip("molmo2_jax.hf.peer")
    peer.load(made[1]).save_pretrained(tmp_path / "theirs")
    found = {one.name: one for one in verify.verify(tmp_path / "theirs", with_logits=False)}
    assert "config.json vit_config lacks hidden_size" in found[FIELDS].detail
    assert "must have the 512 rows of the base vocabulary; got 320" in found[TENSORS].detail


def test_wrong_logits_fail(made, monkeypatch):
    pytest.importorskip("transformers")
    ours = compare.our_logits
    monkeypatch.setattr(compare, "our_logits", lambda *args: [1.001 * one for one in ours(*args)])
    found = statuses(verify.verify(made[1]))
    assert {found[name] for name in found if name.startswith("logits: ") and "ours" not in name} == {"FAIL"}


def test_another_chat_template_fails(folder):
    pytest.importorskip("transformers")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("'Image '", "'Picture '"))
    tokenizer_check = "transformers: tokenizer and chat template"
    [failed] = [one for one in verify.verify(folder) if one.status == "FAIL"]
    assert failed.name == tokenizer_check and "the prompt for several images must be" in failed.detail


def test_every_preset_is_written_with_all_fields_that_readers_need(tmp_path):
    from molmo2_jax.hf import config as hf_config
    from molmo2_jax.hf import processor
    for preset in ("molmo2_4b", "molmo2_8b", "molmo2_o_7b", "nano"):
        config = getattr(config_lib, preset)()
        files = processor.write(config, config_lib.InputConfig()) | {"config.json": hf_config.write(config)}
        for name, values in files.items():
            processor.write_json(tmp_path / name, values)
        assert verify._check_fields(tmp_path) == "77 fields"


def test_parameters_are_compared_after_rounding_to_the_folders_dtype(made):
    original, folder = made
    head = original.params["head"].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (head != original.params["head"]).any()
    rounded = original._replace(params=original.params | {"head": head})
    checks = statuses(verify.verify(folder, rounded, with_logits=False))
    assert checks["same as the original"] == "ok"
