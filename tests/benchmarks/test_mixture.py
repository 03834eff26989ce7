import dataclasses

from benchmarks import mixture
from data_pipelines import sources


def test_drawn_sets_are_valid_seeded_and_of_distinct_records(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        mixture.draw(tmp_path / name, 70, seed=seed)
    texts = [(tmp_path / name / "annotations.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    examples, errors = sources.read_folder(tmp_path / "a")
    assert (len(examples), errors) == (70, []) and len(set(texts[0].splitlines())) == 70
    assert {len(example.annotations[0].points) for example in examples} == {mixture.POINTS}


def test_the_peer_and_both_kinds_of_source_hold_the_same_records(tmp_path):
    mixture.draw(tmp_path / "9", 9)
    assert mixture.draw_shards(tmp_path / "9") == mixture.place(tmp_path, "shards", 9)
    found = {kind: open_source(str(mixture.place(tmp_path, kind, 9)), name="a")
             for kind, open_source in mixture.KINDS.items()}
    examples = {kind: [source[index] for index in range(len(source))] for kind, source in found.items()}
    assert len(examples["lines"]) == 9 and examples["parsed"] == examples["lines"]
    assert [dataclasses.replace(one, key="") for one in examples["shards"]] == [
        dataclasses.replace(one, key="") for one in examples["lines"]]
    for kind, source in found.items():
        assert [source.key(index) for index in range(9)] == [one.key for one in examples[kind]]


def test_resident_memory_is_that_of_the_process():
    before = mixture.resident()
    held = bytes(64 * 2**20).replace(b"\0", b"x")
    assert 30 < mixture.resident() - before < 300 and len(held) == 64 * 2**20
    assert mixture.resident(2**30) == 0.0
