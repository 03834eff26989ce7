import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile

import hypothesis
import pytest
from hypothesis import strategies

from data_pipelines import records
from data_pipelines import sources
from data_pipelines.sources import lines
from molmo2_jax.inputs import text_file

ROOT = pathlib.Path(__file__).resolve().parents[3]
GOOD = '{"annotations": [{"type": "qa", "question": "Q?", "answer": "é"}]}'.encode()
BLANK = (b"", b" ", b"\r", b"\t \x0b\x0c", b" " * 20)
PIECES = (GOOD, b"  " + GOOD + b"\r", b"{", b"[1]", b"\xff", b"\x00", *BLANK)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setattr(lines, "CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder, *contents):
    folder.mkdir(exist_ok=True)
    (folder / lines.FILE).write_bytes(b"".join(line + b"\n" for line in contents))
    return folder


def numbered(number):
    return json.dumps({"annotations": [{"type": "qa", "question": "Q?", "answer": f"{number}"}]}).encode()


def answers(source):
    return [example.annotations[0].answer for example in sources.each(source)]


def forbid_scans(monkeypatch):
    def scan(fd, size):
        raise AssertionError("the file was scanned again")
    monkeypatch.setattr(lines, "_lines", scan)


def in_sequence(path):
    """Returns the good records of a file, read without offsets, and the errors."""
    try:
        text_file.check_start(path)
    except ValueError as error:
        return [], [error]
    examples, errors = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    examples.append(records.parse_line(line, path.parent, key=f"{path.name}:{number}",
                                                       source=path.resolve().parent.name))
                except records.BrokenRecord as error:
                    errors.append(error)
    return examples, errors if examples or errors else [lines.empty(path)]


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True,
                     phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink])
@hypothesis.given(content=strategies.lists(strategies.sampled_from(PIECES), max_size=12),
                  block=strategies.integers(1, 200), has_mark=strategies.booleans(),
                  has_end=strategies.booleans())
def test_a_source_has_the_records_and_errors_of_a_sequential_reader(content, block, has_mark, has_end):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_BLOCK", block)
        patch.setattr(lines, "_SAMPLE", 3)
        path = pathlib.Path(folder) / lines.FILE
        path.write_bytes(b"\xef\xbb\xbf" * has_mark + b"\n".join(content) + b"\n" * has_end)
        examples, errors = in_sequence(path)
        try:
            source = sources.open_source(folder)
        except ValueError as error:
            assert not examples and [str(one) for one in errors] == [str(error)]
            return
        found = list(sources.each(source))
        assert [one for one in found if not isinstance(one, ValueError)] == examples
        assert [str(one) for one in found if isinstance(one, ValueError)] == [str(one) for one in errors]
        assert [one.key for one in found] == [source.key(index) for index in range(len(source))]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_and_missing_files_are_refused_when_the_folder_is_opened(tmp_path, encoding):
    with pytest.raises(ValueError, match="annotation file must exist; found none"):
        sources.open_source(tmp_path)
    (tmp_path / lines.FILE).write_bytes('{"annotations": []}\n'.encode(encoding))
    with pytest.raises(ValueError, match="text must be UTF-8; got "):
        sources.open_source(tmp_path)


def test_indices_outside_are_refused(tmp_path):
    source = sources.open_source(write(tmp_path, GOOD, GOOD))
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"\[0, 2\); got {index}"):
            source[index]


def test_a_broken_record_names_itself_and_survives_pickling(tmp_path):
    source = sources.open_source(write(tmp_path / "set", GOOD, b"", b"{"), name="mine")
    assert (source[0].source, source.name) == ("mine", "mine")
    with pytest.raises(records.BrokenRecord, match="record: must be one JSON object") as raised:
        source[1]
    error = pickle.loads(pickle.dumps(raised.value))
    assert error.key == source.key(1) == "annotations.jsonl:3"
    assert str(error) == str(raised.value) == f"{tmp_path}/set/annotations.jsonl:3: {error.rule}"


def test_a_pickled_source_holds_no_records(tmp_path):
    few = sources.open_source(write(tmp_path / "few", numbered(0)))
    many = sources.open_source(write(tmp_path / "many", *map(numbered, range(5000))))
    many[3]
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 20 < 1000
    assert answers(pickle.loads(pickle.dumps(many))) == [str(number) for number in range(5000)]


# The index


def test_an_index_is_made_once_and_used_by_every_later_source(tmp_path, monkeypatch):
    source = sources.open_source(write(tmp_path, GOOD, b"", GOOD))
    assert {path.name for path in tmp_path.iterdir()} == {lines.FILE, lines.INDEX}
    forbid_scans(monkeypatch)
    for again in (sources.open_source(tmp_path), pickle.loads(pickle.dumps(source))):
        assert [again.key(0), again.key(1)] == ["annotations.jsonl:1", "annotations.jsonl:3"]


