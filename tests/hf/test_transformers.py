"""An exported folder loaded by transformers' own molmo2 gives our logits for our arrays."""

import dataclasses
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import compare
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import tokenizer as tokenizer_lib
from molmo2_jax.model import molmo2
from tests import packs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peer = pytest.importorskip("molmo2_jax.hf.peer")

TOLERANCE = 2e-5  # float32; measured 1.3e-5 at most over 18 models, on logits of size 5
T, M, R = 96, 12, 40
NEW = 64  # tokens of a greedy answer


def export(params, config, folder):
    return checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), None, folder)


def examples(config, seed=0, frames=5):
    """Returns {name: Sequence}."""
    rng = np.random.default_rng(seed)
    visuals = {"text": None, "image": packs.images(rng, config, 1, num_tiles=2),
               "three images": packs.images(rng, config, 3, num_tiles=1),
               "video": packs.video(rng, config, frames)}
    return {name: packs.sequence(rng, config, visual, (7 + len(name),)) for name, visual in visuals.items()}


def assert_theirs(model, config, cases, ours, tolerance):
    """Asserts equal logits for each example alone and for three in a batch with padding on the left."""
    for name, one in cases.items():
        assert ours[name].std() > 0.3
        np.testing.assert_allclose(ours[name], peer.logits(model, [one], config)[0], atol=tolerance, rtol=0,
                                   err_msg=name)
    together = ["text", "image", "three images"]
    for name, logits in zip(together, peer.logits(model, [cases[name] for name in together], config)):
        np.testing.assert_allclose(ours[name], logits, atol=tolerance, rtol=0, err_msg=f"left-padded {name}")


def our_logits(config, params, sequences, T=T, M=M, R=R):
    batch = rows_lib.stack([packs.row([one], config, T, M, R) for one in sequences])
    logits = jax.jit(molmo2.Molmo2(config, remat="none").apply)({"params": params}, batch)
    return [np.asarray(row[:len(one.tokens)]) for row, one in zip(logits, sequences)]


@pytest.mark.parametrize(("style", "seed"), [
    ("qwen3", 0), ("qwen3", 1), ("qwen3_tied", 0), ("olmo", 0), ("olmo", 1)])
def test_logits_equal_those_of_transformers(style, seed, tmp_path):
    config = packs.random_config(style, seed)
    params = packs.random_params(config, seed)
    folder = export(params, config, tmp_path / "model")
    cases = examples(config, seed)
    ours = dict(zip(cases, our_logits(config, params, list(cases.values()))))
    assert_theirs(peer.load(folder), config, cases, ours, TOLERANCE)


@pytest.mark.parametrize("style", packs.STYLES)
@pytest.mark.slow(6)
def test_greedy_answers_of_64_tokens_are_those_of_transformers(style, tmp_path):
    config = packs.random_config(style, 2)
    params = packs.random_params(config, 2)
    model = peer.load(export(params, config, tmp_path / "m"))
    cases = examples(config, 2)
    batch = rows_lib.stack([packs.row([one], config, T, M, R) for one in cases.values()])
    last = np.array([[len(one.tokens) - 1] for one in cases.values()], np.int32)
    never = -1
    ours = decode.generate(molmo2.Molmo2(config, remat="none"), params, batch,
                           decode.Questions(last, np.full_like(last, NEW), last), eos=never, num_new=NEW)
    assert len(np.unique(ours.tokens)) > 8
    for (name, one), answer in zip(cases.items(), np.asarray(ours.tokens)[:, 0]):
        assert peer.answers(model, one, config, NEW) == answer.tolist(), name


def test_the_comparison_detects_a_missing_visual_mask(tmp_path):
    config = packs.random_config("qwen3", 0)
    params = packs.random_params(config)
    model = peer.load(export(params, config, tmp_path / "m"))
    video = examples(config)["video"]
    inputs = peer.arguments([video], config) | {"mm_token_type_ids": None}
    with torch.no_grad():
        causal = model(**inputs).logits.numpy()[0]
    assert np.abs(causal - peer.logits(model, [video], config)[0]).max() > 100 * TOLERANCE


@pytest.mark.slow(6)
@pytest.mark.parametrize(("attention", "merge"), [
    ("causal", "replace"), ("causal", "add"), ("image_tokens", "replace")])
