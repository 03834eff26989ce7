"""Asks a model the questions of a benchmark, keeps every answer on disk, and goes on where it was stopped.

Independent of the command line: `run` needs an Answerer and the questions. Several processes call it
together; each reads the media of its own rows, process 0 reads and writes the file, and all return all
answers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from data_pipelines.suites import benchmark as benchmarks
from data_pipelines.suites import predictions
from molmo2_jax import config
from molmo2_jax import decode
from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import sharding
from molmo2_jax import types

MOST_IMAGES = 20     # of a question, in the published evaluation


class Outcome(NamedTuple):
    """Answers by id, and one sentence per question that has none. not_finite: how many of these were answered
    with logits that are NaN or infinite."""
    answers: dict[str, predictions.Prediction]
    left_out: list[str]
    not_finite: int = 0


def run(answerer: generate.Answerer, benchmark: benchmarks.Benchmark, items: Sequence[benchmarks.Item],
        store: predictions.Store | None = None, *, rows: int = 8, most_new_tokens: int | None = None,
        weights: str | None = None, title: str | None = None,
        watch: Callable[[types.Example], None] = lambda example: None) -> Outcome:
    """Returns the answers to all questions; those that `store` holds for the same settings and weights are
    not asked again, and new ones are appended to it.

    Args:
      rows: questions answered in one device call.
      most_new_tokens: limit on the length of an answer, besides the benchmark's.
      weights: digest of the weights, Answerer.fingerprint, if it is known.
      title: of the progress bar; None shows none.
      watch: called for each example as its media are read.

    Raises:
      generate.NotFinite: no answer of the first batch has finite logits.
      ValueError: the processes have different questions, as their files differ.
    """
    limited = limits(answerer, benchmark, most_new_tokens)
    weights = weights or answerer.fingerprint()
    settings = settings_of(limited)
    keys = [predictions.key_of(benchmark.name, item, settings, weights) for item in items]
    if jax.process_count() > 1 and len(set(map(tuple, sharding.of_processes(keys)))) > 1:
        raise ValueError("all processes must read the same questions; their files differ for "
                         f"{benchmark.name}")
    known = of_first(store.read() if store and not jax.process_index() else {})
    answers = {item.id: known[key] for item, key in zip(items, keys, strict=True) if key in known}
    done = {number for number, item in enumerate(items) if item.id in answers}
    if len(done) == len(items):
        return Outcome(answers, [])
    of_example = {id(item.example): item for item in items}

    def ask(example: types.Example, media: types.Media) -> list[generate.Question]:
        watch(example)
        return [generate.Question(turns=(of_example[id(example)].prompt,))]

    left_out, not_finite = [], 0
    for step in evaluate.each(limited, [item.example for item in items], ask, rows=rows, title=title,
                              done=done):
        made = [_prediction(benchmark, items[number], keys[number], one, len(step.answered))
                for number, [one] in step.answered.items()]
        if made and store and not jax.process_index():
            store.append(made)
        answers |= {one.id: one for one in made}
        left_out += step.refused
        not_finite += step.not_finite
    return Outcome(answers, left_out, not_finite)


def limits(answerer: generate.Answerer, benchmark: benchmarks.Benchmark, most_new_tokens: int | None = None,
           ) -> generate.Answerer:
    """Returns the answerer with a benchmark's settings: crops, length of answers, sampling."""
    inputs = dataclasses.replace(
        answerer.inputs, max_images=max(answerer.inputs.max_images, MOST_IMAGES),
        max_crops=answerer.inputs.high_res_crops if benchmark.is_high_res else answerer.inputs.max_crops)
    sampling = decode.Sampling(temperature=benchmark.temperature, top_p=benchmark.top_p,
                               seed=answerer.sampling.seed)
    return answerer.limited(max_new_tokens=min(benchmark.max_new_tokens, most_new_tokens or 1 << 30),
                            inputs=inputs, sampling=sampling if benchmark.temperature else decode.GREEDY)


def settings_of(answerer: generate.Answerer) -> dict[str, Any]:
    """Returns what an answer depends on besides question and weights."""
    inputs: config.InputConfig = answerer.inputs
    return {"inputs": dataclasses.asdict(inputs), "max_new_tokens": answerer.max_new_tokens,
            "sampling": dataclasses.asdict(answerer.sampling), "stop": list(answerer.stop)}


def _prediction(benchmark: benchmarks.Benchmark, item: benchmarks.Item, key: str, one: evaluate.Answered,
                batch: int) -> predictions.Prediction:
    seconds, media = one.answer.seconds, one.media
    return predictions.Prediction(
        benchmark=benchmark.name, id=item.id, key=key, prompt=item.prompt, answer=one.text,
        prompt_tokens=one.answer.prompt_tokens, new_tokens=one.answer.new_tokens,
        frames=len(media.seconds) if media.is_video else 0, is_complete=one.answer.is_complete,
        seconds=round(seconds.get("read", 0.0) + seconds.get("answer", 0.0) / max(batch, 1), 4))


def of_first(value: Any) -> Any:
    """Returns process 0's value in every process."""
    return sharding.of_processes(value)[0] if jax.process_count() > 1 else value
