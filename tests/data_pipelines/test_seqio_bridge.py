"""seqio yields the examples that training reads. Needs the extra: pip install -e ".[test,seqio]" """

import dataclasses
import json

import numpy as np
import pytest

from data_pipelines import sources
from data_pipelines import tasks
from data_pipelines.scoring import suite
from data_pipelines.stream import preparation
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import tokenizer as tokenizers

seqio = pytest.importorskip("seqio", reason='the extra is missing: pip install -e ".[test,seqio]" (2.3 GB)')

MODEL, INPUTS = config.nano(), config.InputConfig()
WEIGHT = 0.25
SIZES = {"first": 5, "second": 9}


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """(name in seqio, tokenizer, mixture, {task: examples}) of a mixture of two small text sets."""
    from data_pipelines import seqio_bridge
    root, folders = tmp_path_factory.mktemp("sets"), {}
    for name, size in SIZES.items():
        (root / name).mkdir()
        lines = [json.dumps({"annotations": [{"type": "qa", "question": f"{name} {number}?", "answer": "yes"},
                                             {"type": "qa", "question": "And?", "answer": "no"}]})
                 for number in range(size)]
        (root / name / "annotations.jsonl").write_text("\n".join(lines) + "\n")
        folders[name] = tasks.Task(folder=str(root / name))
    mixture = (tasks.Group(rate=3.0, members=(tasks.Member(task="first", weight=WEIGHT),)),
               tasks.Group(rate=1.0, members=(tasks.Member(task="second"),)))
    tokenizer = tokenizers.train_small(["first second yes no And?"] * 4, 512)
    name = seqio_bridge.register("pair", model=MODEL, inputs=INPUTS, tokenizer=tokenizer,
                                 mixtures={"pair": mixture}, tasks=folders)
    examples = {task: sources.examples(root / task) for task in SIZES}
    return name, tokenizer, mixture, examples


def read(task, **how):
    found = task.get_dataset(sequence_length=None, split="train", shuffle=False, **how)
    return list(found.as_numpy_iterator())


def test_a_task_yields_the_examples_of_training(registered):
    name, tokenizer, _, examples = registered
    for task, weight in (("first", WEIGHT), ("second", None)):
        found = read(seqio.get_mixture_or_task(f"{name}_{task}"))
        assert len(found) == SIZES[task]
        for index, (one, example) in enumerate(zip(found, examples[task], strict=True)):
            wanted = preparation.prepare(example, MODEL, INPUTS, tokenizer, preparation.generator(index, 0),
                                         weight=weight)
            for field in (name for name in preparation.FIELDS if name != "choice"):
                np.testing.assert_array_equal(one[field], getattr(wanted, field))
                assert one[field].dtype == getattr(wanted, field).dtype


def test_shards_split_the_examples_as_hosts_split_the_stream(registered):
    task = seqio.get_mixture_or_task(f"{registered[0]}_second")
    whole = [one["tokens"].tolist() for one in read(task)]
    for shard in range(2):
        found = read(task, shard_info=seqio.ShardInfo(shard, 2))
        assert [one["tokens"].tolist() for one in found] == whole[shard::2]


def test_a_mixture_has_our_rates(registered):
    name, _, mixture, examples = registered
    found = seqio.get_mixture_or_task(name)
    rates = tasks.rates(mixture, {task: len(some) for task, some in examples.items()})
    for task, rate in rates.items():
        assert found.get_rate(seqio.get_mixture_or_task(f"{name}_{task}")) == pytest.approx(rate)


def test_the_vocabulary_encodes_and_decodes_as_our_tokenizer(registered):
    name, tokenizer, _, _ = registered
    vocabulary = seqio.get_mixture_or_task(name).output_features["tokens"].vocabulary
    assert vocabulary.encode("first yes") == tokenizer.encode("first yes")
    assert vocabulary.decode(tokenizer.encode("no second")) == "no second"
    assert vocabulary.encode_tf("And? ä").numpy().tolist() == tokenizer.encode("And? ä")
    assert (vocabulary.eos_id, vocabulary.vocab_size) == (
        tokenizer.eos_id, tokenizer.vocab_size + len(config.SPECIAL_TOKENS))


def test_metrics_are_ours(registered):
    name, _, _, examples = registered
    [metric] = seqio.get_mixture_or_task(f"{name}_first").metric_fns
    asked = [suite.Answered(annotation=annotation, answer="", media=types.Media())
             for annotation in examples["first"][0].annotations]
    answered = [dataclasses.replace(one, answer="yes") for one in asked]
    assert metric(asked, ["yes", "yes"]) == suite.score(answered) != {}
