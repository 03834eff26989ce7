"""2,000 damaged annotation lines: each becomes an example that can be formatted, or an error with a place."""

import copy
import json
import pathlib
import re
import time

import numpy as np
import pytest

from data_pipelines import formats
from data_pipelines import sources
from molmo2_jax import types

NUMBER, SECONDS = 2000, 30  # of processor time; measured 3
DOCUMENT = pathlib.Path(__file__).parents[2] / "docs/data_format.md"
ODD = (0, 1, 2, 0.5, 1.0, "cup", "point_count", [0.5, 2.0], "left", None, True, -1, 10**30, 10**400, 1e308,
       -1e-300, float("nan"), float("inf"), "", " ", "x" * 70_000, "\ud800", "\x00", "<|im_end|>", "..", "/",
       "/dev/zero", [], {}, [[]], [0, 0], [1e9, -1e9], {"scale": 1}, ["a"] * 30)


RARE = {
    "video": "clips/0001.mp4", "tracking_fps": 2, "dialogue": 0.5, "subtitles": "They talk.", "annotations": [
        {"type": "points", "label": "cup", "mode": ["bare", "count"], "prompt": {"count": "How many?"},
         "points": []},
        {"type": "points", "label": "cup", "prompt": ["Cups?", "The cups"], "prompt_share": 0.5,
         "points": []},
        {"type": "choice", "question": "?", "options": ["A", "B"], "answer": 0, "labelled": False},
        {"type": "qa", "question": ["Who?", "Which?"], "answer": "Ann", "style": "video_short_answer"},
        {"type": "tracks", "label": "cup", "fps": 2,
         "tracks": [{"id": 1, "points": [{"time": 0.5, "x": 1, "y": 2}]}]}]}


def documented():
    """Returns the records of the documentation and RARE, which together use every field."""
    blocks = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return [*map(json.loads, blocks), RARE]


def places(value, path=()):
    """Returns the paths to all nested values."""
    found = [path] if path else []
    children = {list: enumerate, dict: dict.items}.get(type(value), lambda value: ())
    for key, child in children(value):
        found += places(child, (*path, key))
    return found


def mutate_value(rng, record):
    """Returns the line of the record with some values replaced, removed, repeated or renamed."""
    record = copy.deepcopy(record)
    for _ in range(int(rng.choice((1, 1, 1, 3)))):
        path = (found := places(record))[rng.integers(len(found))] if places(record) else None
        if path is None:
            break
        parent = record
        for key in path[:-1]:
            parent = parent[key]
        action = rng.integers(5)
        if action == 0:
            del parent[path[-1]]
        elif action == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif action == 2 and isinstance(parent, dict):
            parent[str(rng.choice(("video", "images", "clip", "type", "mode", "id", "time", "x", "zzz")))] = (
                parent.pop(path[-1]))
        else:
            parent[path[-1]] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    return json.dumps(record).encode()


def mutate_bytes(rng, record):
    """Returns the line with bytes changed, cut out, or nested too deeply."""
    line = bytearray(json.dumps(record, ensure_ascii=bool(rng.integers(2))).encode())
    action = rng.integers(4)
    if action == 0:
        for place in rng.integers(len(line), size=int(rng.integers(1, 6))):
            line[place] = rng.integers(256)
    elif action == 1:
        first, last = sorted(rng.integers(len(line), size=2))
        del line[first:last]
    elif action == 2:
        line = line[:rng.integers(len(line))]
    else:
        line = line.replace(b"[", b"[" * int(rng.choice((2, 500, 60_000))), 1)
    return bytes(line).replace(b"\n", b" ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the media that the documentation names; their contents are not read."""
    root = tmp_path_factory.mktemp("media")
    for record in documented():
        for name in [record[name] for name in ("video",) if name in record] + record.get("images", []):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"media")
    return root


def format_of(example, rng):
    """Returns the branches of an example whose media are 640 x 480 pixels and 3 seconds long."""
    size = getattr(example.annotations[0], "sizes", None) or ((640, 480),) * max(len(example.images), 1)
    media = types.Media(sizes=tuple(size) if example.images else ())
    if example.video:
        media = types.Media(sizes=((640, 480),), seconds=np.arange(7) / 2, duration=3.0, fps=30.0)
    return formats.to_branches(example, media=media, rng=rng, asking=formats.Asking())


def test_damaged_lines_are_examples_or_named_errors(folder):
    rng, records = np.random.default_rng(0), documented()
    lines = [(mutate_value if rng.random() < 0.6 else mutate_bytes)(rng, records[rng.integers(len(records))])
             for _ in range(NUMBER)]
    path = folder / "annotations.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    start = time.process_time()
    examples, errors = sources.read_folder(folder)
    formatted = refused = 0
    for example in examples:
        try:
            assert all(len(branch.turns) > 1 for branch in format_of(example, rng))
            formatted += 1
        except ValueError as error:
            assert example.key in str(error)
            refused += 1
    assert time.process_time() - start < SECONDS
    blank = sum(not line.strip() for line in lines)
    assert len(examples) + len(errors) == NUMBER - blank
    assert len(errors) > 1000 and formatted > 100
    for error in errors:
        assert re.match(rf"{re.escape(str(path))}:\d+: [\w\[\].]+: .+", str(error)) and len(str(error)) < 1000
