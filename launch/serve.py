"""Answers questions over HTTP, to any client of OpenAI's chat completions: text, pictures and videos.

  python -m launch.serve --model=runs/mine
  python -m launch.serve --model=hf/mine --media_folder=videos --port=8000 --decode_rows=16 --cache_gib=8
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "molmo2",
      "messages": [{"role": "user", "content": "Hello"}]}'

Needs the extra `serve`: pip install -e '.[serve]' in the repository. --model is the work directory of a run
or a Hugging Face folder. All programs are compiled before the first request, and kept on disk for the next
start; GET /health answers 503 until then, GET /metrics has what Prometheus reads. The server listens on this
machine only, unless --host names another address; then give it an --api_key, too. Media arrive as data: URLs,
or as file: URLs of files in --media_folder. SIGTERM or Ctrl-C answers who is waiting, up to --stop_seconds,
and ends the server. docs/serving.md describes the fields of a request, limits and metrics.
"""

import dataclasses
import os
import pathlib
import re
import signal
import sys
import threading
import time

import jax
from absl import flags

from launch.support import answering
from launch.support import cli
from launch.support import hosts
from molmo2_jax.serving import engine as engine_lib

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free.", lower_bound=0,
                             upper_bound=65535)
_MODEL_NAME = flags.DEFINE_string("model_name", "molmo2", "Name of the model in requests.")
_API_KEY = flags.DEFINE_string("api_key", None, "Key that requests to /v1 must have. Default: the "
                               "environment variable MOLMO2_API_KEY, else none.")
_MEDIA_FOLDER = flags.DEFINE_string("media_folder", None, "Folder whose files file: URLs may name.")
_ALLOW_HTTP = flags.DEFINE_list("allow_http", [], "Hosts from which http(s) URLs may be fetched.")
_ROWS = flags.DEFINE_integer("decode_rows", 8, "Answers written at the same time.", lower_bound=1)
_QUEUE = flags.DEFINE_integer("queue", 64, "Requests that may wait; more are answered 429.", lower_bound=1)
_CACHE_GIB = flags.DEFINE_float(
    "cache_gib", 1.0, "GiB of device memory for media that were asked about, so that further questions about "
    "them need no new prefill.", lower_bound=0)
_CONTEXT = flags.DEFINE_integer("max_tokens", None, "Most tokens of prompt and answer together. Default: the "
                                "positions of the model.", lower_bound=1)
_BUCKETS = flags.DEFINE_list("buckets", [], "Numbers of crops (frames, or tiles of pictures) for which "
                             "prefill is compiled. Default: powers of two, on a CPU of four.")
_EVERY = flags.DEFINE_integer("stream_every", 8, "Tokens between two pieces of a stream.", lower_bound=1)
_COMPILED = flags.DEFINE_string(
    "programs", "~/.cache/molmo2_jax/programs", "Folder that keeps compiled programs; '': none.")
_READERS = flags.DEFINE_integer("media_processes", 2, "Processes that decode media.", lower_bound=1)
_READ_SECONDS = flags.DEFINE_float("media_seconds", 60.0, "Most seconds to decode one request's media.",
                                   lower_bound=1)
_READER_GIB = flags.DEFINE_float("media_gib", 4.0, "Most GiB of memory of a process that decodes media.",
                                 lower_bound=1)
_VIDEO_SECONDS = flags.DEFINE_float("max_video_seconds", 7200.0, "Longest video, in seconds.", lower_bound=0)
_PIXELS = flags.DEFINE_integer("max_pixels", 100_000_000, "Most pixels of a picture.", lower_bound=1)
_BODY_MIB = flags.DEFINE_integer("max_body_mib", 128, "Largest body of a request.", lower_bound=1)
_SECONDS = flags.DEFINE_float("answer_seconds", 600.0, "Most seconds until a request is answered.",
                              lower_bound=1)
_STOP_SECONDS = flags.DEFINE_float("stop_seconds", 30.0, "Seconds for open requests when told to stop.",
                                   lower_bound=0)
for _name in ("model", "dtype", "cache_dtype", "weights", "mesh", "traceback"):
    flags.declare_key_flag(_name)

