"""Worker processes: the bytes of one process, also where decoders crash."""

import collections
import json

import pytest

from benchmarks import prepare as benchmark
from data_pipelines.prepared import pipeline
from data_pipelines.prepared import running
from data_pipelines.schemas import published
from molmo2_jax.inputs import tokenizer as tokenizers
from tests.data_pipelines.prepared import test_conversion
from tests.data_pipelines.prepared import test_damage
from tests.data_pipelines.prepared import test_running

pytestmark = pytest.mark.slow(120)
WORKERS = (2, 4)


def several(number):
    return [f"--direct_num_workers={number}", "--direct_running_mode=multi_processing"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Worker processes import the package from here."""
    monkeypatch.setenv("PYTHONPATH", str(benchmark.ROOT))


def test_any_number_of_workers_writes_the_shards_of_one_although_decoders_crash(tmp_path, monkeypatch):
    folder = benchmark.draw(tmp_path / "world", 24)
    tokenizer = tokenizers.train_small((folder / "annotations.jsonl").read_text().splitlines(), 400)
    wanted, excluded = test_damage.damage(folder, tmp_path / "data")
    counters, write_shards = [], pipeline.write_shards
    monkeypatch.setattr(pipeline, "write_shards",
                        lambda *arguments: counters.append(write_shards(*arguments)) or counters[-1])

    def prepared(name, arguments=()):
        running.prepare(str(tmp_path / "data"), str(tmp_path / name), test_damage.checker(tokenizer),
                        name="world", media="copy", records_per_shard=40, max_frames=(8,), exclude=excluded,
                        command=test_damage.COMMAND, arguments=arguments)
        return test_running.contents(tmp_path / name)

    one = prepared("one")
    listed = [json.loads(line) for line in one["broken.jsonl"].splitlines()]
    assert {line["id"]: line["stage"] for line in listed} == wanted
    for number in WORKERS:
        assert prepared(f"of_{number}", several(number)) == one
    stages = collections.Counter(f"left_out_{stage}" for stage in wanted.values())
    assert counters == [{"kept": test_damage.NUM_INPUTS - len(wanted), **stages}] * (1 + len(WORKERS))


@pytest.mark.parametrize("schema, workers", [("pixmo_points", WORKERS), ("label", WORKERS[:1])])
def test_any_number_of_workers_writes_the_records_of_one(tmp_path, monkeypatch, schema, workers):
    monkeypatch.setattr(published, "PIECE_BYTES", 400)
    rows = [row | {"video_id": "v"} for row in test_conversion.point_rows()]
    paths = test_conversion.write(tmp_path, rows)
    (tmp_path / "out/media/v.mp4").write_bytes(b"x")
    running.convert(schema, paths, str(tmp_path / "out"), exclude={"13"})
    one = test_conversion.content(tmp_path / "out")
    assert one["annotations.jsonl"].count(b"\n") > 70
    for number in workers:
        running.convert(schema, paths, str(tmp_path / "out"), exclude={"13"}, arguments=several(number))
        assert test_conversion.content(tmp_path / "out") == one