def test_logits_by_the_rule_of_vllm_are_those_of_transformers_made_causal_and_replacing(
        attention, merge, tmp_path):
    """Each of the two differences from the reference alone, and both together."""
    config = packs.random_config("qwen3", 0)
    params = packs.random_params(config)
    model = peer.load(export(params, config, tmp_path / "m"))
    other = dataclasses.replace(config, visual_attention=attention, visual_merge=merge)
    assert (other == compare.as_vllm(config)) == ((attention, merge) == ("causal", "replace"))
    cases = examples(config)
    rows, usual = (our_logits(one, params, list(cases.values())) for one in (other, config))
    table = model.get_input_embeddings().weight.detach().clone()
    for (name, one), ours, before in zip(cases.items(), rows, usual):
        np.testing.assert_allclose(ours, peer.logits(model, [one], other)[0], atol=TOLERANCE, rtol=0,
                                   err_msg=name)
        assert (np.abs(ours - before).max() > 100 * TOLERANCE) == (name != "text"), name
    assert torch.equal(table, model.get_input_embeddings().weight)


@pytest.mark.parametrize("save_original_format", [True, False])
def test_a_folder_saved_by_transformers_is_read_unchanged(save_original_format, tmp_path):
    config = packs.random_config("olmo", 0)
    params = packs.random_params(config)
    inputs = config_lib.InputConfig()
    model = peer.load(checkpoint.export_checkpoint(params, config, inputs, None, tmp_path / "ours"))
    model.save_pretrained(tmp_path / "theirs", save_original_format=save_original_format)
    again, config_again, _ = checkpoint.import_checkpoint(tmp_path / "theirs")
    assert config_again.text == dataclasses.replace(config.text, init_std=0.02, embedding_init_std=0.02)
    assert config_again.connector == config.connector
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """Returns the nano model with a tokenizer, exported in several shards and loaded by transformers."""
    texts = ["Point to the red circle. How many blue squares are there? 0.5 1.0 Image 1 2 3"] * 4
    config, inputs = config_lib.nano(), config_lib.InputConfig(max_crops=3, overlap_margins=(2, 2))
    tokenizer = tokenizer_lib.train_small(texts, config.text.vocab_size)
    params = packs.random_params(config)
    folder = checkpoint.export_checkpoint(params, config, inputs, tokenizer,
                                          tmp_path_factory.mktemp("nano") / "model", max_shard_bytes=1e6)
    return config, inputs, tokenizer, params, folder, peer.load(folder)


def test_the_real_input_pipeline_agrees_too(nano):
    config, inputs, tokenizer, params, _, model = nano
    cases = compare.examples(config, inputs, tokenizer)
    group = [one for one, _ in cases.values()]
    assert set(cases) == {"text", "image", "several images", "video"} and len(group[1].patches) > 2
    for kind, one, ours in zip(cases, group, compare.our_logits(params, config, group)):
        np.testing.assert_allclose(ours, peer.logits(model, [one], config)[0], atol=TOLERANCE, rtol=0,
                                   err_msg=kind)


def test_a_video_between_image_markers_agrees_and_is_read_back(nano, tmp_path):
    config, inputs, tokenizer, params, _, _ = nano
    inputs = dataclasses.replace(inputs, use_frame_special_tokens=False)
    folder = checkpoint.export_checkpoint(params, config, inputs, tokenizer, tmp_path / "m")
    _, again, read = checkpoint.import_checkpoint(folder)
    assert read == inputs
    video = compare.examples(again, read, tokenizer)["video"][0]
    markers = [config.special_id(token) for token in ("<im_start>", "<im_end>", "<frame_start>")]
    assert [(video.tokens == marker).sum() for marker in markers] == [3, 3, 0]
    np.testing.assert_allclose(compare.our_logits(params, config, [video])[0],
                               peer.logits(peer.load(folder), [video], config)[0], atol=TOLERANCE, rtol=0)


def test_the_chat_template_writes_turns_styles_and_subtitles(nano):
    template = transformers.AutoTokenizer.from_pretrained(nano[4])
    text = template.apply_chat_template([
        {"role": "subtitle", "content": "subtitle\n0.0 - 1.0 hello\n"},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Who?", "style": "vqa2"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [{"type": "text", "text": "Where?", "style": "user_qa"}]}],
        tokenize=False, add_generation_prompt=True)
    assert text == ("<|video|>subtitle\n0.0 - 1.0 hello\n<|im_start|>user\nvqa2: Who?<|im_end|>\n"
                    "<|im_start|>assistant\nA dog.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
                    "<|im_start|>assistant\n")


def test_the_tokenizer_of_the_folder_pads_on_the_left_and_knows_its_ids(nano):
    config, _, tokenizer, _, folder, model = nano
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.padding_side == "left"
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eos_id
    assert theirs.convert_tokens_to_ids("<im_patch>") == config.special_id("<im_patch>")
    assert model.generation_config.eos_token_id == tokenizer.eos_id
    assert model.generation_config.pad_token_id == theirs.pad_token_id
    assert theirs.pad_token == "<|endoftext|>"
    question = "Point to the red circle. <|im_end|>"
    assert theirs(question, add_special_tokens=False).input_ids == tokenizer.encode(question)
