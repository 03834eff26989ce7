"""Files of rows as data sets are published are read row by row, media in them become files."""

import hashlib
import json
import subprocess
import sys

import pytest

from data_pipelines import published
from data_pipelines import schemas
from data_pipelines import sources

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def write_charts(path, number=40):
    """Writes rows as ChartQA has them, images inside, several groups of rows."""
    rows = [{"image": {"bytes": b"picture %d" % (row % 3), "path": "a.png"}, "query": f"Max {row}?",
             "label": [str(row)], "human_or_machine": row % 2} for row in range(number)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=8)


def test_rows_of_parquet_files_become_records_and_their_images_files(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet"):
        write_charts(tmp_path / name)
    rows = published.rows([tmp_path / "train-*.parquet"], tmp_path)
    number, errors = schemas.convert("chart_qa", rows, tmp_path)
    examples = sources.read_jsonl(tmp_path / "annotations.jsonl")
    assert (number, len(examples), errors) == (80, 80, [])
    assert examples[7].annotations[0]["question"] == "Max 7?"
    contents = sorted(path.read_bytes() for path in (tmp_path / "media").iterdir())
    assert contents == [b"picture 0", b"picture 1", b"picture 2"]
    assert all(path.suffix == ".png" for path in (tmp_path / "media").iterdir())


def test_lists_of_images_become_files(tmp_path):
    row = {"images": [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}], "mc_question": "?"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    [found] = published.rows([tmp_path / "a.parquet"], tmp_path)
    assert [(tmp_path / name).read_bytes() for name in found["images"]] == [b"x", b"y"]


def test_what_cannot_be_read_is_an_error_in_its_place(tmp_path):
    write_charts(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n{\n\n[2]\n{"a": 3}\n')
    (tmp_path / "d.csv").write_text("a,b\n1,2\n3\n4,5,6\n")
    (tmp_path / "e.tsv").write_text("a\tb\n1, 2\t3\n")
    (tmp_path / "f.json").write_text(json.dumps({"database": {"v": {"x": 1}, "w": 2}}))
    (tmp_path / "g.json").write_text("[1")
    found = list(published.rows([tmp_path / "[b-g].*"], tmp_path))
    assert [row for row in found if isinstance(row, dict)] == [
        {"a": 1}, {"a": 3}, {"a": "1", "b": "2"}, {"a": "1, 2", "b": "3"}, {"id": "v", "x": 1}]
    told = [str(row) for row in found if isinstance(row, ValueError)]
    parts = ("b.parquet: cannot be read to its end", "c.jsonl:2: must be JSON",
             "c.jsonl:4: must be an object; got [2]", "d.csv: row 3 must", "d.csv: row 4 must",
             "f.json: entry 1 must be an object", "g.json: must be JSON")
    for message, part in zip(told, parts, strict=True):
        assert part in message


def test_names_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must lie in files that exist; found none"):
        published.rows([tmp_path / "*.parquet"], tmp_path)  # before any row is asked for
    (tmp_path / "a.xml").touch()
    with pytest.raises(ValueError, match=r"must lie in files .parquet, .jsonl.*; got '.xml'"):
        published.rows([tmp_path / "a.xml"], tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    write_charts(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"need pyarrow: pip install -e '.\[prepare\]'"):
        next(published.rows([tmp_path / "a.parquet"], tmp_path))


def test_media_of_evaluations_are_left_out_and_counted(tmp_path):
    write_charts(tmp_path / "a.parquet", number=6)
    rows = published.rows([tmp_path / "a.parquet"], tmp_path)
    held_out = hashlib.sha256(b"picture 1").hexdigest()
    number, errors = schemas.convert("chart_qa", rows, tmp_path, {held_out, "another"})
    kept = sources.read_jsonl(tmp_path / "annotations.jsonl")
    assert number == len(kept) == 4 and not [example for example in kept if held_out in example.images[0]]
    assert [type(error) for error in errors] == [schemas.Excluded] * 2
    assert str(errors[0]) == f"media/{held_out}.png: is on the list of media to leave out"


def test_a_task_is_prepared_at_the_command_line(tmp_path):
    write_charts(tmp_path / "a.parquet")
    (tmp_path / "held_out.txt").write_text(f"{hashlib.sha256(b'picture 2').hexdigest()}.png\n\nother\n")
    (tmp_path / "b.jsonl").write_text('{"query": "?"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "launch.prepare", "--task=chart_qa", f"--published={tmp_path}/a.parquet",
         f"--published={tmp_path}/b.jsonl", f"--exclude={tmp_path}/held_out.txt",
         f"--output={tmp_path}/charts"],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "27 records; left out: 14 rows, records or annotations, 13 of them by --exclude" in done.stdout
    assert "must have the column" in (tmp_path / "charts/left_out.txt").read_text()
    assert len(sources.read_jsonl(tmp_path / "charts/annotations.jsonl")) == 27
