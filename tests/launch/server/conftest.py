"""One server of assets/nano for all tests of a process, and media to ask about."""

import base64
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from molmo2_jax import generate
from tests import test_generate

ROOT = pathlib.Path(__file__).resolve().parents[3]
ROWS, QUEUE = 4, 60
KEY = "sk-test"


class Served:
    """A running server. url: of the API. folder: of the media that it may read."""

    def __init__(self, process, url: str, folder: pathlib.Path):
        self.process, self.url, self.folder = process, url, folder
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300,
                                 trust_env=False)

    def ask(self, content, **fields):
        """Returns the response to one question."""
        messages = content if isinstance(content, list) and content and "role" in content[0] else [
            {"role": "user", "content": content}]
        return self.http.post("/chat/completions", json={"model": "molmo2", "messages": messages} | fields)

    def text(self, content, **fields) -> str:
        """Returns the answer to one question."""
        response = self.ask(content, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def metric(self, name: str) -> float:
        """Returns the value of a metric without labels."""
        text = self.http.get(self.url.removesuffix("/v1") + "/metrics").text
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def start(folder, *flags) -> Served:
    """Starts a server and waits until it is ready."""
    command = [sys.executable, "-m", "launch.serve", "--model=assets/nano", "--port=0",
               f"--decode_rows={ROWS}", f"--queue={QUEUE}", f"--media_folder={folder}", "--buckets=16",
               "--max_tokens=1024", f"--api_key={KEY}", "--programs=", *flags]
    log = open(folder.parent / "server.log", "w+")   # noqa: SIM115, of the process
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
                               env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
    line = process.stdout.readline()
    log.seek(0)
    assert line.startswith("ready after "), log.read()
    return Served(process, line.rpartition(" at ")[2].strip(), folder)


def stop(served: Served) -> int:
    """Stops a server as an operator would; returns its exit status."""
    served.process.send_signal(signal.SIGTERM)
    return served.process.wait(120)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "media"
    folder.mkdir()
    served = start(folder)
    yield served
    assert served.process.poll() is None, "the server must outlive all tests"
    assert served.metric("molmo2_compilations_total") == 0   # whatever was asked
    assert stop(served) == 0


@pytest.fixture(scope="session")
def answerer():
    """The same model, as launch.generate asks it."""
    return generate.load(ROOT / "assets/nano", max_new_tokens=512)


@pytest.fixture(scope="session")
def picture(server):
    return test_generate.write_image(server.folder / "a.png", size=(100, 150))


@pytest.fixture(scope="session")
def clip(server):
    return test_generate.write_video(server.folder / "a.mp4", num_frames=20)


def data_url(path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(pathlib.Path(path).read_bytes()).decode()}"


def image(url: str, **fields) -> dict:
    return {"type": "image_url", "image_url": {"url": url} | fields}


def video(url: str, **fields) -> dict:
    return {"type": "video_url", "video_url": {"url": url} | fields}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def wait_until(condition, seconds: float = 120.0) -> None:
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late, "a condition did not come true"
        time.sleep(0.02)