@pytest.mark.parametrize("keeps_time", [False, True])
def test_an_index_is_made_anew_when_the_file_changes(tmp_path, keeps_time):
    folder = write(tmp_path, *map(numbered, range(10, 14)))
    path = folder / lines.FILE
    assert answers(sources.open_source(folder)) == ["10", "11", "12", "13"]
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(numbered(1) + b"\n" + content[len(numbered(1)) + 1:-4] + b"   \n")
    assert path.stat().st_size == before.st_size
    if keeps_time:  # then the sampled content shows the change
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    first, *_ = sources.each(sources.open_source(folder))
    assert first.annotations[0].answer == "1"


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:100], lambda data: data[:-8], lambda data: b"not an index",
    lambda data: data[:128] + bytes(8) + data[136:], lambda data: pickle.dumps([1])])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    sources.open_source(write(tmp_path, *map(numbered, range(3))))
    index = tmp_path / lines.INDEX
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    assert answers(sources.open_source(tmp_path)) == ["0", "1", "2"]
    assert index.read_bytes() == whole


def test_offsets_that_are_no_starts_of_lines_are_refused(tmp_path):
    sources.open_source(write(tmp_path, *map(numbered, range(3))))
    index = tmp_path / lines.INDEX
    data = bytearray(index.read_bytes())
    data[-16] += 1  # the start of the second line
    index.write_bytes(data)
    for place in (0, 1):
        with pytest.raises(ValueError, match="annotations.jsonl: an annotation file must not change"):
            sources.open_source(tmp_path)[place]


def test_the_index_of_a_folder_that_cannot_be_written_is_in_the_cache(tmp_path, cache, monkeypatch):
    folder = write(tmp_path / "set", numbered(0), numbered(1))
    (folder / lines.INDEX).mkdir()  # no file can have this name, even as root
    source = sources.open_source(folder)
    [index] = cache.iterdir()
    forbid_scans(monkeypatch)
    assert answers(pickle.loads(pickle.dumps(source))) == answers(sources.open_source(folder)) == ["0", "1"]
    assert index.suffix == ".npy"
    assert [path.name for path in folder.iterdir() if path.is_file()] == [lines.FILE]


def test_without_any_place_for_an_index_the_folder_is_refused(tmp_path, cache):
    folder = write(tmp_path / "set", numbered(0))
    (folder / lines.INDEX).mkdir()
    cache.write_text("a file, not a folder")
    with pytest.raises(ValueError, match="index must be written next to it or into the cache folder; got "):
        sources.open_source(folder)


def test_a_scan_that_fails_leaves_nothing_and_old_partial_files_are_removed(tmp_path, monkeypatch):
    folder = write(tmp_path / "set", numbered(0))
    partial = folder / f".{lines.INDEX}.0123.partial"
    partial.write_bytes(b"of a process that was killed")
    os.utime(partial, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(lines, "_is_blank", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sources.open_source(folder)
    assert [path.name for path in folder.iterdir()] == [lines.FILE]
    assert answers(sources.open_source(folder)) == ["0"]


OPEN = """
import sys
from data_pipelines import sources
print("ready", flush=True)
sys.stdin.readline()
source = sources.open_source(sys.argv[1])
print(len(source), source[len(source) - 1].annotations[0].answer, flush=True)
"""


def test_processes_that_index_a_folder_at_once_agree(tmp_path):
    folder = write(tmp_path / "set", *map(numbered, range(20_000)))
    started = [subprocess.Popen([sys.executable, "-c", OPEN, str(folder)], stdin=subprocess.PIPE, text=True,
                                stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
               for _ in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in started] == ["20000 19999\n"] * 4
    assert {path.name for path in folder.iterdir()} == {lines.FILE, lines.INDEX}


# A file that changes while it is in use


def test_a_worker_refuses_another_file_than_the_source_was_opened_with(tmp_path):
    source = sources.open_source(write(tmp_path, numbered(0), numbered(1)))
    pickled = pickle.dumps(source)
    write(tmp_path, numbered(0), numbered(2))
    with pytest.raises(ValueError, match="must not change while it is in use"):
        pickle.loads(pickled)[1]


def test_a_file_that_is_replaced_is_read_on_as_it_was(tmp_path):
    source = sources.open_source(write(tmp_path, numbered(0), numbered(1)))
    (tmp_path / lines.FILE).rename(tmp_path / "old")
    write(tmp_path, numbered(5))
    assert answers(source) == ["0", "1"] and answers(sources.open_source(tmp_path)) == ["5"]


def test_a_file_that_is_cut_while_it_is_in_use_ends_the_reading(tmp_path):
    source = sources.open_source(write(tmp_path, numbered(0), numbered(1)))
    os.truncate(tmp_path / lines.FILE, len(numbered(0)) + 5)
    assert source[0].annotations[0].answer == "0"
    with pytest.raises(ValueError, match="must not change") as raised:
        source[1]
    assert not isinstance(raised.value, records.BrokenRecord)
