"""Published files are read row by row; media inside rows become files."""

import dataclasses
import functools
import hashlib
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from data_pipelines import records
from data_pipelines import schemas
from data_pipelines import sources
from data_pipelines.prepared import conversion
from data_pipelines.schemas import published
from launch import prepare
from tests.data_pipelines.schemas import converted
from tests.launch import commands

flags_as_before = commands.flags_as_before
start = functools.partial(commands.start, prepare.main)


def write_charts(path, number=40):
    """Writes rows in ChartQA's format, with embedded images, in several row groups."""
    rows = [{"image": {"bytes": b"picture %d" % (row % 3), "path": "a.png"}, "query": f"Max {row}?",
             "label": [str(row)], "human_or_machine": row % 2} for row in range(number)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=8)


def test_rows_of_parquet_files_become_records_and_their_images_files(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet"):
        write_charts(tmp_path / name)
    rows = published.rows([tmp_path / "train-*.parquet"], tmp_path)
    number, errors = converted.convert("chart_qa", rows, tmp_path)
    examples = sources.examples(tmp_path)
    assert (number, len(examples), errors) == (80, 80, [])
    assert examples[7].annotations[0].question == "Max 7?"
    contents = sorted(path.read_bytes() for path in (tmp_path / "media").iterdir())
    assert contents == [b"picture 0", b"picture 1", b"picture 2"]
    assert all(path.suffix == ".png" for path in (tmp_path / "media").iterdir())


def test_lists_of_images_become_files(tmp_path):
    row = {"images": [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}], "mc_question": "?"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    [found] = published.rows([tmp_path / "a.parquet"], tmp_path)
    assert [(tmp_path / name).read_bytes() for name in found["images"]] == [b"x", b"y"]


def test_unreadable_rows_are_errors_in_their_place(tmp_path):
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
    with pytest.raises(ValueError, match="must be in files that exist; found none"):
        published.rows([tmp_path / "*.parquet"], tmp_path)  # before any row is asked for
    (tmp_path / "a.xml").touch()
    with pytest.raises(ValueError, match=r"must be in files .parquet, .jsonl.*; got '.xml'"):
        published.rows([tmp_path / "a.xml"], tmp_path)


def test_tables_without_names_of_columns_and_lists_below_a_key_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('v,[0:2],b,c,d,Who?,a,17\nw,[0:2],b\n')
    columns = schemas.SCHEMAS["how2qa"].columns
    row, error = published.rows([tmp_path / "a.csv"], tmp_path, columns)
    assert list(row) == list(columns) and (row["span"], row["answer"]) == ("[0:2]", "a")
    assert "row 2 must have the columns" in str(error)
    (tmp_path / "b.jsonl").write_text('["vid_filename", "answer"]\n["v.mp4", 2]\n["v.mp4"]\n')
    row, error = published.rows([tmp_path / "b.jsonl"], tmp_path)
    assert row == {"vid_filename": "v.mp4", "answer": 2} and "b.jsonl:3: must be an object" in str(error)
    (tmp_path / "c.json").write_text(json.dumps({"info": {}, "data": [{"video": "v"}]}))
    (tmp_path / "d.json").write_text(json.dumps({"annotations": [{"video_name": "v"}], "dataset": "x"}))
    (tmp_path / "e.txt").write_text("v 0.5 2.0##a person.\n\n")
    assert list(published.rows([tmp_path / "[c-e].*"], tmp_path)) == [
        {"video": "v"}, {"video_name": "v"}, {"line": "v 0.5 2.0##a person."}]


def test_a_task_without_files_of_rows_says_where_they_are_published(capsys):
    for task, part in (("chart_qa", "of chart_qa rows are published at huggingface.co/datasets/"),
                       ("ai2d", "of ai2d no rows are published: build image"),
                       ("kinetics_qa", "of kinetics_qa no rows are published: join the video lists")):
        assert start(f"--task={task}") == 2
        assert part in capsys.readouterr().err


TABLE = "gif_name\tquestion\tanswer\na\tWho sits in the café?\tthe naïve man\n"


@pytest.mark.parametrize("name, text", [
    ("a.tsv", TABLE), ("a.csv", TABLE.replace("\t", ",")), ("quoted.csv", '"gif_name",b\r\n"a",é\r\n'),
    ("a.json", '[{"gif_name": "é"}]'), ("a.jsonl", '{"gif_name": "é"}\n{"gif_name": "b"}\n')])
def test_a_byte_order_mark_changes_no_row(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8"))
    plain = list(published.rows([tmp_path / name], tmp_path))
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert list(published.rows([tmp_path / name], tmp_path)) == plain
    assert all("gif_name" in row for row in plain)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_wide_encodings_are_refused_before_the_first_row(tmp_path, suffix, encoding):
    (tmp_path / f"a.{suffix}").write_bytes('{"gif_name": "x"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=rf"a\.{suffix}: text must be UTF-8.*iconv -f UTF-"):
        published.rows([tmp_path / f"a.{suffix}"], tmp_path)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_a_table_of_another_encoding_is_refused_before_the_first_row(tmp_path, name):
    (tmp_path / name).write_bytes(TABLE.encode("cp1252"))
    with pytest.raises(ValueError, match=r"byte 0xe9 at offset \d+, line 2, perhaps Windows code page 1252"):
        published.rows([tmp_path / name], tmp_path)


def test_lines_of_another_encoding_are_errors_in_their_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a": "x"}\n{"a": "é"}\n{"a": "y"}\n'.encode("cp1252"))
    first, second, third = published.rows([tmp_path / "a.jsonl"], tmp_path)
    assert (first, third) == ({"a": "x"}, {"a": "y"})
    assert "a.jsonl:2: must be JSON" in str(second) and "must be UTF-8; got byte 0xe9" in str(second)


@pytest.mark.parametrize("suffix", ["parquet", "tsv", "csv", "json", "jsonl"])
def test_pointers_and_html_pages_in_place_of_rows_are_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 11\n")
    with pytest.raises(ValueError, match=rf"a\.{suffix} is a Git LFS pointer"):
        published.rows([path], tmp_path)
    path.write_text("<!DOCTYPE html><p>404")
    with pytest.raises(ValueError, match=rf"a\.{suffix} is a page of HTML"):
        published.rows([path], tmp_path)


def test_reading_parquet_without_pyarrow_names_the_package_to_install(tmp_path, monkeypatch):
    write_charts(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"parquet files need pyarrow: pip install -e '.\[prepare\]'"):
        next(published.rows([tmp_path / "a.parquet"], tmp_path))


def test_media_of_evaluations_are_excluded_and_counted(tmp_path):
    write_charts(tmp_path / "a.parquet", number=6)
    held_out = hashlib.sha256(b"picture 1").hexdigest()
    rows = published.rows([tmp_path / "a.parquet"], tmp_path)
    number, errors = converted.convert("chart_qa", rows, tmp_path, {held_out, "another"})
    kept = sources.examples(tmp_path)
    assert number == len(kept) == 4 and not [example for example in kept if held_out in example.images[0]]
    assert errors == [f"media/{held_out}.png: is on the list of media to leave out"] * 2


def test_all_matching_names_of_a_record_count_as_matched(capsys):
    record = {"images": ["media/a.png", "media/b.png"]}
    assert records.listed(record, {"a", "b.png", "c"}) == {
        "media/a.png": {"a"}, "media/b.png": {"b.png"}}
    summary = conversion.Summary(records=2, left_out=1, excluded=1, reasons=("why",),
                                 unmatched=frozenset("cdef"))
    prepare._show("folder/annotations.jsonl", summary, 6)
    assert capsys.readouterr().out == (
        "folder/annotations.jsonl: 2 records; left out: 1 rows, records or annotations, 1 of them by "
        "--exclude\n  why\n--exclude: 4 of 6 names match no medium of these rows: 'c', 'd', 'e', ...\n")
    prepare._show("a", dataclasses.replace(summary, unmatched=frozenset()), 2)
    assert "match no medium" not in capsys.readouterr().out


@pytest.mark.parametrize("encoding, end", [("utf-8", "\n"), ("utf-8-sig", "\n"), ("utf-8-sig", "\r\n")])
def test_exclusion_lists_may_have_byte_order_marks(tmp_path, encoding, end):
    for name in "ab":
        (tmp_path / name).write_bytes(end.join([f"{name}.gif", f"  {name}é.gif ", ""]).encode(encoding))
    (tmp_path / "both").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    wanted = {"a.gif", "aé.gif", "b.gif", "bé.gif"}
    assert prepare._names([tmp_path / "a", tmp_path / "b"]) == prepare._names([tmp_path / "both"]) == wanted


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_exclusion_lists_in_other_encodings_are_refused(tmp_path, encoding):
    (tmp_path / "list").write_bytes("a.gif\né.gif\n".encode(encoding))
    with pytest.raises(ValueError, match="list: text must be UTF-8; got .* at offset"):
        prepare._names([tmp_path / "list"])


def test_the_command_prepares_a_task(tmp_path, capsys):
    write_charts(tmp_path / "a.parquet")
    (tmp_path / "held_out.txt").write_text(f"{hashlib.sha256(b'picture 2').hexdigest()}.png\n\nother\n")
    (tmp_path / "b.jsonl").write_text('{"query": "?"}\n')
    assert start("--task=chart_qa", f"--published={tmp_path}/a.parquet", f"--published={tmp_path}/b.jsonl",
                 f"--exclude={tmp_path}/held_out.txt", f"--output={tmp_path}/charts") == 0
    told = capsys.readouterr().out
    assert "27 records; left out: 14 rows, records or annotations, 13 of them by --exclude" in told
    assert "--exclude: 1 of 2 names match no medium of these rows: 'other'\n" in told
    assert "must have the column" in (tmp_path / "charts/left_out.txt").read_text()
    assert len(sources.examples(tmp_path / "charts")) == 27
