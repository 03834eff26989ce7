"""Published rows through the pipeline: records, their order and what is left out, whoever converts them."""

import collections
import fcntl
import json
import random

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from data_pipelines import sources
from data_pipelines.prepared import running
from data_pipelines.schemas import published
from molmo2_jax import files
from tests import test_files
from tests.data_pipelines.schemas import converted

NUM_ROWS = 120


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(published, "PIECE_BYTES", 400)


def point_rows(seed=0):
    """Rows of images in random order, some of which cannot be used."""
    rng = random.Random(seed)
    rows = [{"image_sha256": f"{number % 40:02}", "label": f"mug {number}",
             "points": [{"x": 1 + number % 90, "y": 5}]} for number in range(NUM_ROWS)]
    for number in range(0, NUM_ROWS, 17):
        rows[number] = [{"label": "no image"}, {"image_sha256": "gone", "label": "x", "points": []},
                        rows[number] | {"points": None}, rows[number] | {"points": [{"x": 1}]}
                        ][number // 17 % 4]
    rng.shuffle(rows)
    return rows


def write(folder, rows):
    """Writes the rows in two files of lines, and the media; returns the names of the files."""
    (folder / "out/media").mkdir(parents=True)
    for number in range(40):
        (folder / f"out/media/{number:02}.jpg").write_bytes(b"x")
    lines = [json.dumps(row) for row in rows]
    lines[7] = "{"
    (folder / "a.jsonl").write_text("\n".join(lines[:50]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(lines[50:]))
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl")]


def content(folder):
    return {name: (folder / name).read_bytes() for name in ("annotations.jsonl", "left_out.txt")}


@pytest.mark.slow(6)
def test_groups_that_meet_from_many_pieces_are_in_the_order_of_their_first_rows(tmp_path, small_pieces):
    rows = point_rows()
    paths = write(tmp_path, rows)
    assert len(list(published.pieces(paths))) > 20
    found = running.convert("pixmo_points", paths, str(tmp_path / "out"), exclude={"13", "none"})
    wanted = collections.defaultdict(list)
    for number, row in enumerate(rows):
        if number != 7 and row.get("image_sha256", "gone") not in ("gone", "13"):
            wanted[row["image_sha256"]] += [row["label"]] if row["points"] and "y" in row["points"][0] else []
    examples = sources.examples(tmp_path / "out")
    made = {one.images[0][-6:-4]: [each.label for each in one.annotations] for one in examples}
    assert made == wanted and list(made) == list(wanted) and len(examples) == 2 * len(wanted)
    told = (tmp_path / "out/left_out.txt").read_text().splitlines()
    assert (found.records, found.left_out, found.excluded) == (78, len(told), 2)
    assert found.reasons == tuple(told[:3]) and found.unmatched == {"none"}
    for part in ("a.jsonl:8: must be JSON", "media/13.jpg: is on the list", "media/gone.jpg"):
        assert sum(part in line for line in told) >= 1
    assert not list((tmp_path / "out").glob(".*.partial"))


@pytest.mark.parametrize("schema", ["pixmo_points", "cosyn_point"])
def test_pieces_change_nothing(tmp_path, schema, monkeypatch):
    """cosyn_point converts every row alone."""
    rows = [row | {"id": row.get("image_sha256"), "questions": ["Where?"], "names": ["mug"],
                   "answer_points": [{"x": [5.0], "y": [5.0]}]} for row in point_rows()]
    paths = write(tmp_path, rows)
    before = converted.convert(schema, published.rows(paths, tmp_path), tmp_path / "out")
    wanted = content(tmp_path / "out")
    monkeypatch.setattr(published, "PIECE_BYTES", 400)
    found = running.convert(schema, paths, str(tmp_path / "out"))
    assert found.records == before[0] > 30 and content(tmp_path / "out") == wanted


def test_lines_are_cut_into_pieces_with_their_numbers_and_columns(tmp_path, small_pieces):
    lines = [["video", "answer"], *([f"v{number}", number] for number in range(99))]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "a.jsonl").write_text(text.replace('["v77", 77]', "[]"))
    pieces = list(published.pieces([str(tmp_path / "*.jsonl")]))
    assert len(pieces) == 3 and [piece.number for piece in pieces] == list(range(len(pieces)))
    rows = list(published.rows([str(tmp_path / "*.jsonl")], tmp_path))
    assert [row for row in rows if isinstance(row, dict)] == [
        {"video": f"v{number}", "answer": number} for number in range(99) if number != 77]
    assert "a.jsonl:79: must be an object" in str(rows[77])


def test_row_groups_are_pieces_and_a_broken_one_costs_no_other(tmp_path, small_pieces):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"a": f"{number:0300}"} for number in range(30)]), path,
                        row_group_size=3, compression="none", use_dictionary=False)
    pieces = list(published.pieces([str(path)]))
    assert [(piece.start, piece.stop) for piece in pieces] == [(one, one + 1) for one in range(10)]
    page = parquet.ParquetFile(path).metadata.row_group(4).column(0).data_page_offset
    with path.open("r+b") as file:
        file.seek(page)
        file.write(b"\xff" * 8)
    rows = list(published.rows([str(path)], tmp_path))
    good = [int(row["a"]) for row in rows if isinstance(row, dict)]
    assert good == [number for number in range(30) if number not in (12, 13, 14)]
    [error] = [row for row in rows if isinstance(row, ValueError)]
    assert "a.parquet: cannot be read to its end" in str(error)


