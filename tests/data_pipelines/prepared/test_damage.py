"""Inputs with every kind of damage, each of which must be named once, and decoders that crash."""

import collections
import hashlib
import json
import shutil
import sys

import pytest
from array_record.python import array_record_module

from benchmarks import prepare as benchmark
from data_pipelines import sources
from data_pipelines.prepared import making
from data_pipelines.prepared import running
from data_pipelines.prepared import writing
from data_pipelines.sources import shards
from data_pipelines.stream import ledger
from molmo2_jax.inputs import tokenizer as tokenizers
from tests.data_pipelines import test_pipeline

NUM_INPUTS = 300
EVERY = 3          # one input in so many is damaged
# A process that decodes as ours does, but dies of some images.
DEADLY = """
import os, sys
from data_pipelines.stream import child
from molmo2_jax.inputs import pixels
load = pixels.load
pixels.load = lambda path: os.abort() if "deadly" in str(path) else load(path)
child.main(int(sys.argv[1]))
"""
COMMAND = (sys.executable, "-c", DEADLY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return benchmark.draw(tmp_path_factory.mktemp("world"), 24)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.train_small((folder / "annotations.jsonl").read_text().splitlines(), 400)


def checker(tokenizer):
    return running.Checker(model=test_pipeline.MODEL, inputs=test_pipeline.INPUTS, tokenizer=tokenizer,
                           digest="")


def copied(folder, record, name, change):
    """Returns the record with its first medium replaced by a changed copy."""
    path = record["video"] if "video" in record else record["images"][0]
    target = f"media/{name}{path[path.rindex('.'):]}"
    (folder / target).write_bytes(change((folder / path).read_bytes()))
    return record | ({"video": target} if "video" in record else {"images": [target, *record["images"][1:]]})


def first(record, **fields):
    """Returns the record with fields of its first annotation replaced."""
    return record | {"annotations": [record["annotations"][0] | fields, *record["annotations"][1:]]}


PLACED = {"type": "points", "label": "mug", "points": [{"x": 4000, "y": 5}]}
CUT = lambda data: data[:len(data) // 2]
PAGE = lambda data: b"<html>"
TEXT = lambda data: b"words " * 99

# Of each kind: what it is applied to, the stage that names it, and (folder, record, name) -> the line.
DAMAGES = {
    "no JSON": ("any", ledger.LINE, lambda f, r, n: b'{"annotations": ['),
    "no UTF-8": ("any", ledger.LINE, lambda f, r, n: b'{"annotations": "\xff"}'),
    "two records in a line": ("any", ledger.LINE, lambda f, r, n: json.dumps(r) + json.dumps(r)),
    "an unknown field": ("any", ledger.LINE, lambda f, r, n: r | {"film": 1}),
    "no annotations": ("any", ledger.LINE, lambda f, r, n: r | {"annotations": []}),
    "a missing file": ("any", ledger.LINE, lambda f, r, n: {
        **r, **({"video": "media/none.mp4"} if "video" in r else {"images": ["media/none.png"]})}),
    "an empty file": ("any", ledger.LINE, lambda f, r, n: copied(f, r, n, lambda data: b"")),
    "a clip behind the end": ("video", ledger.MEDIA, lambda f, r, n: {
        "video": r["video"], "clip": [500, 501], "annotations": [
            {"type": "qa", "question": "What?", "answer": "That."}]}),
    "a film cut off": ("video", ledger.MEDIA, lambda f, r, n: copied(f, r, n, CUT)),
    "a film of text": ("video", ledger.MEDIA, lambda f, r, n: copied(f, r, n, TEXT)),
    "an image cut off": ("image", ledger.MEDIA, lambda f, r, n: copied(f, r, n, CUT)),
    "a page for an image": ("image", ledger.MEDIA, lambda f, r, n: copied(f, r, n, PAGE)),
    "a point outside": ("one image", ledger.ANNOTATION,
                        lambda f, r, n: {"images": r["images"], "annotations": [PLACED]}),
    "another size": ("one image", ledger.ANNOTATION, lambda f, r, n: {
        "images": r["images"], "size": [[8, 8]], "annotations": [PLACED | {"points": [{"x": 1, "y": 1}]}]}),
    "an excluded file": ("any", making.EXCLUDED, lambda f, r, n: copied(f, r, f"held_out_{n}", lambda d: d)),
    "a deadly file": ("image", ledger.WORKER, lambda f, r, n: copied(f, r, f"deadly_{n}", lambda d: d)),
}
MOST_DEADLY = 3    # each ends two processes, which take a second to start


def fits(record, kind):
    images = record.get("images", ())
    return {"any": True, "video": "video" in record, "image": bool(images),
            "one image": len(images) == 1}[kind]


def damage(folder, target, number_of=NUM_INPUTS):
    """Writes that many records, of which some are damaged; returns {id: stage} and the excluded names."""
    shutil.copytree(folder, target)
    given = [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]
    lines, wanted, excluded, used = [], {}, set(), collections.Counter()
    for number in range(number_of):
        record = given[number % len(given)]
        if number % EVERY:
            lines.append(json.dumps(record).encode())
            continue
        kind = min((kind for kind, (of, _, _) in DAMAGES.items() if fits(record, of)
                    and not (kind == "a deadly file" and used[kind] == MOST_DEADLY)), key=lambda k: used[k])
        used[kind] += 1
        _, stage, change = DAMAGES[kind]
        line = change(target, record, str(number))
        if kind == "an excluded file":
            excluded.add(f"held_out_{number}")
        line = json.dumps(line) if isinstance(line, dict) else line
        lines.append(line.encode() if isinstance(line, str) else line)
        wanted[f"annotations.jsonl:{number + 1}"] = stage
    (target / "annotations.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert set(used) == set(DAMAGES)
    return wanted, excluded


@pytest.mark.parametrize("media, number_of", [
    ("reference", NUM_INPUTS), pytest.param("copy", 1000, marks=pytest.mark.slow(40)),
    pytest.param("frames", NUM_INPUTS, marks=pytest.mark.slow(20))])
@pytest.mark.slow(9)
def test_each_damaged_input_is_named_once_with_its_stage_and_all_others_are_kept(
        folder, tokenizer, tmp_path, media, number_of):
    wanted, excluded = damage(folder, tmp_path / "data", number_of)
    how = {"max_side": 378, "quality": 95} if media == "frames" else {}
    manifest = running.prepare(
        str(tmp_path / "data"), str(tmp_path / "shards"), checker(tokenizer), name="world", media=media,
        records_per_shard=70, max_frames=(8,), exclude=excluded, command=COMMAND, **how)
    lines = (tmp_path / "shards/broken.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert {one["id"]: one["stage"] for one in listed} == wanted
    assert [one["id"] for one in listed] == sorted(wanted, key=lambda key: int(key.split(":")[1]))
    assert all(one["reason"] and one["source"] == "world" for one in listed)
    assert manifest["left_out"] == dict(collections.Counter(sorted(wanted.values())))
    assert manifest["count"] == number_of - len(wanted)
    source = sources.open_source(tmp_path / "shards")
    assert isinstance(source, shards.Shards) and len(source) == manifest["count"]
    assert not [one for one in sources.each(source) if isinstance(one, Exception)]


def test_a_shard_that_does_not_read_as_it_was_written_ends_the_run(tmp_path):
    path = tmp_path / "one"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"content")
    writer.close()
    writing._compare(path, 1, hashlib.sha256(b"content").digest())
    for count, content in ((2, b"content"), (1, b"another")):
        with pytest.raises(OSError, match=f"must read as it was written, {count} records; got 1"):
            writing._compare(path, count, hashlib.sha256(content).digest())
