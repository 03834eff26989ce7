"""Answers to questions about media: shared roots, mixed batches, refusals, points read from the text."""

import dataclasses
import functools

import av
import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import generate
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax import types
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2

LOGPROB_TOLERANCE = 1e-4  # sums of 12 log-probabilities, size 60; measured 2e-5
NANO = config_lib.nano()
CONFIG = dataclasses.replace(
    NANO, vision=dataclasses.replace(NANO.vision, num_layers=1, width=32, mlp_width=64),
    connector=dataclasses.replace(NANO.connector, taps=(0,), num_heads=2, mlp_width=64),
    text=dataclasses.replace(NANO.text, num_layers=2, width=32, head_dim=8, mlp_width=64, max_positions=600))
INPUTS = config_lib.InputConfig(max_crops=2, max_frames=6, overlap_margins=(1, 1))
NEW = 12
# One compiled program for most tests.
SHAPE = generate.PromptShape(types.RowShape(T=384, M=8, R=256, W=9), Q=3)


@functools.lru_cache
def tokenizer():
    corpus = ['Point to the red circle. <points coords="0.5 1 123 456">red circle</points>'] * 3
    return tokenizers.train_small(corpus, CONFIG.text.vocab_size)


@functools.lru_cache
def params():
    """Returns random parameters, drawn by numpy because compiling the initialisation takes seconds."""
    model = molmo2.Molmo2(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), state.smallest_batch(model))
    shapes = nn.meta.unbox(shapes)["params"]
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.float32(path[-1].key == "scale")
        + (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@functools.lru_cache
def answerer():
    return generate.Answerer(params(), CONFIG, INPUTS, tokenizer(), max_new_tokens=NEW)


def write_video(path, seed=0, num_frames=12, size=(48, 64)):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6, options={"preset": "ultrafast", "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for _ in range(num_frames):
            coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
            pixels = np.asarray(Image.fromarray(coarse).resize(size[::-1]))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def write_image(path, seed=0, size=(50, 80)):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)
    return str(path)


def example(**fields):
    return types.Example(annotations=(), **fields)


def run(*pairs):
    """Returns the answers to (example, prompts) pairs in one batch of SHAPE."""
    return answerer().run([answerer().prompt(*pair) for pair in pairs], SHAPE, rows=4)


def same(answer, other):
    assert answer.text == other.text and answer.new_tokens == other.new_tokens
    assert abs(answer.logprob - other.logprob) < LOGPROB_TOLERANCE


def test_questions_share_the_media_and_have_the_same_answers_as_alone(tmp_path):
    clip = example(video=write_video(tmp_path / "a.mp4"))
    prompts = ["Point to the red circle.", "What?", "How many blue squares are there in the video?"]
    together, = run((clip, prompts))
    for prompt, answer in zip(prompts, together):
        same(answer, run((clip, [prompt]))[0][0])
    assert [one.new_tokens for one in together] == [NEW] * 3 and len({one.text for one in together}) == 3


def test_a_batch_mixes_videos_images_and_text(tmp_path):
    examples = [example(video=write_video(tmp_path / "a.mp4"), clip=(0.0, 0.8)),
                example(images=(write_image(tmp_path / "a.png"),)),
                example(images=(write_image(tmp_path / "b.png", 1), write_image(tmp_path / "c.png", 2))),
                example()]
    answers = run(*((one, ["What is this?"]) for one in examples))
    for one, (answer,) in zip(examples, answers):
        same(answer, run((one, ["What is this?"]))[0][0])
    sizes = [answer.prompt_tokens for (answer,) in answers]
    assert len(set(sizes)) == 4 and min(sizes) == sizes[3]


def test_one_call_answers_one_prompt(tmp_path):
    path = write_image(tmp_path / "a.png")
    answer = generate.answer(params(), CONFIG, INPUTS, tokenizer(), "What?", images=(path,),
                             max_new_tokens=NEW)
    same(answer, run((example(images=(path,)), ["What?"]))[0][0])
    assert str(answer).startswith(answer.text)


def saying(monkeypatch, text):
    """Makes the model answer `text` to every question."""
    said = tokenizer().encode(text) + [tokenizer().eos_id]

    def generated(model, params, batch, questions, *, num_new, **_):
        shape = questions.last.shape
        tokens = np.broadcast_to(np.array(said, np.int32), (*shape, len(said)))
        return decode.Answers(tokens, np.full(shape, len(said)), np.ones(shape, bool), np.zeros(shape))

    monkeypatch.setattr(decode, "generate", generated)


def test_an_answer_ends_before_a_stop_string(tmp_path):
    clip = example(video=write_video(tmp_path / "a.mp4"))
    prompts = ["What?", "Where is it?"]
    free, other = run((clip, prompts))[0]
    stop = free.text[len(free.text) // 2:][:2]
    one = generate.Answerer(params(), CONFIG, INPUTS, tokenizer(), max_new_tokens=NEW, stop=(stop, "never"))
    answers = one.answer(clip, prompts)
    assert answers[0].text == free.text[:free.text.index(stop)] and answers[0].is_complete
    assert answers[0].new_tokens < free.new_tokens and not free.is_complete
    assert answers[1].text == other.text.split(stop)[0]
    pieces = list(one.stream(clip, prompts))
    assert ["".join(piece.text for piece in pieces if piece.question == q) for q in (0, 1)] == [
        answer.text for answer in answers]


def test_a_stream_gives_the_text_of_the_answers_in_pieces_and_compiles_nothing_new(tmp_path):
    clip = example(video=write_video(tmp_path / "a.mp4"))
    prompts = ["Point to the red circle.", "What?"]
    expected = answerer().answer(clip, prompts)
    before = decode.begin._cache_size(), decode.advance._cache_size()
    pieces = list(answerer().stream(clip, prompts, every=3))
    assert (decode.begin._cache_size(), decode.advance._cache_size()) == before
    for q, answer in enumerate(expected):
        mine = [piece for piece in pieces if piece.question == q]
        assert "".join(piece.text for piece in mine) == answer.text and len(mine) > 2
        assert [piece.answer for piece in mine[:-1]] == [None] * (len(mine) - 1)
        same(mine[-1].answer, answer)
    started = answerer().stream(clip, prompts)
    assert next(started).text == pieces[0].text
    started.close()
    with pytest.raises(ValueError, match="every must be >= 1"):
        answerer().stream(clip, prompts, every=0)


def test_points_are_in_pixels_and_seconds_of_the_source(tmp_path, monkeypatch):
    saying(monkeypatch, '<points coords="0.5 1 500 250;1.0 2 000 1000">dog</points>')
    answer = answerer().answer(example(video=write_video(tmp_path / "a.mp4")), ["Point."])[0]
    assert answer.points == ((0.5, "1", 32.0, 12.0), (1.0, "2", 0.0, 48.0)) and answer.tracks == ()
    assert answer.is_complete and "\n  1 at (32, 12), 0.5 s\n" in str(answer)
    saying(monkeypatch, '<points coords="1 1 500 500;2 2 100 100;3 3 100 100">dog</points>')
    two = (write_image(tmp_path / "a.png"), write_image(tmp_path / "b.png", size=(40, 20)))
    answer = answerer().answer(example(images=two), ["Point."])[0]
    assert answer.points == ((1, "1", 40.0, 25.0), (2, "2", 2.0, 4.0))  # there is no third image
    assert str(answer).endswith("\n  1 at (40, 25), image 1\n  2 at (2, 4), image 2")


def test_tracks_have_frames_of_the_source(tmp_path, monkeypatch):
    saying(monkeypatch, '<tracks coords="0.0 1 500 500;1.0 1 250 250 2 000 000">dog</tracks>')
    answer = answerer().answer(example(video=write_video(tmp_path / "a.mp4")), ["Track."])[0]
    assert [one.frame for one in answer.tracks] == [0, 6]
    assert answer.tracks[1].points == {"1": (16.0, 12.0), "2": (0.0, 0.0)}


def test_an_input_beyond_the_positions_is_refused_and_the_error_says_what_to_lower(tmp_path):
    long = generate.Answerer(params(), CONFIG, INPUTS, tokenizer(), max_new_tokens=590)
    with pytest.raises(ValueError, match=r"fit 600 positions; got \d+ tokens .*lower max_frames \(now 5"):
        long.prompt(example(video=write_video(tmp_path / "a.mp4")), ["What?"])
    with pytest.raises(ValueError, match=r"lower max_crops \(now 2 per image"):
        long.prompt(example(images=(write_image(tmp_path / "a.png"),)), ["What?"])
    with pytest.raises(ValueError, match="shorten the question"):
        answerer().prompt(example(), ["many words " * 300])
    short = generate.Question(turns=("What?",), max_new_tokens=5)
    assert long.prompt(example(images=(write_image(tmp_path / "a.png"),)), [short]).questions == (short,)


def test_unreadable_media_and_wrong_questions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        answerer().answer(example(video=str(tmp_path / "none.mp4")), ["What?"])
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.mp4"):
        answerer().answer(example(video=str(tmp_path / "empty.mp4")), ["What?"])
    with pytest.raises(ValueError, match="special tokens"):
        answerer().answer(example(), ["<im_patch>"])
    with pytest.raises(ValueError, match="at least one question"):
        answerer().answer(example(), [])
    with pytest.raises(ValueError, match="odd number of turns; got 2"):
        generate.Question(turns=("What?", "That."))


def test_clips_of_similar_size_share_one_compilation(tmp_path):
    one = answerer()
    for seed, frames in ((0, 10), (1, 11), (2, 12)):
        clip = example(video=write_video(tmp_path / f"{seed}.mp4", seed, frames))
        one.answer(clip, ["What?", "Where is it?"])
        if not seed:
            before = decode.begin._cache_size(), decode.advance._cache_size()
    assert (decode.begin._cache_size(), decode.advance._cache_size()) == before


def test_sizes_are_rounded_to_two_steps_per_octave():
    size = generate.coarse_size
    assert [size(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13)] == [0, 1, 2, 3, 4, 6, 6, 8, 12, 16]
    assert [size(n, 128) for n in (1, 128, 129, 193, 300, 700)] == [128, 128, 192, 256, 384, 768]


def test_a_hugging_face_folder_gives_the_same_answers(tmp_path):
    hf_checkpoint.export_checkpoint(params(), CONFIG, INPUTS, tokenizer(), tmp_path / "hf")
    loaded = generate.load(tmp_path / "hf", max_new_tokens=NEW)
    clip = example(video=write_video(tmp_path / "a.mp4"))
    same(loaded.answer(clip, ["What?", "Where is it?"])[0], run((clip, ["What?"]))[0][0])


def test_logits_that_are_not_finite_are_refused_with_the_weights_that_are_not():
    spoilt = jax.tree.map(np.array, params())
    spoilt["text"]["final_norm"]["scale"][0] = np.inf
    broken = generate.Answerer(spoilt, CONFIG, INPUTS, tokenizer(), max_new_tokens=NEW)
    for ask in (broken.answer, lambda *arguments: list(broken.stream(*arguments))):
        with pytest.raises(generate.NotFinite, match="so are the weights text/final_norm/scale$"):
            ask(example(), ["Where?"])
    assert not broken.run([broken.prompt(example(), ["Where?"])])[0][0].is_finite


def test_an_overflow_with_finite_weights_is_attributed_to_the_computation():
    spoilt = jax.tree.map(np.array, params())
    spoilt["text"]["final_norm"]["scale"][:] = 3e38
    broken = generate.Answerer(spoilt, CONFIG, INPUTS, tokenizer(), max_new_tokens=NEW)
    with pytest.raises(generate.NotFinite, match="all weights are finite: the computation in float32"):
        broken.answer(example(), ["Where?"])


@pytest.mark.slow(8)
def test_a_digest_of_the_weights_is_that_of_every_mesh_and_changes_with_a_single_value_or_place():
    own = answerer().fingerprint()
    split = generate.Answerer(params(), CONFIG, INPUTS, tokenizer(), max_new_tokens=3,
                              mesh=sharding.MeshConfig(data=1, fsdp=2, tensor=2))
    assert split.fingerprint() == own == answerer().limited(max_new_tokens=1).fingerprint()

    def changed(change):
        other = jax.tree.map(np.copy, params())
        change(other["text"]["layers"]["attn"]["o"]["kernel"])
        return generate.Answerer(other, CONFIG, INPUTS, tokenizer()).fingerprint()

    def exchange(kernel):
        kernel[..., [0, 1]] = kernel[..., [1, 0]]

    def last_bit(kernel):
        kernel.flat[7] = np.nextafter(kernel.flat[7], np.float32(9))

    config = dataclasses.replace(CONFIG, visual_attention="causal")
    assert len({own, changed(exchange), changed(last_bit),
                generate.Answerer(params(), config, INPUTS, tokenizer()).fingerprint()}) == 4


def test_other_limits_share_the_weights():
    other = answerer().limited(max_new_tokens=5, inputs=dataclasses.replace(INPUTS, max_frames=3),
                               sampling=decode.Sampling(temperature=0.7))
    assert other.params is answerer().params and answerer().max_new_tokens == NEW
    assert (other.max_new_tokens, other.inputs.max_frames, other.sampling.temperature) == (5, 3, 0.7)
    assert other.shapes == set() and other.shapes is not answerer().shapes
    with pytest.raises(ValueError, match="max_new_tokens must be >= 1; got 0"):
        answerer().limited(max_new_tokens=0)
