"""The files of the released 4B: read, and written equally field by field, with documented exceptions."""

import json
import pathlib
import shutil

import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import config as hf_config
from molmo2_jax.hf import processor
from molmo2_jax.inputs import tokenizer as tokenizers
from tests.hf import test_config

RELEASED = pathlib.Path(__file__).parent / "released_4b"


def released(name):
    return json.loads((RELEASED / name).read_text())


def differences(written, wanted, path=""):
    """Returns {path of a field: (written, wanted)} of different fields; None for an absent one."""
    if isinstance(written, dict) and isinstance(wanted, dict):
        return {key: value for field in {**written, **wanted} for key, value in differences(
            written.get(field), wanted.get(field), f"{path}.{field}".lstrip(".")).items()}
    return {} if written == wanted else {path: (written, wanted)}


def test_the_released_config_is_the_4b_preset():
    model, inputs = checkpoint.read_config(RELEASED)
    assert model == test_config.without_init(config_lib.molmo2_4b())
    assert inputs == config_lib.InputConfig(max_crops=8)


def test_config_json_is_written_as_released():
    for model in (config_lib.molmo2_4b(), checkpoint.read_config(RELEASED)[0]):
        assert differences(hf_config.write(model), released("config.json")) == {
            "transformers_version": (None, "4.57.1"),
            "auto_map": (None, released("config.json")["auto_map"]),
            "use_frame_special_tokens": (True, False)}


def test_the_image_processor_file_is_written_as_released():
    model, inputs = checkpoint.read_config(RELEASED)
    written = processor.write(model, inputs)["preprocessor_config.json"]
    assert differences(written, released("preprocessor_config.json")) == {
        "auto_map": (None, released("preprocessor_config.json")["auto_map"]),
        "max_images": (5, None), "high_res_crops": (24, None)}


def test_the_generation_config_is_written_as_released(tmp_path):
    tokenizer = tokenizers.train_small(["a b"], config_lib.nano().text.vocab_size)
    processor.write_tokenizer(tmp_path, tokenizer)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    names = {field: tokenizer.token(value) for field, value in written.items()}
    assert names == {"bos_token_id": "<|im_end|>", "eos_token_id": "<|im_end|>",
                     "pad_token_id": "<|endoftext|>"}  # 151645, 151645 and 151643 of Qwen3
    assert set(released("generation_config.json")) == {*written, "transformers_version"}


@pytest.mark.parametrize("value", [True, False])
def test_the_markers_of_frames_are_those_of_the_processor_file_and_not_of_config_json(value, tmp_path):
    folder = shutil.copytree(RELEASED, tmp_path / "released")
    processor.write_json(folder / "processor_config.json", {"use_frame_special_tokens": value})
    model, inputs = checkpoint.read_config(folder)
    assert inputs.use_frame_special_tokens is value
    assert processor.write(model, inputs)["processor_config.json"]["use_frame_special_tokens"] is value
    assert hf_config.write(model, use_frame_special_tokens=value)["use_frame_special_tokens"] is value


def test_a_value_that_is_no_switch_is_refused(tmp_path):
    folder = shutil.copytree(RELEASED, tmp_path / "released")
    processor.write_json(folder / "processor_config.json", {"use_frame_special_tokens": None})
    with pytest.raises(ValueError, match="use_frame_special_tokens must be true or false, got None"):
        checkpoint.read_config(folder)


@pytest.mark.parametrize(("given", "written"), [
    ("Qwen2Tokenizer", "Qwen2Tokenizer"), ("TokenizersBackend", "PreTrainedTokenizerFast"),
    (None, "PreTrainedTokenizerFast")])
def test_the_class_of_the_tokenizer_is_passed_on(given, written, tmp_path):
    """The released 4B has "Qwen2Tokenizer", that of its decoder."""
    tokenizers.train_small(["a b"], 512).save(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": given}))
    processor.write_tokenizer(tmp_path / "b", tokenizers.Tokenizer.from_file(tmp_path / "a"))
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["tokenizer_class"] == written
