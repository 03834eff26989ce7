"""Text is read as UTF-8 or rejected with the place of the first invalid byte; never changed silently."""

import codecs
import subprocess

import hypothesis
import pytest
from hypothesis import strategies

from molmo2_jax.inputs import text_file

TEXT = "a,b\nWho sits in the café?,naïve 日本\n"


def refused(path):
    """Returns the message that rejects the file, which must not depend on how it is read."""
    messages = set()
    for way in (text_file.read, text_file.check, lambda path: text_file.decode(path.read_bytes(), path)):
        with pytest.raises(ValueError) as caught:
            way(path)
        messages.add(str(caught.value))
    [message] = messages
    assert "\n" not in message
    return message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    text_file.check(path)
    text_file.check_start(path)
    assert text_file.read(path) == text_file.decode(path.read_bytes(), path) == TEXT


@pytest.mark.parametrize("encoding", [
    f"utf-{bits}{order}" for bits in (16, 32) for order in ("", "-le", "-be")])
def test_wide_encodings_are_refused_at_their_start_with_and_without_a_mark(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    message = refused(path)
    assert str(path) in message and "probably UTF-" in message and "offset" in message
    with pytest.raises(ValueError, match="must be UTF-8"):
        text_file.check_start(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_the_advice_converts_the_file(tmp_path, encoding):
    path, text = tmp_path / "a.txt", "Who sits in the café?\n"
    path.write_bytes(text.encode(encoding))
    command = refused(path).split("`")[1].replace("OLD", str(path)).replace("NEW", str(tmp_path / "new"))
    subprocess.run(command, shell=True, check=True, timeout=60)
    assert text_file.read(tmp_path / "new") == text


def test_the_byte_that_is_not_utf8_is_placed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    message = refused(path)
    assert "byte 0xe9 at offset 11, line 3" in message and "iconv -f CP1252 -t UTF-8" in message
    text_file.check_start(path)  # which reads only the start
    path.write_bytes("one\ncaf\u00e9".encode()[:-1])
    assert "byte 0xc3 at offset 7, line 2" in refused(path)


@hypothesis.given(strategies.text(min_size=1), strategies.integers(0, 200), strategies.integers(1, 9))
def test_places_do_not_depend_on_how_the_file_is_cut(text, at, size):
    data = text.encode("utf-8", "replace")
    data = data[:at] + b"\xff" + data[at:]

    def told(chunks):
        with pytest.raises(ValueError) as caught:
            text_file._check(chunks, "a")
        return str(caught.value)

    assert told([data]) == told([data[start:start + size] for start in range(0, len(data), size)])


def test_a_large_file_is_checked_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "_CHUNK", 7)
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + (TEXT * 50).encode() + b"\xe9")
    with pytest.raises(ValueError, match=rf"byte 0xe9 at offset {3 + 50 * len(TEXT.encode())}, line 101"):
        text_file.check(path)


def test_ends_of_lines_are_newlines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\rc\n")
    assert text_file.read(path) == "a\nb\nc\n"
