import dataclasses
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal

import grain
import numpy as np
import pytest

from data_pipelines import annotations
from data_pipelines import formats
from data_pipelines import pipeline
from data_pipelines import sources
from data_pipelines.stream import ledger
from data_pipelines.stream import preparation
from data_pipelines.stream import rows as stream_rows
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import tokenizer as tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_EXAMPLES = 20
MODEL = config.Molmo2Config(
    vision=config.VisionConfig(image_size=24, patch_size=4, width=16, num_layers=2, num_heads=1, head_dim=16,
                               mlp_width=16),
    connector=config.ConnectorConfig(taps=(1,), num_heads=1, head_dim=16, mlp_width=16),
    text=dataclasses.replace(config.nano().text, vocab_size=400))
INPUTS = config.InputConfig(max_crops=2, overlap_margins=(1, 1), max_frames=8)
SMALL = packers.OldestFirst(buffer=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    world = dataclasses.replace(world_config.quickstart_world(), frame_side=(32, 48))
    return world_write.write(tmp_path_factory.mktemp("world"), world, 0, NUM_EXAMPLES, "train",
                             progress=False).parent


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.train_small((folder / "annotations.jsonl").read_text().splitlines(), 400)


def data_config(folder, **fields):
    return pipeline.DataConfig(**{
        "train": (str(folder),), "seed": 5, "row_tokens": 1024, "row_crops": 24, "batch_rows": 2,
        "packer": packers.OldestFirst(buffer=6), "num_workers": 0, "prefetch": 0, "worker_prefetch": 2,
        **fields})


@pytest.fixture
def make(folder, tokenizer):
    """Returns a function that makes iterators of small batches; closes them after the test."""
    made = []

    def make_iterator(folder=folder, shard_index=0, shard_count=1, **fields):
        made.append(pipeline.make_iterator(data_config(folder, **fields), MODEL, INPUTS, tokenizer,
                                           shard_index=shard_index, shard_count=shard_count))
        return made[-1]
    yield make_iterator
    for iterator in made:
        iterator.close()


@pytest.fixture(scope="module")
def expected(folder, tokenizer):
    """(batch, state after it) of an uninterrupted run in one process without prefetching."""
    iterator = pipeline.make_iterator(data_config(folder), MODEL, INPUTS, tokenizer)
    return [(next(iterator), iterator.get_state()) for _ in range(12)]


def position(iterator, number=0):
    """Returns the position of a stream."""
    return json.loads(iterator.get_state()["positions"])[str(number)]


def assert_continues(iterator, expected):
    for batch, state in expected:
        np.testing.assert_equal(next(iterator), batch)
        assert iterator.get_state() == state


def copy_world(folder, target, change=lambda number, record: record):
    """Copies a data folder; `change` returns the new record or text of each line, or None to drop it."""
    shutil.copytree(folder, target)
    lines = []
    for number, line in enumerate((folder / "annotations.jsonl").read_text().splitlines()):
        changed = change(number, json.loads(line))
        lines += [] if changed is None else [changed if isinstance(changed, str) else json.dumps(changed)]
    (target / "annotations.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return target


# Batches


def test_batches_have_fixed_shapes_and_keep_every_invariant(expected):
    for batch, _ in expected:
        assert batch.tokens.shape == (2, 1024) and batch.pooled.shape == (2, 1024, 9)
        assert batch.patches.shape == (2, 24, 36, 48) and batch.patches.dtype == np.uint8
        rows_lib.check_invariants(batch)
        assert all((batch.weights[row] > 0).any() for row in range(2))


def test_counters_say_what_the_batches_hold(expected, make):
    iterator = make(prefetch=2)
    batches = [next(iterator) for _ in range(6)]
    counters = iterator.counters()
    assert counters["rows"] == 12
    assert counters["examples"] == sum(int(batch.example.max(axis=1).sum()) + 2 for batch in batches)
    assert counters["token_fill"] == pytest.approx(np.mean([batch.example >= 0 for batch in batches]))
    assert counters["visual_tokens"] == sum(int((batch.pooled >= 0).any(-1).sum()) for batch in batches)
    assert counters["crop_fill"] == pytest.approx(counters["crops"] / (12 * 24))
    assert 0 < counters["crop_fill"] <= 1 and counters["branches"] > counters["examples"]
    assert sum(counters["examples_by_task"].values()) == counters["examples"]
    assert counters["skipped"] == {} and counters["broken"] == {}


def test_rows_of_narrow_windows_and_few_visual_tokens_can_be_asked_for(make):
    batch = next(make(row_visual_tokens=200, window=12))
    assert batch.pooled.shape == (2, 200, 12)


# Order and resume


def test_an_iterator_restored_at_any_step_continues_alike(folder, tokenizer):
    dataset = pipeline.make_dataset(data_config(folder, prefetch=1), MODEL, INPUTS, tokenizer)
    grain.experimental.assert_equal_output_after_checkpoint(grain.experimental.LimitIterDataset(dataset, 5))


def test_states_have_constant_structure(expected):
    assert len({str([(name, type(value)) for name, value in state.items()]) for _, state in expected}) == 1


def test_hosts_share_the_stream_without_overlap(make):
    seen = []
    for shard in range(2):
        iterator = make(shard_index=shard, shard_count=2, packer=SMALL)
        for _ in range(4):
            next(iterator)
        state = position(iterator, shard)
        read = set(range(shard, state["next"], 2))
        assert iterator.counters()["examples"] == len(read - set(json.loads(state["waiting"])))
        seen.append(read)
    assert not seen[0] & seen[1]


def test_hosts_that_share_streams_make_the_same_global_batches(make):
    alone = make(streams=2)
    hosts = [make(streams=2, shard_index=shard, shard_count=2) for shard in range(2)]
    for _ in range(3):
        rows = rows_lib.stack([next(host) for host in hosts])
        np.testing.assert_equal(rows, next(alone))
    state = alone.get_state()
    alone.set_states([host.get_state() for host in hosts])  # of two hosts, to continue with one
    assert alone.get_state() == state
    again = [make(streams=2, shard_index=shard, shard_count=2) for shard in range(2)]
    for host in again:
        host.set_states([state])
    np.testing.assert_equal(rows_lib.stack([next(host) for host in again]), next(alone))


def test_a_failure_of_one_stream_leaves_all_where_they_were(folder, tmp_path, make):
    copied = copy_world(folder, tmp_path / "copy")
    iterator = make(copied, streams=2, packer=SMALL, max_broken=0)
    state, first = iterator.get_state(), next(iterator)
    assert first.tokens.shape[0] == 2
    iterator.set_state(state)
    run = iterator._host._streams[1]
    kept, shape = run._setting, run._setting.shape
    run._setting = dataclasses.replace(kept, shape=shape._replace(M=0))
    with pytest.raises(ValueError):
        next(iterator)
    assert iterator.get_state() == state
    run.close()
    run._setting = kept
    np.testing.assert_equal(next(iterator), first)


def test_a_position_of_other_data_is_refused(make, expected):
    with pytest.raises(ValueError, match="same data.*seed = 5 instead of 6"):
        make(seed=6).set_state(expected[0][1])
    with pytest.raises(ValueError, match=r"must hold streams \[0, 1\] of 2; got \(\[0\], 1\)"):
        make(streams=2).set_state(expected[0][1])
    with pytest.raises(ValueError, match=r"all streams of one run; got \(\[0\], \[2\]\)"):
        make().set_states([make(shard_count=2).get_state()])
    with pytest.raises(ValueError, match="must hold the positions"):
        make().set_state({"next": 3})


@pytest.mark.parametrize("fields, rule", [
    ({"streams": 3}, "divide the 2 rows"), ({"streams": 1, "shard_count": 2}, "multiple of the 2 hosts"),
    ({"batch_rows": 3, "shard_count": 2}, "multiple of the 2 streams"),
    ({"shard_index": 2, "shard_count": 2}, "shard_index")])
def test_streams_must_divide_what_they_share(make, fields, rule):
    with pytest.raises(ValueError, match=rule):
        make(**fields)


# Broken records


def truncate(path):
    path.write_bytes(path.read_bytes()[:300])


def test_broken_records_are_skipped_counted_and_logged_once(folder, tmp_path, make, caplog):
    broken = {}

    def change(number, record):
        if "video" in record and len(broken) < 4:
            kind = ("media", "size", "line", "unknown")[len(broken)]
            broken[kind] = number + 1
            return {"media": record, "size": record | {"size": [9, 9], "annotations": [
                        {"type": "points", "label": "dot", "points": [{"time": 0, "x": 1, "y": 1}]}]},
                    "line": "{", "unknown": record | {"colour": "red"}}[kind]
        return record

    copied = copy_world(folder, tmp_path / "copy", change)
    record = json.loads((folder / "annotations.jsonl").read_text().splitlines()[broken["media"] - 1])
    truncate(copied / record["video"])
    iterator = make(copied, packer=SMALL)
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            next(iterator)
    task, counters = str(copied), iterator.counters()
    epochs = position(iterator)["next"] / NUM_EXAMPLES
    assert epochs > 2
    assert counters["skipped"][task]["line"] == pytest.approx(2 * epochs, abs=2)
    assert counters["skipped"][task]["media"] == pytest.approx(epochs, abs=1)
    assert counters["skipped"][task]["annotation"] == pytest.approx(epochs, abs=1)
    listed = counters["broken"][task]
    assert set(listed) == {f"annotations.jsonl:{line}" for line in broken.values()}
    assert record["video"] in listed[f"annotations.jsonl:{broken['media']}"]
    assert "colour" in listed[f"annotations.jsonl:{broken['unknown']}"]
    messages = [one.getMessage() for one in caplog.records if one.name == ledger.__name__]
    assert len(messages) == 4
    state, following = iterator.get_state(), next(iterator)
    again = make(copied, packer=SMALL)
    again.set_state(state)
    assert again.counters() == counters
    np.testing.assert_equal(next(again), following)


def test_too_many_broken_records_end_the_run_with_their_list(folder, tmp_path, make):
    copied = copy_world(folder, tmp_path / "copy")
    videos = sorted((copied / "media").glob("*.mp4"))
    for path in videos[:3]:
        truncate(path)
    iterator = make(copied, max_broken=2, packer=SMALL)
    before = iterator.get_state()
    with pytest.raises(ValueError, match="max_broken = 2") as raised:
        for _ in range(50):
            before = iterator.get_state()
            next(iterator)
    assert all(path.name in str(raised.value) for path in videos[:3])
    assert iterator.get_state() == before


def test_lines_that_break_the_format_count_against_the_cap(folder, tmp_path, make):
    copied = copy_world(folder, tmp_path / "copy", lambda number, record: "{" if number < 3 else record)
    iterator = make(copied, max_broken=2, packer=SMALL)
    with pytest.raises(ValueError, match="max_broken = 2") as raised:
        for _ in range(50):
            next(iterator)
    assert all(f"annotations.jsonl:{line}: line: record: must be one JSON" in str(raised.value)
               for line in (1, 2, 3))


def test_a_position_of_version_0_1_continues_once_broken_lines_are_removed(folder, tmp_path, make, expected):
    """It had left them out, so its order is that of the good lines alone."""
    lines = (folder / "annotations.jsonl").read_text().splitlines()
    copied = copy_world(folder, tmp_path / "copy")
    (copied / "annotations.jsonl").write_text("\n".join(["{", *lines, "[]"]))
    with pytest.raises(ValueError, match=r"instead of '\[22\]'. If version 0.1 saved it: .* remove those"):
        make(copied).set_state(expected[0][1])
    (copied / "annotations.jsonl").write_text("\n".join(lines))
    iterator = make(copied)
    iterator.set_state(expected[0][1])
    np.testing.assert_equal(next(iterator), expected[1][0])


def test_what_workers_receive_does_not_grow_with_the_number_of_records(folder, tmp_path, tokenizer):
    lines = (folder / "annotations.jsonl").read_text().splitlines()
    copied = copy_world(folder, tmp_path / "copy")
    (copied / "annotations.jsonl").write_text("\n".join(lines * 100))
    few, many = (pipeline.make_dataset(data_config(one), MODEL, INPUTS, tokenizer).preparer
                 for one in (folder, copied))
    many(3)
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 200


def test_a_folder_whose_records_are_all_broken_is_refused_at_the_start(folder, tmp_path, make):
    copied = copy_world(folder, tmp_path / "copy", lambda number, record: "{")
    with pytest.raises(ValueError, match="must have a usable record; got none in .*copy; first error: "
                                         ".*annotations.jsonl:1: record: must be one JSON object"):
        make(copied)


def test_a_task_without_a_usable_record_ends_the_run(folder, tmp_path, make):
    def first_three(number, record):
        return record if "video" in record and number < 8 else None
    copied = copy_world(folder, tmp_path / "copy", first_three)
    for path in (copied / "media").iterdir():
        path.write_bytes(b"no media")
    with pytest.raises(ValueError, match="must have a usable record"):
        next(make(copied))


def test_empty_and_missing_folders_are_refused(tmp_path, make):
    with pytest.raises(ValueError, match="must hold annotations.jsonl"):
        make(tmp_path)
    (tmp_path / "annotations.jsonl").write_text("")
    with pytest.raises(ValueError, match="at least one record; got 0 bytes"):
        make(tmp_path)


def test_absent_folders_are_left_out_only_if_that_is_allowed(folder, tokenizer, tmp_path, caplog):
    absent = str(tmp_path / "absent")

    def sizes(**fields):
        data = data_config(folder, **fields)
        return pipeline.make_dataset(data, MODEL, INPUTS, tokenizer).new_ledger()._sizes

    with pytest.raises(ValueError, match="unless pipeline.DataConfig.allow_missing is True"):
        sizes(train=(str(folder), absent))
    with caplog.at_level(logging.WARNING):
        assert sizes(train=(str(folder), absent), allow_missing=True) == {str(folder): NUM_EXAMPLES}
    assert "without 1 absent data sets" in caplog.text and absent in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert sizes(allow_missing=True) == {str(folder): NUM_EXAMPLES} and not caplog.text
    with pytest.raises(ValueError, match="at least one folder with annotations.jsonl"):
        sizes(train=(absent,), allow_missing=True)
    with pytest.raises(ValueError, match="at least one folder"):  # in its second lesson
        sizes(train=((str(folder), (1.0, 0.0)), (absent, (1.0, 1.0))), lessons=(5,), allow_missing=True)


def test_an_example_too_large_for_a_row_is_skipped(make):
    iterator = make(row_crops=3, packer=SMALL)
    while position(iterator)["next"] < NUM_EXAMPLES:
        batch = next(iterator)
    counters = iterator.counters()
    [skipped], [broken] = counters["skipped"].values(), counters["broken"].values()
    assert skipped["size"] > 0 and batch.patches.shape[1] == 3
    assert all("must fit in a row of 3 crops" in text for text in broken.values())


# Processes


def worker_pids():
    return [child.pid for child in multiprocessing.active_children()]


@pytest.mark.slow(25)
def test_workers_change_nothing_and_one_that_is_killed_is_replaced(make, expected):
    iterator = make(num_workers=2, prefetch=1)
    iterator.set_state(json.loads(json.dumps(expected[1][1])))  # of a run without workers
    assert_continues(iterator, expected[2:4])
    first, second = worker_pids()
    os.kill(second, signal.SIGINT)  # Ctrl-C also reaches workers, and must not end them
    os.kill(first, signal.SIGKILL)
    assert_continues(iterator, expected[4:8])
    assert iterator.counters()["skipped"] == {} and first not in worker_pids()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeadlyPreparer(preparation.Preparer):
    """Dies of a segmentation fault at one example."""
    deadly: str

    def prepare(self, example, member, rng):
        if example.key == self.deadly:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().prepare(example, member, rng)


@pytest.mark.slow(20)
def test_a_record_that_kills_its_process_is_found_and_skipped(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(stream_rows, "_DEATHS", 1)
    dataset = pipeline.make_dataset(data_config(folder, num_workers=1), MODEL, INPUTS, tokenizer)
    _, index, _ = dataset.preparer.order(9)
    key = dataset.preparer.sources[0].key(index)
    fields = {field.name: getattr(dataset.preparer, field.name)
              for field in dataclasses.fields(dataset.preparer)}
    dataset.preparer = DeadlyPreparer(**fields, deadly=key)
    iterator = iter(dataset)
    try:
        while position(iterator)["next"] < 2 * NUM_EXAMPLES:
            next(iterator)
        [broken] = iterator.counters()["broken"].values()
        assert list(broken) == [key] and "kills the worker process" in broken[key]
        assert json.loads(position(iterator)["killers"]) == [[0, index]]
    finally:
        iterator.close()


# One example


def test_annotations_in_one_conversation_are_counted_one_by_one(tmp_path, make):
    chat = {"type": "qa", "question": "Sky?", "answer": "blue"}
    (tmp_path / "annotations.jsonl").write_text(json.dumps({"dialogue": 1, "annotations": [chat] * 3}) + "\n")
    iterator = make(tmp_path, is_pretraining=True)
    batch, counters = next(iterator), iterator.counters()
    assert counters["branches"] == 3 * counters["examples"] and counters["dropped_annotations"] == 0
    assert (batch.branch[batch.example >= 0] == -1).all()


def test_an_example_is_a_pure_function_of_index_and_epoch(folder, tokenizer):
    example = sources.examples(folder)[0]

    def tokens(epoch):
        return preparation.prepare(example, MODEL, INPUTS, tokenizer, preparation.generator(0, epoch)).tokens
    np.testing.assert_array_equal(tokens(1), tokens(1))
    assert len({tuple(tokens(epoch)) for epoch in range(8)}) > 1


def test_a_mixture_may_replace_loss_weights(folder, tokenizer):
    example = types.Example(annotations=(annotations.QA(question="Sky?", answer="blue"),))

    def weight_of(weight):
        rng = preparation.generator(0, 0)
        return preparation.prepare(example, MODEL, INPUTS, tokenizer, rng, weight=weight).weights.max()
    assert weight_of(types.LossWeight(scale=0.25, by_length=False, by_branches=False)) == 0.25
    assert weight_of(3.0) == pytest.approx(3 * weight_of(None), rel=1e-6)


def test_a_mixture_may_ask_for_numbers_in_place_of_points(folder, tokenizer):
    example = next(one for one in sources.examples(folder)
                   if {"points"} == {annotation.type for annotation in one.annotations[:2]})
    example = dataclasses.replace(example, annotations=example.annotations[:2])

    def learnt(**how):
        result = preparation.prepare(example, MODEL, INPUTS, tokenizer, preparation.generator(0, 0), **how)
        return [tokenizer.decode(result.targets[(result.branch == branch) & (result.weights > 0)])
                for branch in (0, 1)]
    assert any("<points" in answer for answer in learnt())
    numbers = [answer.removesuffix("<|im_end|>").strip() for answer in learnt(point_modes=("count",))]
    assert set(map(len, numbers)) == {1}


def test_constants_of_loss_weights_are_settings(folder, tokenizer):
    qa = annotations.QA(question="Sky?", answer="blue")

    def weights_of(asked, **constants):
        example = types.Example(annotations=asked)
        return preparation.prepare(example, MODEL, INPUTS, tokenizer, preparation.generator(0, 0),
                                   asking=formats.Asking(weights=formats.Weights(**constants))).weights.max()
    assert weights_of((qa,), length_factor=4.0) == pytest.approx(2 * weights_of((qa,)), rel=1e-6)
    assert weights_of((qa, qa), length_factor=4.0) == pytest.approx(2 * weights_of((qa, qa)), rel=1e-6)
    with pytest.raises(ValueError, match="length_factor > 0"):
        formats.Weights(length_factor=0.0)


def test_how_to_ask_is_what_the_settings_say():
    weights = formats.Weights(pointing=1.0)
    data = data_config("x", num_templates=2, is_pretraining=True, weights=weights)
    assert data.asking() == formats.Asking(num_templates=2, is_pretraining=True, weights=weights)
    assert data_config("x").asking() == formats.Asking()


@pytest.mark.parametrize("fields, rule", [
    ({"row_tokens": 0}, "row_tokens"), ({"num_workers": -1}, "num_workers"), ({"seed": -1}, "seed"),
    ({"row_visual_tokens": 5000}, "row_visual_tokens"), ({"train": "no_such"}, "train"),
    ({"window": 0}, "window"), ({"num_templates": 0}, "num_templates")])
def test_settings_that_make_no_sense_are_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        data_config("x", **fields)


def test_a_window_smaller_than_the_model_pools_is_refused(make):
    with pytest.raises(ValueError, match="window must hold.*9 patches"):
        make(window=4)


def test_a_mixture_without_its_folders_says_where_their_rows_are_published(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/ai2d: no rows are published: .*data/chart_qa: rows are publ"):
        make(train="sft")
