"""Clients that mean harm: a clear error for them, and a server that answers the next one."""

import base64
import io
import pathlib
import socket
import struct
import urllib.parse
import zlib

import httpx
import pytest
from PIL import Image

from data_pipelines.stream import child
from launch.server import reading
from molmo2_jax.inputs import held_file
from tests.launch.server import conftest as serving
from tests.launch.server import decoders

image, video, text = serving.image, serving.video, serving.text


def encoded(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(width: int, height: int) -> bytes:
    """Returns a PNG of one colour: few bytes, many pixels."""
    def part(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))
    lines = zlib.compressobj(9)
    packed = b"".join(lines.compress(bytes(1 + width * 3)) for _ in range(height)) + lines.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", packed) + part(b"IEND", b"")


@pytest.mark.parametrize("part, status, words", [
    (image(encoded(png(12_000, 12_000), "image/png")), 400, "at most 100000000 pixels; got 12000 x 12000"),
    (image(encoded(b"<html>no</html>", "image/png")), 415, "picture 1: is a page of HTML"),
    (image(encoded(b"\x00\x01" * 50, "image/png")), 415, "not an image of a known format"),
    (image(encoded(png(40, 40)[:-30], "image/png")), 400, "picture 1"),
    (video(encoded(b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 90, "video/mp4")), 400, "the video"),
    (video(encoded(b"PK\x03\x04" * 30, "video/mp4")), 415, "the video: is a zip archive"),
    (video("file:///etc/passwd"), 400, "folder of --media_folder"),
    (image("http://169.254.169.254/latest"), 400, "--allow_http"),
])
def test_media_that_are_none_or_too_large_are_refused(server, part, status, words):
    response = server.ask([part, text("What?")])
    assert response.status_code == status and words in response.json()["error"]["message"], response.text
    assert str(server.folder.parent) not in response.text and server.text("What?")


def test_what_is_no_request_is_refused(server):
    post = lambda content, **headers: server.http.post("/chat/completions", content=content, headers=headers)
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 6000 + b"}"):
        response = post(body)
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
    assert server.text("What?")


def address(server):
    split = urllib.parse.urlsplit(server.url)
    return split.hostname, split.port


def head(**headers) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: a",
                        f"Authorization: Bearer {serving.KEY}", *lines, "", ""]).encode()


def answer(connection) -> bytes:
    connection.settimeout(60)
    return connection.recv(1 << 16)


def test_huge_bodies_and_floods_of_headers_cost_their_connection(server):
    with socket.create_connection(address(server)) as connection:   # 2 GB are announced
        connection.sendall(head(Content_Length=2 << 30))
        assert b"413" in answer(connection).split(b"\r\n")[0]
    with socket.create_connection(address(server)) as connection:   # 2 GB are sent without a word
        connection.sendall(head(Transfer_Encoding="chunked"))
        part = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        with pytest.raises(OSError):   # it is closed before
            for _ in range(2000):
                connection.sendall(part)
    with socket.create_connection(address(server)) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"".join(
                b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(200)))
            assert answer(connection)[9:12] in (b"400", b"431", b"")
        except OSError:
            pass
    assert server.text("What?")


def test_slow_clients_do_not_keep_others_waiting(server):
    slow = [socket.create_connection(address(server)) for _ in range(50)]
    for number, connection in enumerate(slow):
        connection.sendall(head(Content_Length=1000)[:40 + number] if number % 2 else
                           head(Content_Length=1000) + b"{")
    assert server.text("What?")
    for connection in slow:
        connection.close()
    serving.wait_until(lambda: httpx.get(server.url.removesuffix("/v1") + "/health").status_code == 200)
    assert server.text("What?")


@pytest.mark.slow(6)
def test_a_decoder_that_crashes_hangs_or_grows_costs_its_process_alone():
    job = lambda content: reading.Job(kind="images", files=(held_file.HeldFile("a", content),), key="")
    readers = reading.Readers.__new__(reading.Readers)
    process = child.Child(decoders.act, 0.5, tries=1, slack=3.0)
    readers._all, readers._free = [process], reading.queue.SimpleQueue()
    readers._free.put(process)
    readers.start()
    try:
        assert readers.read(job(b"")) == "read"
        for content in (b"crash", b"hang"):
            with pytest.raises(reading.Failed, match="decoder crashed or did not end"):
                readers.read(job(content))
            assert readers.read(job(b"")) == "read"
        with pytest.raises(ValueError, match="within 3 GiB of memory"):
            readers.read(job(b"grow"))
        assert readers.read(job(b"")) == "read"
    finally:
        readers.close()


def test_html_in_names_and_answers_is_only_ever_json(server, tmp_path):
    name = "<script>alert(1)</script>.png"
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30)).save(buffer, "PNG")
    (pathlib.Path(server.folder) / name.replace("/", "_")).write_bytes(buffer.getvalue()[:40])
    response = server.ask([image(f"file://{server.folder}/{name}"), text("<script>alert(2)</script>")])
    assert response.status_code == 400 and response.headers["content-type"] == "application/json"
