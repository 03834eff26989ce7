"""The engine: answers that do not depend on who else asks, rows that are left, roots that are used again."""

import functools
import queue
import threading
import time

import jax
import numpy as np
import pytest

from molmo2_jax import decode
from molmo2_jax import generate
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax.serving import engine as engine_lib
from molmo2_jax.serving import tickets as tickets_lib
from tests import test_generate

LOGPROB_TOLERANCE = test_generate.LOGPROB_TOLERANCE
NEW = test_generate.NEW
ROWS = 3


def new_engine(answerer, **options):
    """Returns a compiled engine of ROWS rows, with few buckets."""
    engine = engine_lib.Engine(answerer, **dict(num_rows=ROWS, every=4, crops=(6,)) | options)
    assert len([*engine.compile()]) == engine.num_programs
    return engine


@pytest.fixture(scope="module")
def engine():
    made = new_engine(test_generate.answerer(), queue=20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(example, crops, media) of nothing, a picture, two pictures and a video."""
    folder = tmp_path_factory.mktemp("media")
    examples = [test_generate.example(),
                test_generate.example(images=(test_generate.write_image(folder / "a.png"),)),
                test_generate.example(images=tuple(
                    test_generate.write_image(folder / f"{n}.png", n) for n in (1, 2))),
                test_generate.example(video=test_generate.write_video(folder / "a.mp4"))]
    return [(one, *test_generate.answerer().see(one)) for one in examples]


def request(seen, question, key=None, **fields):
    _, crops, media = seen
    return tickets_lib.Request(turns=(question,), crops=crops, media=media, key=key, **fields)


@functools.lru_cache
def expected(example, question, **options):
    """Returns the answer of generate.Answerer, asked alone."""
    answerer = test_generate.answerer()
    if options:
        answerer = generate.Answerer(test_generate.params(), answerer.config, answerer.inputs,
                                     answerer.tokenizer, max_new_tokens=NEW, **options)
    return answerer.run([answerer.prompt(example, [question])], test_generate.SHAPE, rows=4)[0][0]


def same(found, wanted):
    assert (found.text, found.new_tokens, found.prompt_tokens, found.is_complete) == (
        wanted.text, wanted.new_tokens, wanted.prompt_tokens, wanted.is_complete)
    assert abs(found.logprob - wanted.logprob) < LOGPROB_TOLERANCE


QUESTIONS = ("What?", "Point to the red circle.", "How many " + "blue " * 30 + "squares?")  # 1 to 3 chunks


@pytest.mark.slow(6)
def test_requests_that_come_and_go_get_the_answers_they_would_get_alone(engine, seen):
    """Twelve requests for three rows: text, pictures and a video, with longer and shorter answers."""
    pairs = [(one, question) for question in QUESTIONS for one in seen]
    keys = [None, "picture", "pictures", "video"] * len(QUESTIONS)
    found, before = {}, engine.compilations

    def ask(number):
        one, question = pairs[number]
        time.sleep(0.01 * number)
        limit = NEW if number % 2 else 5
        found[number] = engine.answer(request(one, question, keys[number], max_new_tokens=limit))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.compilations == before and engine.num_busy == engine.num_waiting == 0
    for number, (one, question) in enumerate(pairs):
        wanted = expected(one[0], question)
        if number % 2:
            same(found[number], wanted)
        else:
            assert wanted.text.startswith(found[number].text) and found[number].new_tokens == 5
            assert not found[number].is_complete


def test_a_second_question_about_the_same_media_computes_no_pixels_again(engine, seen, monkeypatch):
    calls = []
    see = engine._programs.see
    monkeypatch.setattr(engine._programs, "see", lambda batch: calls.append(batch) or see(batch))
    one = seen[3]
    tickets = []
    for question in ("What?", "Where?"):
        events = queue.SimpleQueue()
        tickets.append(engine.submit(request(one, question, key="again"), events.put))
        while not (event := events.get()).answer:
            pass
        same(event.answer, expected(one[0], question))
    assert len(calls) == 1
    root = 1 + len(one[1].tokens)
    assert [ticket.cached_tokens for ticket in tickets] == [0, root]
    assert tickets[1].image_tokens == len(one[1].pooled)
    alone = tickets_lib.Request(turns=("Where?",), key="again")   # the media stay where they are
    same(engine.answer(alone), expected(one[0], "Where?"))
    with pytest.raises(tickets_lib.NotSeen):
        engine.answer(tickets_lib.Request(turns=("Where?",), key="never seen"))


def test_a_next_turn_uses_the_root_of_the_first(engine, seen):
    one, turns = seen[1], ("What?", "That.", "Where?")
    crops, media = one[1:]
    engine.answer(request(one, "What?", key="turns"))
    found = engine.answer(tickets_lib.Request(turns=turns, crops=crops, media=media, key="turns"))
    [[wanted]] = test_generate.answerer().run(
        [test_generate.answerer().ask(crops, media, [generate.Question(turns=turns)])])
    same(found, wanted)


def test_a_client_that_hangs_up_frees_its_row_and_disturbs_nobody(engine, seen):
    before = engine.totals.cancelled
    streams = [engine.stream(request(seen[0], "What?", max_new_tokens=300)) for _ in range(ROWS)]
    firsts = [next(stream) for stream in streams]
    assert all(not first.answer for first in firsts) and engine.num_busy == ROWS
    for stream in streams:
        stream.close()
    same(engine.answer(request(seen[0], "What?")), expected(seen[0][0], "What?"))
    assert engine.totals.cancelled == before + ROWS and engine.num_busy == 0


def test_the_pieces_of_a_stream_are_the_text_and_end_before_a_stop_string(engine, seen):
    free = expected(seen[0][0], "What?")
    stop = free.text[len(free.text) // 2:][:2]
    wanted = expected(seen[0][0], "What?", stop=(stop,))
    pieces = [*engine.stream(request(seen[0], "What?", stop=(stop, "never")))]
    same(pieces[-1].answer, wanted)
    assert "".join(piece.text for piece in pieces) == wanted.text and wanted.is_complete


def test_sampling_is_that_of_generate_whatever_else_is_in_the_batch(engine, seen):
    how = decode.Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=3)
    greedy = engine.stream(request(seen[0], "Where?", max_new_tokens=300))
    next(greedy)
    found = engine.answer(request(seen[0], "What?", sampling=how))
    greedy.close()
    same(found, expected(seen[0][0], "What?", sampling=how))
    assert found.text != expected(seen[0][0], "What?").text


def test_what_cannot_wait_or_does_not_fit_is_refused(engine, seen):
    streams = [engine.stream(request(seen[0], "What?", max_new_tokens=400)) for _ in range(ROWS)]
    for stream in streams:
        next(stream)
    held = [engine.submit(request(seen[0], "What?"), lambda event: None) for _ in range(20)]
    with pytest.raises(tickets_lib.Full, match="at most 20 requests may wait"):
        engine.submit(request(seen[0], "What?"), print)
    for one in held:
        one.cancel()
    for stream in streams:
        stream.close()
    with pytest.raises(tickets_lib.TooLong, match="must fit 600 tokens; got 1 for the visual input and 2"):
        engine.answer(request(seen[0], "many words " * 300))
    with pytest.raises(tickets_lib.OutOfTime, match="within 0 seconds"):
        engine.answer(request(seen[0], "What?", seconds=0))
    with pytest.raises(ValueError, match="max_new_tokens must be >= 1; got 0"):
        engine.answer(request(seen[0], "What?", max_new_tokens=0))
    with pytest.raises(ValueError, match="odd number of turns; got 2"):
        engine.answer(tickets_lib.Request(turns=("What?", "That.")))
    found = engine.answer(request(seen[0], "What?", max_new_tokens=10**6))   # cut to what fits
    assert found.is_complete or found.prompt_tokens + found.new_tokens == 600


def test_logits_that_are_not_finite_fail_one_request(engine, seen, monkeypatch):
    advance = engine._programs.advance
    monkeypatch.setattr(engine._programs, "advance", lambda farthest: (
        news := advance(farthest))._replace(logprobs=np.full_like(news.logprobs, np.nan)))
    with pytest.raises(generate.NotFinite):
        engine.answer(request(seen[0], "What?"))
    monkeypatch.undo()
    same(engine.answer(request(seen[0], "What?")), expected(seen[0][0], "What?"))


def test_a_device_that_fails_is_told_to_everybody_and_nothing_more_is_taken(seen, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = new_engine(test_generate.answerer())

    def broken(farthest):
        raise RuntimeError("the device is gone")

    engine._programs.advance = broken
    with pytest.raises(RuntimeError, match="the engine failed: the device is gone"):
        engine.answer(request(seen[0], "What?"))
    with pytest.raises(tickets_lib.Closed):
        engine.submit(request(seen[0], "What?"), print)
    engine.close()


def test_closing_answers_those_who_wait(seen):
    engine = new_engine(test_generate.answerer())
    events = queue.SimpleQueue()
    for _ in range(ROWS + 1):
        engine.submit(request(seen[0], "What?"), events.put)
    engine.close(60)
    answers = []
    while not events.empty():
        event = events.get()
        answers += [event.answer] if event.answer else []
    assert len(answers) == ROWS + 1
    with pytest.raises(tickets_lib.Closed):
        engine.submit(request(seen[0], "What?"), print)


@pytest.mark.slow(40)
@pytest.mark.parametrize("sizes, unroll", [
    ({}, False), ({"data": 2, "tensor": 2}, True), ({"fsdp": 2, "tensor": 2, "context": 2}, False)])
def test_answers_on_a_mesh_are_those_on_one_device(sizes, unroll, seen):
    one = test_generate.answerer()
    mesh = sharding.mesh_of_first(sharding.MeshConfig(**{"fsdp": 1} | sizes))
    answerer = generate.Answerer(test_generate.params(), one.config, one.inputs, one.tokenizer,
                                 max_new_tokens=NEW, mesh=mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, answerer.params) if sizes else None
    if not unroll:
        shardings = jax.tree.map(lambda leaf: leaf.sharding,
                                 state.abstract_params(answerer.model, mesh)) if sizes else None
        answerer.params = decode.ready(test_generate.params(), "float32", False, shardings)
    engine = new_engine(answerer)
    found = [engine.answer(request(one, question, key=key)) for one, key in ((seen[0], None), (seen[3], "a"))
             for question in QUESTIONS[:2]]
    assert engine.compilations == 0
    engine.close()
    wanted = [expected(one[0], question) for one in (seen[0], seen[3]) for question in QUESTIONS[:2]]
    for pair in zip(found, wanted):
        same(*pair)