def test_a_second_run_at_once_is_refused_and_what_a_killed_one_left_is_removed(tmp_path):
    paths = write(tmp_path, point_rows())
    left = [tmp_path / "out/.annotations.jsonl.12.partial", tmp_path / "out/media/.x.jpg.12.partial"]
    left[0].mkdir()
    (left[0] / "000001").write_text("[")
    left[1].write_bytes(b"x")
    index = tmp_path / "out/..annotations.jsonl.index.npy.12.partial"   # which training may be writing
    index.write_bytes(b"x")
    with (tmp_path / "out/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="one run at a time may prepare a folder"):
            running.convert("pixmo_points", paths, str(tmp_path / "out"))
        assert all(path.exists() for path in left)
    assert running.convert("pixmo_points", paths, str(tmp_path / "out")).records == 80
    assert not any(path.exists() for path in left) and index.exists()


def test_rows_none_of_which_fits_leave_an_earlier_file(tmp_path):
    paths = write(tmp_path, point_rows())
    running.convert("pixmo_points", paths, str(tmp_path / "out"))
    before = content(tmp_path / "out")
    (tmp_path / "c.jsonl").write_text('{"label": "x"}\n')
    with pytest.raises(ValueError, match="rows of pixmo_points must have the column"):
        running.convert("pixmo_points", [str(tmp_path / "c.jsonl")], str(tmp_path / "out"))
    assert content(tmp_path / "out") == before and not list((tmp_path / "out").glob(".*.partial"))
    with pytest.raises(ValueError, match="a schema must be one of"):
        running.convert("labels", paths, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="must be Apache Beam's; got --workers=2"):
        running.convert("pixmo_points", paths, str(tmp_path / "out"), arguments=["--workers=2"])


def test_rows_and_records_may_be_in_a_bucket(tmp_path, monkeypatch, small_pieces):
    rows = [{"image": {"bytes": b"picture %d" % (row % 3), "path": "a.png"}, "query": f"Max {row}?",
             "label": [str(row)], "human_or_machine": row % 2} for row in range(9)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    running.convert("chart_qa", [str(tmp_path / "*.parquet")], str(tmp_path / "out"))
    monkeypatch.setattr(test_files.Bucket, "store", {})
    monkeypatch.setattr(test_files.Bucket, "pseudo_dirs", [""])
    fsspec.register_implementation("gcs", test_files.Bucket, clobber=True)
    try:
        files.copy(files.path(tmp_path / "out"), files.path("gs://bucket/none"))  # so that folders exist
        (tmp_path / "rows").mkdir()
        (tmp_path / "a.parquet").rename(tmp_path / "rows/a.parquet")
        files.copy(files.path(tmp_path / "rows"), files.path("gs://bucket/rows"))
        found = running.convert("chart_qa", ["gs://bucket/r*/*.parquet"], "gs://bucket/out")
        assert found.records == 9 and not found.left_out
        out = files.path("gs://bucket/out")
        for name, data in content(tmp_path / "out").items():
            assert (out / name).read_bytes() == data
        assert {path.name for path in (out / "media").iterdir()} == {
            path.name for path in (tmp_path / "out/media").iterdir()}
        missing = [json.dumps({"video_id": "v", "label": "x"})]
        (files.path("gs://bucket/rows") / "b.jsonl").write_text("\n".join(missing))
        found = running.convert("label", ["gs://bucket/rows/b.jsonl"], "gs://bucket/labels")
        assert (found.records, found.left_out) == (0, 1) and "media/v.mp4" in found.reasons[0]
    finally:
        fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
