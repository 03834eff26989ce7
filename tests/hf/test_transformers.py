"""An exported folder, loaded by transformers' own molmo2 and fed with our arrays, gives our logits."""

import dataclasses
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import types
from molmo2_jax.hf import checkpoint
from molmo2_jax.inputs import image
from molmo2_jax.inputs import packing
from molmo2_jax.inputs import sequence as sequence_lib
from molmo2_jax.inputs import tokenizer as tokenizer_lib
from molmo2_jax.model import molmo2
from tests import packs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5  # float32; measured 1.3e-5 at most over 18 models, on logits of size 5
T, M, R = 96, 12, 40
NEW = 64  # tokens of a greedy answer


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Models this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder):
    """The model transformers makes of a folder; nothing missing, unexpected or of another shape."""
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval()


def examples(config, seed=0):
    """Returns {name: (Sequence, Visual or None)}."""
    rng = np.random.default_rng(seed)
    visuals = {"text": None, "image": packs.images(rng, config, 1, num_tiles=2),
               "three images": packs.images(rng, config, 3, num_tiles=1),
               "video": packs.video(rng, config, 5)}
    return {name: (packs.sequence(rng, config, visual, (7 + len(name),)), visual)
            for name, visual in visuals.items()}


def torch_inputs(group):
    """Returns the arguments of transformers' forward for examples side by side, padded on the left."""
    length = max(len(one.tokens) for one, _ in group)
    left = lambda x: np.pad(x, (length - len(x), 0))
    ids, mask, kinds, crops, pooled, grids, counts = [], [], [], [], [], [], []
    offset = 0
    for one, visual in group:
        ids.append(left(one.tokens))
        mask.append(left(np.ones_like(one.tokens)))
        kinds.append(left((one.image >= 0).astype(np.int64)))
        if visual:
            crops.append(one.patches.astype(np.float32) / 127.5 - 1)
            pooled.append(np.where(one.pooled >= 0, one.pooled + offset, -1))
            grids.append(visual.grids)
            counts.append(visual.num_crops)
            offset += one.patches.shape[0] * one.patches.shape[1]
    mask = np.stack(mask)
    inputs = {"input_ids": np.stack(ids), "attention_mask": mask, "mm_token_type_ids": np.stack(kinds),
              "position_ids": np.maximum(np.cumsum(mask, 1) - 1, 0)}
    if crops and group[-1][1].is_video:
        inputs |= {"pixel_values_videos": np.concatenate(crops), "video_grids": np.concatenate(grids),
                   "video_token_pooling": np.concatenate(pooled)}
    elif crops:
        inputs |= {"pixel_values": np.concatenate(crops), "image_token_pooling": np.concatenate(pooled),
                   "image_grids": np.concatenate(grids), "image_num_crops": np.concatenate(counts)}
    return {name: torch.from_numpy(np.ascontiguousarray(
        value, None if value.dtype == np.float32 else np.int64)) for name, value in inputs.items()}


def their_logits(model, group):
    with torch.no_grad():
        logits = model(**torch_inputs(group)).logits.numpy()
    return [row[len(row) - len(one.tokens):] for row, (one, _) in zip(logits, group)]


def our_logits(config, params, sequences, T=T, M=M, R=R):
    batch = packing.stack([packs.row([one], config, T, M, R) for one in sequences])
    logits = jax.jit(molmo2.Molmo2(config, remat="none").apply)({"params": params}, batch)
    return [np.asarray(row[:len(one.tokens)]) for row, one in zip(logits, sequences)]


@pytest.mark.parametrize(("style", "seed"), [
    ("qwen3", 0), ("qwen3", 1), ("qwen3_tied", 0), ("olmo", 0), ("olmo", 1)])
def test_logits_equal_those_of_transformers(style, seed, tmp_path):
    config = packs.random_config(style, seed)
    params = packs.random_params(config, seed)
    folder = checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), None, tmp_path / "model")
    model = load(folder)
    cases = examples(config, seed)
    ours = dict(zip(cases, our_logits(config, params, [one for one, _ in cases.values()])))
    for name, case in cases.items():
        assert ours[name].std() > 0.3
        np.testing.assert_allclose(ours[name], their_logits(model, [case])[0], atol=TOLERANCE, rtol=0,
                                   err_msg=name)
    side_by_side = ["text", "image", "three images"]
    for name, logits in zip(side_by_side, their_logits(model, [cases[name] for name in side_by_side])):
        np.testing.assert_allclose(ours[name], logits, atol=TOLERANCE, rtol=0, err_msg=f"left-padded {name}")


@pytest.mark.parametrize("style", packs.STYLES)
def test_greedy_answers_of_64_tokens_are_those_of_transformers(style, tmp_path):
    config = packs.random_config(style, 2)
    params = packs.random_params(config, 2)
    model = load(checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), None, tmp_path / "m"))
    cases = examples(config, 2)
    batch = packing.stack([packs.row([one], config, T, M, R) for one, _ in cases.values()])
    last = np.array([[len(one.tokens) - 1] for one, _ in cases.values()], np.int32)
    never = -1
    ours = decode.generate(molmo2.Molmo2(config, remat="none"), params, batch,
                           decode.Questions(last, np.full_like(last, NEW), last), eos=never, num_new=NEW)
    assert len(np.unique(ours.tokens)) > 8
    for name, case, answer in zip(cases, cases.values(), np.asarray(ours.tokens)[:, 0]):
        inputs = torch_inputs([case])
        del inputs["position_ids"]
        theirs = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert theirs[0, len(case[0].tokens):].tolist() == answer.tolist(), name