_MISREAD = re.compile(r"o1|o3|o4|gpt-5")
_LOCAL = ("127.0.0.1", "::1", "localhost")


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    _check_flags()
    try:
        from launch.server import app as app_lib
        from launch.server import listening
        from launch.server import media
        from launch.server import page as page_lib
        from launch.server import reading
    except ModuleNotFoundError as error:
        raise ValueError("launch.serve needs the extra `serve`: pip install -e '.[serve]'; "
                         f"got no module {error.name}") from error
    hosts.join()
    listener = listening.bind(_HOST.value, _PORT.value)
    if _COMPILED.value and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(_COMPILED.value).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    answerer = answering.load(cli.MODEL.value, rows=_ROWS.value, cache_dtype=cli.CACHE_DTYPE.value).answerer
    engine = engine_lib.Engine(
        answerer, num_rows=_ROWS.value, most_tokens=_CONTEXT.value, queue=_QUEUE.value,
        cache_bytes=int(_CACHE_GIB.value * 2**30), every=_EVERY.value, crops=[*map(int, _BUCKETS.value)])
    inputs = dataclasses.replace(answerer.inputs, max_read_seconds=_READ_SECONDS.value)
    readers = reading.Readers(reading.Reader(
        answerer.config, inputs, answerer.tokenizer, most_seconds=_VIDEO_SECONDS.value,
        most_pixels=_PIXELS.value, most_bytes=int(_READER_GIB.value * 2**30)), _READERS.value)
    folder = _MEDIA_FOLDER.value
    sources = media.Sources(media.Rules(
        folder=pathlib.Path(folder) if folder else None,
        hosts=frozenset(host.strip().lower() for host in _ALLOW_HTTP.value)), inputs)
    page = page_lib.Page(
        page_lib.Drawer(_VIDEO_SECONDS.value, int(_READER_GIB.value * 2**30)), _SECONDS.value)
    served = app_lib.Server(
        engine, readers, sources, page=page, model=_MODEL_NAME.value, queue=_QUEUE.value,
        limits=app_lib.Limits(body=_BODY_MIB.value << 20, seconds=_SECONDS.value),
        api_key=_API_KEY.value or os.environ.get("MOLMO2_API_KEY") or None)
    server = listening.server(served.app(), seconds=_STOP_SECONDS.value)
    failed: list[BaseException] = []
    threading.Thread(target=_prepare, args=(engine, readers, server, listening.url(listener), failed),
                     daemon=True).start()
    # uvicorn stops at these signals, and raises them again once it has stopped.
    before = [signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        server.run(sockets=[listener])
    finally:
        engine.close(_STOP_SECONDS.value)
        readers.close()
        page.close()
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(one, handler)
    if failed:
        raise failed[0]
    print("stopped", flush=True)


def _check_flags() -> None:
    """Checks the flags before a large model is loaded.

    Raises:
      ValueError: a flag is missing, or has a value that it may not have.
    """
    if not cli.MODEL.value:
        raise ValueError("--model must name a work directory or a Hugging Face folder; got none")
    if _MEDIA_FOLDER.value is not None and not pathlib.Path(_MEDIA_FOLDER.value).is_dir():
        raise ValueError(f"--media_folder must be a folder; got {_MEDIA_FOLDER.value!r}")
    if not all(one.strip().isdigit() and int(one) > 0 for one in _BUCKETS.value):
        raise ValueError(f"--buckets must be whole numbers >= 1, separated by commas; got {_BUCKETS.value}")
    if not _MODEL_NAME.value.strip():
        raise ValueError("--model_name must not be empty")
    if found := _MISREAD.search(_MODEL_NAME.value):
        print(f"warning: lmms-eval takes a model whose name contains {found[0]!r} for one that wants no "
              f"temperature and no max_tokens; got {_MODEL_NAME.value!r}", file=sys.stderr)
    has_key = _API_KEY.value or os.environ.get("MOLMO2_API_KEY")
    if _HOST.value not in _LOCAL and not has_key:
        print(f"warning: anybody who reaches {_HOST.value}:{_PORT.value} can use this server: give it an "
              "--api_key", file=sys.stderr)


def _prepare(engine: engine_lib.Engine, readers, server, url: str, failed: list[BaseException]) -> None:
    """Compiles all programs and says what is ready; if that fails, notes why and stops the server."""
    start = time.monotonic()
    try:
        readers.start()
        print(f"compiling {engine.num_programs} buckets", file=sys.stderr, flush=True)
        for number, done in enumerate(engine.compile(), 1):
            print(f"{number} of {engine.num_programs}: {done.name}: {done.seconds:.1f} s, "
                  f"{done.size / 2**20:.0f} MiB", file=sys.stderr, flush=True)
        if engine.is_open:
            print(f"ready after {time.monotonic() - start:.0f} s: model {_MODEL_NAME.value!r} at {url}",
                  flush=True)
    except BaseException as error:  # noqa: BLE001, raised in the main thread
        failed.append(error)
        server.should_exit = True


if __name__ == "__main__":
    cli.start(main)
