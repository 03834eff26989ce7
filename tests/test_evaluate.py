"""Evaluation: answers keep the order of the examples in any batches; unreadable examples are counted."""

import time

import numpy as np
import pytest

from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import types


class Echo:
    """Replaces an Answerer: repeats each question, and records the sizes and rows of its calls."""

    def __init__(self, not_finite=()):
        self.shapes, self.calls, self.draws, self.bad = set(), [], {}, not_finite

    def not_finite(self):
        return generate.NotFinite("logits must be finite")

    def see(self, example):
        if "broken" in example.key:
            raise ValueError(f"{example.video}: is empty")
        time.sleep(0.001 * (len(example.key) % 3))
        return None, types.Media(sizes=((int(example.source or 100), 10),))

    def ask(self, crops, media, questions, read_seconds):
        length, zeros = media.sizes[0][0], np.zeros(1, np.int32)
        tree = types.Sequence(np.zeros(length, np.int32), zeros, zeros, zeros, zeros, zeros,
                              np.zeros((2, 1, 1), np.uint8), np.zeros((4, 1), np.int32))
        shape = generate.PromptShape.of(tree, len(questions), 1)
        return generate.Prompt(tree, (0,) * len(questions), tuple(questions), media, shape, read_seconds)

    def run(self, prompts, shape, rows, draws):
        assert all(shape.covers(prompt.shape) for prompt in prompts) and len(prompts) <= rows
        self.shapes.add(shape)
        self.calls.append((shape, len(prompts)))
        for prompt, draw in zip(prompts, draws):
            self.draws[prompt.questions[0].turns[0]] = draw
        return [[generate.Answer(text=f"echo {question.turns[-1]}",
                                 logprob=float("nan") if question.turns[0] in self.bad else -1.0)
                 for question in prompt.questions] for prompt in prompts]


def examples(*sizes, broken=()):
    return [types.Example(annotations=(), key=f"line {n}" + " broken" * (n in broken), video=f"{n}.mp4",
                          source=str(size)) for n, size in enumerate(sizes)]


def ask(example, media):
    number = int(example.key.split()[1])
    return [generate.Question(turns=(f"{number}.{k}",), about=media.sizes[0][0]) for k in range(number % 4)]


def count(answered):
    right = [one.answer.text == f"echo {one.question.turns[0]}" for one in answered]
    return {"right": float(np.mean(right)), "examples": float(len(right))}


def test_every_question_is_answered_and_the_answers_keep_the_order_of_the_examples():
    echo, some = Echo(), examples(*[100, 900, 300] * 10)
    result = evaluate.evaluate(echo, some, ask, count, rows=4, window=8, title=None)
    expected = [f"{n}.{k}" for n in range(30) for k in range(n % 4)]
    assert [one.question.turns[0] for one in result.answered] == expected
    assert result.scores == {"right": 1.0, "examples": len(expected)}
    assert all(one.question.about == one.media.sizes[0][0] for one in result.answered)
    assert result.refused == ()


def test_sampling_does_not_depend_on_the_batches():
    draws = []
    for rows, window in ((1, 3), (4, 100)):
        echo = Echo()
        evaluate.evaluate(echo, examples(*[100, 900] * 8), ask, count, rows=rows, window=window, title=None)
        draws.append(echo.draws)
    assert draws[0] == draws[1] and len(set(draws[0].values())) == len(draws[0])


def test_broken_examples_are_counted_or_end_the_evaluation():
    some = examples(*[100] * 6, broken=(1, 3))
    result = evaluate.evaluate(Echo(), some, ask, count, title=None)
    assert result.refused == ("line 1 broken: 1.mp4: is empty", "line 3 broken: 3.mp4: is empty")
    assert [one.example.key for one in result.answered] == ["line 2"] * 2 + ["line 5"]
    with pytest.raises(ValueError, match="at most 1 examples may be refused; got line 1.*line 3"):
        evaluate.evaluate(Echo(), some, ask, count, max_refused=1, title=None)
    with pytest.raises(ValueError, match="no example could be answered: line 0 broken"):
        evaluate.evaluate(Echo(), examples(100, broken=(0,)), ask, count, title=None)


def test_examples_without_finite_logits_are_counted_and_not_scored():
    result = evaluate.evaluate(Echo(["2.1", "5.0"]), examples(*[100] * 8), ask, count, rows=4, title=None)
    assert result.refused == ("line 2: its logits are not finite", "line 5: its logits are not finite")
    assert result.not_finite == 2
    assert {one.example.key for one in result.answered} == {"line 1", "line 3", "line 6", "line 7"}


def test_weights_without_finite_logits_end_the_evaluation_at_the_first_batch():
    echo = Echo([f"{n}.{k}" for n in range(16) for k in range(4)])
    with pytest.raises(generate.NotFinite, match="logits must be finite"):
        evaluate.evaluate(echo, examples(*[100] * 16), ask, count, rows=4, title=None)
    assert len(echo.calls) == 1


def test_examples_that_are_done_are_neither_read_nor_asked_and_change_no_draw():
    def answers(done):
        echo = Echo()
        steps = list(evaluate.each(echo, examples(*[100, 900] * 8), ask, rows=4, window=8, title=None,
                                   done=done))
        return {index: [one.answer.text for one in found] for step in steps
                for index, found in step.answered.items()}, echo.draws

    whole, draws = answers(())
    part, again = answers({1, 2, 3, 9})
    assert set(part) == set(whole) - {1, 2, 3, 9} and all(whole[index] == found
                                                          for index, found in part.items())
    assert again == {question: draw for question, draw in draws.items() if question in again}
    assert not answers(range(16))[0]


def test_the_largest_examples_come_first_and_set_the_compiled_size():
    echo = Echo()
    evaluate.evaluate(echo, examples(*[300, 310, 1000, 320, 1100, 290] * 4), ask, count, rows=4, title=None)
    tokens = [shape.row.T for shape, _ in echo.calls]
    assert tokens == sorted(tokens, reverse=True)
    assert {shape.row.T for shape, _ in echo.calls} == {1536, 384}  # 384 is less than half of 1536


def test_a_compiled_size_is_reused_unless_it_wastes_too_much():
    def shape(T, M, R, Q):
        return generate.PromptShape(types.RowShape(T, M, R, 9), Q)

    big, small = shape(1024, 16, 256, 8), shape(512, 16, 128, 8)
    assert evaluate.choose_shape(shape(384, 12, 96, 4), {big, small}) == small
    assert evaluate.choose_shape(shape(768, 8, 128, 4), {big, small}) == big
    assert evaluate.choose_shape(shape(768, 24, 128, 4), {big, small}) == shape(768, 24, 128, 4)
    assert evaluate.choose_shape(shape(128, 4, 64, 2), {big}) == shape(128, 4, 64, 2)
    assert evaluate.choose_shape(big, set()) == big