def test_the_comparison_would_see_a_missing_visual_mask(tmp_path):
    config = packs.random_config("qwen3", 0)
    params = packs.random_params(config)
    model = load(checkpoint.export_checkpoint(params, config, config_lib.InputConfig(), None, tmp_path / "m"))
    case = examples(config)["video"]
    inputs = torch_inputs([case]) | {"mm_token_type_ids": None}
    with torch.no_grad():
        causal = model(**inputs).logits.numpy()[0]
    assert np.abs(causal - their_logits(model, [case])[0]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("save_original_format", [True, False])
def test_a_folder_saved_by_transformers_comes_back_unchanged(save_original_format, tmp_path):
    config = packs.random_config("olmo", 0)
    params = packs.random_params(config)
    inputs = config_lib.InputConfig()
    model = load(checkpoint.export_checkpoint(params, config, inputs, None, tmp_path / "ours"))
    model.save_pretrained(tmp_path / "theirs", save_original_format=save_original_format)
    again, config_again, _ = checkpoint.import_checkpoint(tmp_path / "theirs")
    assert config_again.text == dataclasses.replace(config.text, init_std=0.02, embedding_init_std=0.02)
    assert config_again.connector == config.connector
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The nano model with a tokenizer, exported in several shards and loaded by transformers."""
    texts = ["Point to the red circle. How many blue squares are there? 0.5 1.0 Image 1 2 3"] * 4
    config, inputs = config_lib.nano(), config_lib.InputConfig(max_crops=3, overlap_margins=(2, 2))
    tokenizer = tokenizer_lib.train_small(texts, config.text.vocab_size)
    params = packs.random_params(config)
    folder = checkpoint.export_checkpoint(params, config, inputs, tokenizer,
                                          tmp_path_factory.mktemp("nano") / "model", max_shard_bytes=1e6)
    return config, inputs, tokenizer, params, folder, load(folder)


def nano_example(config, inputs, tokenizer, kind, question):
    """Returns (Sequence, Visual) made by the real input pipeline from random pixels."""
    rng = np.random.default_rng(len(question))
    branch = types.Branch(turns=(question,))
    pixels = lambda *shape: rng.integers(0, 256, (*shape, 3), np.uint8)
    grid = config.vision.grid
    if kind == "video":
        frames = types.Frames(pixels(3, 50, 80), np.array([0.0, 0.5, 1.0]), 80, 50, 1.0, 2.0)
        crops = image.crops_of_frames(frames, config, inputs, tokenizer)
        rows, columns = (-(-grid // window) for window in config.connector.video_window)
        visual = packs.Visual(crops, np.array([[3, rows, columns]]), np.ones(3), True)
    else:
        pictures = [pixels(60, 130), pixels(90, 70)][:2 if kind == "images" else 1]
        crops = image.crops_of_images(pictures, config, inputs, tokenizer)
        sizes = [image.crops_of_images([p], config, inputs, tokenizer) for p in pictures]
        low = -(-grid // config.connector.image_window[0])
        column = config.special_id("<im_col>")
        grids = []
        for one in sizes:
            high, rows = len(one.pooled) - low * low, int((one.tokens == column).sum())
            grids.append([low, low, rows, high // rows])
        visual = packs.Visual(crops, np.array(grids), np.array([len(one.patches) for one in sizes]), False)
    return sequence_lib.build(crops, [branch], tokenizer), visual


@pytest.mark.parametrize("kind", ["image", "images", "video"])
def test_the_real_input_pipeline_agrees_too(nano, kind):
    config, inputs, tokenizer, params, _, model = nano
    case = nano_example(config, inputs, tokenizer, kind, "How many red circles?")
    assert len(case[0].tokens) <= 512
    ours = our_logits(config, params, [case[0]], 512, 12, 320)
    np.testing.assert_allclose(ours[0], their_logits(model, [case])[0], atol=TOLERANCE, rtol=0)


def expand(tokens, config, placeholder):
    """Returns the ids with each image's or the video's visual block folded back into its placeholder."""
    visual = {config.special_id(t) for t in config_lib.SPECIAL_TOKENS}
    folded = []
    for token in tokens.tolist():
        if token not in visual:
            folded.append(token)
        elif not folded or folded[-1] != placeholder:
            folded.append(placeholder)
    return folded


@pytest.mark.parametrize(("kind", "parts"), [
    ("image", [{"type": "image"}]), ("images", [{"type": "image"}] * 2)])
def test_the_chat_template_writes_the_prompt_that_our_pipeline_writes(nano, kind, parts):
    config, inputs, tokenizer, _, folder, _ = nano
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, _ = nano_example(config, inputs, tokenizer, kind, "How many red circles?")
    text = theirs.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": "How many red circles?"}]}],
        tokenize=False, add_generation_prompt=True)
    placeholder = config.special_id("<|image|>")
    assert [tokenizer.bos_id, *theirs(text, add_special_tokens=False).input_ids] == expand(
        ours.tokens, config, placeholder)


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
