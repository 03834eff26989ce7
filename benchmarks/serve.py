"""launch.serve against other servers on the same exported model: throughput, time to first token, latency.

  python -m benchmarks.serve [--model=assets/nano | --size=small] [--clients=8] [--requests=32] \\
      [--transformers='/tmp/env/bin/transformers serve'] [--vllm='/tmp/env/bin/vllm serve']

Each server in turn gets the same requests over loopback, as streams, greedily: text; pictures, each another
one; videos, each another one; and second questions about these videos. Tokens are counted by
encoding the answers with the model's tokenizer. Needs the extra `test`. A peer is the start of a command
line; one that cannot serve the model, or not one kind of request, is listed with its error. The last column
is what launch.serve itself counts: the time of the device from a request's media and text to its first token.
With one client nobody waits for another. --size=small: a model of 98M parameters, drawn at random, whose
answers never end; needs torch.
"""

import asyncio
import base64
import contextlib
import io
import logging
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import av
import httpx
import numpy as np
import openai
from absl import app
from absl import flags
from PIL import Image

from molmo2_jax.inputs import tokenizer as tokenizers

_MODEL = flags.DEFINE_string("model", "assets/nano", "Hugging Face folder.")
_SIZE = flags.DEFINE_enum("size", None, ["small"], "Random model of benchmarks.peer, in place of --model.")
_CLIENTS = flags.DEFINE_integer("clients", 8, "Requests at a time.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer("requests", 32, "Requests of each kind.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Most tokens of an answer.", lower_bound=1)
_TRANSFORMERS = flags.DEFINE_string("transformers", None, "Command that starts `transformers serve`.")
_VLLM = flags.DEFINE_string("vllm", None, "Command that starts `vllm serve`.")
_START_SECONDS = 900
QUESTION, SECOND = "Point to the red circle.", "How many blue squares are there in the video?"


class Peer(NamedTuple):
    """A server: its command, given a port; the name of its model; how it says that it is ready."""
    name: str
    command: Callable[[int], list[str]]
    model: str
    environment: dict[str, str] = {}


class Took(NamedTuple):
    """One answer: seconds to its first token and to its end, and its tokens."""
    first: float
    whole: float
    tokens: int


def peers(folder: str) -> list[Peer]:
    found = [Peer("launch.serve", lambda port: [
        sys.executable, "-m", "launch.serve", f"--model={folder}", f"--port={port}",
        f"--decode_rows={_CLIENTS.value}"], "molmo2")]
    if _TRANSFORMERS.value:
        found.append(Peer("transformers serve", lambda port: [
            *shlex.split(_TRANSFORMERS.value), folder, "--port", str(port), "--device", "cpu"], folder))
    if _VLLM.value:
        found.append(Peer("vllm serve", lambda port: [
            *shlex.split(_VLLM.value), folder, "--port", str(port), "--dtype", "float32", "--max-num-seqs",
            str(_CLIENTS.value)], folder, {"VLLM_CPU_KVCACHE_SPACE": "1"}))
    return found


def picture(number: int) -> str:
    pixels = np.random.default_rng(number).integers(0, 256, (96, 128, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def video(number: int) -> str:
    out, rng = io.BytesIO(), np.random.default_rng(number)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for _ in range(48):
            coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
            frame = np.asarray(Image.fromarray(coarse).resize((128, 96)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return "data:video/mp4;base64," + base64.b64encode(out.getvalue()).decode()


def contents() -> dict[str, list]:
    """Returns the contents of the messages by kind."""
    count = range(_REQUESTS.value)
    film = lambda url, words: [{"type": "video_url", "video_url": {"url": url}},
                               {"type": "text", "text": words}]
    films = [video(number) for number in count]
    return {"text": [f"{QUESTION} {number}" for number in count],
            "picture": [[{"type": "image_url", "image_url": {"url": picture(number)}},
                         {"type": "text", "text": QUESTION}] for number in count],
            "video": [film(one, QUESTION) for one in films],
            "second question": [film(one, SECOND) for one in films]}


async def ask(client: openai.AsyncOpenAI, model: str, content, tokenizer) -> Took:
    start, first, text = time.perf_counter(), 0.0, ""
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], temperature=0, stream=True,
        max_tokens=_TOKENS.value)
    async for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.perf_counter() - start
            text += piece
    whole = time.perf_counter() - start
    return Took(first or whole, whole, len(tokenizer.encode(text)))


async def ask_all(url: str, model: str, asked: Sequence, tokenizer) -> tuple[float, list[Took]]:
    """Returns (seconds in all, what each request took)."""
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    turns = asyncio.Semaphore(_CLIENTS.value)

    async def one(content) -> Took:
        async with turns:
            return await ask(client, model, content, tokenizer)

    async with client:
        start = time.perf_counter()
        took = await asyncio.gather(*map(one, asked), return_exceptions=True)
        seconds = time.perf_counter() - start
    if errors := [one for one in took if isinstance(one, BaseException)]:
        raise errors[0]
    return seconds, list(took)


def prefill(url: str) -> tuple[float, float]:
    """Returns (seconds of prefill, requests) so far of launch.serve; NaN of other servers."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    found = [re.search(rf"^molmo2_{name}_total (\S+)$", text, re.MULTILINE)
             for name in ("prefill_seconds", "answered")]
    return tuple(float(one[1]) if one else math.nan for one in found)


def row(name: str, kind: str, seconds: float, took: list[Took], prefilled: float) -> str:
    of = lambda values, share: f"{np.quantile(values, share):.3f}"
    firsts, wholes = ([getattr(one, field) for one in took] for field in ("first", "whole"))
    tokens = sum(one.tokens for one in took)
    cells = [name, kind, f"{len(took) / seconds:.1f}", f"{tokens / seconds:.0f}", of(firsts, 0.5),
             of(firsts, 0.99), of(wholes, 0.5), of(wholes, 0.99),
             "" if math.isnan(prefilled) else f"{1e3 * prefilled:.1f}"]
    return f"| {' | '.join(cells)} |"


def measure(peer: Peer, asked: dict[str, list], tokenizer) -> None:
    """Starts a server, prints a line of the table for each kind of request, and stops it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(peer.command(port), stdout=log, stderr=log, start_new_session=True,
                                   env=os.environ | peer.environment)
        try:
            start = time.monotonic()
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() - start > _START_SECONDS:
                    log.seek(0)
                    print(f"| {peer.name} | cannot serve it: {_last(log.read())} | | | | | | | |", flush=True)
                    return
                time.sleep(1)
            print(f"{peer.name}: ready after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            for kind, contents_of in asked.items():
                try:
                    if kind != "second question":
                        asyncio.run(ask_all(f"{url}/v1", peer.model, contents_of[:1], tokenizer))
                    before = prefill(url)
                    seconds, took = asyncio.run(ask_all(f"{url}/v1", peer.model, contents_of, tokenizer))
                    spent, answered = np.subtract(prefill(url), before)
                    print(row(peer.name, kind, seconds, took, spent / answered), flush=True)
                except (openai.OpenAIError, httpx.HTTPError) as error:
                    print(f"| {peer.name} | {kind}: {_last(str(error))} | | | | | | | |", flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):   # it has ended
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    return lines[-1][-160:].replace("|", "/")


def small(folder: str) -> None:
    """Writes the random model, with a tokenizer that knows the words of the questions."""
    from benchmarks import peer  # needs torch
    from molmo2_jax import config as configs
    from molmo2_jax.hf import checkpoint
    from tests import packs
    config = peer.small()
    tokenizer = tokenizers.train_small(4 * [f"{QUESTION} {SECOND} user assistant"], config.text.vocab_size)
    params, inputs = packs.random_params(config), configs.InputConfig()
    checkpoint.export_checkpoint(params, config, inputs, tokenizer, folder)


def main(arguments: list[str]) -> None:
    for name in ("httpx", "httpx2"):   # a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as made:
        folder = str(pathlib.Path(_MODEL.value).resolve())
        if _SIZE.value:
            folder = f"{made}/{_SIZE.value}"
            small(folder)
        tokenizer, asked = tokenizers.Tokenizer.from_file(folder), contents()
        print("| server | request | requests/s | tokens/s | first token p50 (s) | p99 | whole p50 (s) | p99 "
              "| prefill (ms) |\n|---|---|---|---|---|---|---|---|---|", flush=True)
        for one in peers(folder):
            measure(one, asked, tokenizer)


if __name__ == "__main__":
    app.run(main)
