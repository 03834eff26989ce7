"""The engine with a model that points by choosing visual tokens: answers and points are those of generate."""

import dataclasses
import functools
import threading
import time

import jax
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import generate
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax.serving import engine as engine_lib
from molmo2_jax.serving import tickets as tickets_lib
from tests import test_generate
from tests.model import test_pointer

CONFIG = dataclasses.replace(test_generate.CONFIG, pointer=config_lib.PointerConfig(width=16, theta=50.0))
NEW = 24
QUESTIONS = ("What?", "Point to the red circle.", "How many " + "blue " * 30 + "squares?")  # 1 to 3 chunks


@functools.lru_cache
def params_of():
    """Returns random weights that point often."""
    params = test_pointer.params_of(CONFIG)
    token = CONFIG.special_id("<|token_index|>") - CONFIG.text.vocab_size
    params["new_head"][:, token] *= 3
    params["pointer"]["no_more"] *= 0.1
    return params


def new_answerer(**options):
    return generate.Answerer(params_of(), CONFIG, test_generate.INPUTS, test_generate.tokenizer(),
                             max_new_tokens=NEW, **options)


answerer = functools.lru_cache(new_answerer)


def new_engine(answerer):
    made = engine_lib.Engine(answerer, num_rows=3, every=4, crops=(6,), queue=20)
    assert len([*made.compile()]) == made.num_programs
    return made


@pytest.fixture(scope="module")
def engine():
    made = new_engine(answerer())
    yield made
    made.close()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(crops, media) of nothing, a picture, two pictures and a video."""
    folder = tmp_path_factory.mktemp("media")
    image = lambda n: test_generate.write_image(folder / f"{n}.png", n)
    examples = [test_generate.example(), test_generate.example(images=(image(0),)),
                test_generate.example(images=(image(1), image(2))),
                test_generate.example(video=test_generate.write_video(folder / "a.mp4"))]
    return [answerer().see(one) for one in examples]


def expected(one, *turns):
    """Returns the answer of generate.Answerer, asked alone."""
    asked = answerer().ask(*one, [generate.Question(turns=turns)])
    return answerer().run([asked], test_generate.SHAPE, rows=1)[0][0]


def same(found, wanted):
    assert (found.text, found.new_tokens, found.prompt_tokens, found.points, found.tracks) == (
        wanted.text, wanted.new_tokens, wanted.prompt_tokens, wanted.points, wanted.tracks)
    assert abs(found.logprob - wanted.logprob) < test_generate.LOGPROB_TOLERANCE


def request(one, *turns, **fields):
    return tickets_lib.Request(turns=turns, crops=one[0], media=one[1], **fields)


def check_twelve_requests_for_three_rows(engine, seen):
    """Asks about text, pictures and a video at nearly the same time; most answers point."""
    pairs = [(one, question) for question in QUESTIONS for one in seen]
    keys, found = [None, "picture", "pictures", "video"] * len(QUESTIONS), {}

    def ask(number):
        time.sleep(0.01 * number)
        one, question = pairs[number]
        found[number] = engine.answer(request(one, question, key=keys[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.compilations == 0
    for number, (one, question) in enumerate(pairs):
        same(found[number], expected(one, question))
    pointed = [found[number].text.count("<|token_index:") for number in range(len(pairs))]
    assert sum(pointed) > 12 and not any(pointed[::4])   # text alone has nothing to point at


def test_answers_and_points_are_those_they_would_be_alone(engine, seen):
    check_twelve_requests_for_three_rows(engine, seen)


@pytest.mark.slow(20)
@pytest.mark.parametrize("sizes, unroll", [
    ({"data": 2}, True), ({"tensor": 2}, False), ({"data": 2, "tensor": 2}, True),
    ({"fsdp": 2, "context": 2}, False)])
def test_answers_and_points_on_a_mesh_are_those_on_one_device(sizes, unroll, seen):
    mesh = sharding.mesh_of_first(sharding.MeshConfig(**{"fsdp": 1} | sizes))
    spread = new_answerer(mesh=mesh)
    if not unroll:   # as on accelerators
        layouts = jax.tree.map(lambda leaf: leaf.sharding, state.abstract_params(spread.model, mesh))
        spread.params = decode.ready(params_of(), "float32", False, layouts)
    engine = new_engine(spread)
    said = engine.answer(request(seen[3], QUESTIONS[1])).text
    turns = (QUESTIONS[1], said, QUESTIONS[0])
    found = engine.answer(request(seen[3], *turns))
    check_twelve_requests_for_three_rows(engine, seen)
    engine.close()
    assert "<|vit_loc:" in said
    same(found, expected(seen[3], *turns))
    asked = [spread.ask(*seen[place], [generate.Question(turns=(QUESTIONS[1],))]) for place in (1, 3)]
    for place, [answer] in zip((1, 3), spread.run(asked, test_generate.SHAPE, rows=2)):
        same(answer, expected(seen[place], QUESTIONS[1]))


def test_the_pieces_of_a_stream_are_the_text(engine, seen):
    pieces = [*engine.stream(request(seen[3], QUESTIONS[1]))]
    same(pieces[-1].answer, expected(seen[3], QUESTIONS[1]))
    assert "".join(piece.text for piece in pieces) == pieces[-1].answer.text


@pytest.mark.parametrize("place", [1, 3])
def test_a_next_turn_sees_what_the_answer_before_chose(engine, seen, place):
    slots = enumerate((0, 2), 1)   # visual token 9 of the picture is at its right border
    pairs = "".join(f"<|token_index:9|><|vit_index:{slot}|><|vit_loc:4|>{n}" for n, slot in slots)
    said = f'<points coords="{pairs}<|token_index:end|>">red</points>'
    turns = (QUESTIONS[1], said, QUESTIONS[0])
    wanted = expected(seen[place], *turns)
    same(engine.answer(request(seen[place], *turns)), wanted)
    other = expected(seen[place], turns[0], said.replace("index:9", "index:10"), turns[2])
    assert abs(other.logprob - wanted.logprob) > 10 * test_generate.LOGPROB_TOLERANCE


@pytest.mark.parametrize("said, message", [
    ("<|token_index:100000|>", "one of .* visual tokens; got 100000"),
    ("<|token_index:9|><|vit_index:1|>", "visual token 9 pools none at slot 1"),
    ("<|vit_index:1|>", "must follow each other")])
def test_choices_that_do_not_exist_are_refused(engine, seen, said, message):
    with pytest.raises(ValueError, match=message):
        engine.answer(request(seen[1], "What?", said, "What?"))
    with pytest.raises(ValueError, match=message):
        expected(seen[1], "What?", said, "What?")


def test_choices_in_questions_stay_text(engine, seen):
    same_text = "Say <|token_index:100000|>"
    assert engine.answer(request(seen[1], same_text)).prompt_tokens > engine.answer(
        request(seen[1], "Say")).prompt_tokens + 10
