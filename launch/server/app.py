"""The HTTP routes: OpenAI's chat completions, the model's card, health, version and metrics.

Source of the interface: the public API reference of OpenAI; docs/serving.md lists what is taken and refused.
"""

import asyncio
import dataclasses
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable

from starlette import applications
from starlette import middleware
from starlette import requests
from starlette import responses
from starlette import routing
from starlette import types as asgi

import molmo2_jax
from launch.server import errors
from launch.server import fields
from launch.server import media as media_lib
from launch.server import metrics as metrics_lib
from launch.server import page as page_lib
from launch.server import reading
from launch.server import replies
from molmo2_jax import decode
from molmo2_jax import generate
from molmo2_jax.serving import buckets
from molmo2_jax.serving import engine as engine_lib
from molmo2_jax.serving import roots
from molmo2_jax.serving import tickets as tickets_lib

_log = logging.getLogger(__name__)
_BODIES = 4    # times the largest body may be held at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a request. body: bytes. arrival: seconds until its body is there. seconds: until it is answered.
    comments: seconds between comments in a stream without news."""
    body: int = 128 << 20
    arrival: float = 60.0
    seconds: float = 600.0
    comments: float = 15.0


class Server:
    """Everything that a request needs. `model`: the name under which it is served."""

    def __init__(self, engine: engine_lib.Engine, readers: reading.Readers, sources: media_lib.Sources, *,
                 page: page_lib.Page, model: str, queue: int, limits: Limits = Limits(),
                 api_key: str | None = None):
        self.engine, self.limits, self.metrics = engine, limits, metrics_lib.Metrics(engine)
        self.model, self._readers, self._sources = model, readers, sources
        self._queue, self._api_key, self._page = queue, api_key, page
        self._created = int(time.time())
        self._reading: dict[str, asyncio.Task] = {}   # by key: questions about one clip read it once
        self._arriving = self._arriving_bytes = 0

    def app(self) -> asgi.ASGIApp:
        """Returns the ASGI application."""
        route = lambda path, function, *methods: routing.Route(path, function, methods=list(methods))
        return applications.Starlette(
            routes=[route("/v1/chat/completions", self.chat, "POST"), route("/v1/models", self.models, "GET"),
                    route("/v1/models/{model:path}", self.one_model, "GET"),
                    route("/health", self.health, "GET"), route("/version", self.version, "GET"),
                    route("/metrics", self.write_metrics, "GET"),
                    route("/v1/annotated", self.annotated, "POST"), *page_lib.routes()],
            middleware=[middleware.Middleware(_Answers, server=self)],
            exception_handlers={404: _no_route, 405: _no_route})

    def check_key(self, scope: asgi.Scope) -> None:
        """Checks the key of a request to /v1, if the server has one.

        Raises:
          errors.Refused: it is another one, or missing.
        """
        if self._api_key is None or not scope["path"].startswith("/v1/"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not secrets.compare_digest(given, f"Bearer {self._api_key}".encode()):
            raise errors.Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    # Small routes

    async def models(self, request: requests.Request) -> responses.Response:
        card = replies.card(self.model, self._created, self.engine.most_tokens)
        return responses.JSONResponse({"object": "list", "data": [card]})

    async def one_model(self, request: requests.Request) -> responses.Response:
        if request.path_params["model"] != self.model:
            raise errors.Refused(404, f"there is no such model; this server has {self.model!r}", "model",
                                 "model_not_found")
        return responses.JSONResponse(replies.card(self.model, self._created, self.engine.most_tokens))

    async def health(self, request: requests.Request) -> responses.Response:
        self._check_open()
        return responses.JSONResponse({"status": "ok"})

    async def version(self, request: requests.Request) -> responses.Response:
        return responses.JSONResponse({"version": molmo2_jax.__version__,
                                       "needs_key": self._api_key is not None})

    async def write_metrics(self, request: requests.Request) -> responses.Response:
        return responses.Response(self.metrics.text(), media_type=metrics_lib.CONTENT_TYPE)

    def _check_open(self) -> None:
        if not self.engine.is_open:
            raise errors.Refused(503, "the server is starting or stopping", retry_after=5)

    async def annotated(self, request: requests.Request) -> responses.Response:
        """Returns a video with points drawn on it; see page.Page."""
        raw = await self._body(request)
        try:
            return await self._page.draw(raw, self._sources)
        finally:
            self._arriving_bytes -= len(raw)

    # Chat completions

    async def chat(self, request: requests.Request) -> responses.Response:
        start = time.monotonic()
        self._check_open()
        if self._arriving + self.engine.num_waiting >= self._queue:
            self.engine.totals.refused += 1
            raise self._full()
        self._arriving += 1
        try:
            raw = await self._body(request)
            try:
                wanted, ticket, events = await _unless_gone(request, self._submit(raw, start))
            finally:
                self._arriving_bytes -= len(raw)
        finally:
            self._arriving -= 1
        name = f"chatcmpl-{uuid.uuid4().hex}"
        headers = {"x-request-id": name}
        if wanted.ignored:
            headers["x-ignored-fields"] = ", ".join(wanted.ignored)
        completion = replies.Completion(name, self.model, ticket)
        if wanted.is_stream:
            pieces = self._stream(completion, ticket, events, wanted.has_usage, start)
            return _Stream(pieces, ticket, headers)
        try:
            answer = await _unless_gone(request, self._last(events, start))
        finally:
            ticket.cancel()
        return responses.JSONResponse(completion.whole(answer), headers=headers)

    def _full(self) -> errors.Refused:
        return errors.Refused(429, f"at most {self._queue} requests may wait; try again", code="queue_full",
                              retry_after=1)

    async def _submit(self, raw: bytes, start: float):
        """Returns (what is wanted, its ticket, the queue of its events)."""
        wanted, job = await asyncio.to_thread(self._understand, raw)
        events: asyncio.Queue[tickets_lib.Event | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: tickets_lib.Event | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        sampling = wanted.sampling or decode.GREEDY
        if not wanted.has_seed:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(31))
        asked = tickets_lib.Request(
            turns=wanted.turns, key=job.key if job else None, max_new_tokens=wanted.max_new_tokens,
            sampling=sampling, stop=wanted.stop, seconds=self.limits.seconds - (time.monotonic() - start))
        try:
            try:
                ticket = self.engine.submit(asked, tell)
            except tickets_lib.NotSeen:
                crops, media = await self._read(job)
                ticket = self.engine.submit(dataclasses.replace(asked, crops=crops, media=media), tell)
        except Exception as error:
            raise self._refusal(error) from error
        return wanted, ticket, events

    async def _body(self, request: requests.Request) -> bytes:
        most = self.limits.body
        if int(request.headers.get("content-length", 0)) > most:
            raise errors.Refused(413, f"a body may have at most {most} bytes")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.arrival):
                async for part in request.stream():
                    size += len(part)
                    self._arriving_bytes += len(part)
                    parts.append(part)
                    if size > most:
                        raise errors.Refused(413, f"a body may have at most {most} bytes")
                    if self._arriving_bytes > _BODIES * most:
                        raise self._full()
            return b"".join(parts)
        except BaseException as error:
            self._arriving_bytes -= size
            if isinstance(error, requests.ClientDisconnect):
                raise _Gone from None
            if isinstance(error, TimeoutError):
                raise errors.Refused(
                    408, f"a body must arrive within {self.limits.arrival:g} seconds") from None
            raise

    def _understand(self, raw: bytes) -> tuple[fields.Wanted, reading.Job | None]:
        """Returns what a body asks for and the media to read; in a thread, as bodies may be large."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise errors.bad("the body must be JSON") from None
        wanted = fields.read(body, self.model)
        return wanted, self._sources.job(wanted)

    async def _read(self, job: reading.Job):
        """Returns crops and media; of several requests for the same, one reads."""
        task = self._reading.get(job.key)
        if task is None:
            task = self._reading[job.key] = asyncio.create_task(asyncio.to_thread(self._readers.read, job))

            def forget(task: asyncio.Task) -> None:
                del self._reading[job.key]
                if not task.cancelled():
                    task.exception()   # seen, also if all who asked are gone

            task.add_done_callback(forget)
        with self.metrics.reading.time():
            return await asyncio.shield(task)

    def _refusal(self, error: Exception) -> Exception:
        """Returns what a client is told of an error."""
        match error:
            case errors.Refused():
                return error
            case tickets_lib.Full():
                return self._full()
            case tickets_lib.Closed():
                return errors.Refused(503, "the server is starting or stopping", retry_after=5)
            case tickets_lib.TooLong():
                return errors.bad(f"{error}: ask for fewer frames (num_frames), fewer pictures or a shorter "
                                  "text", "messages", "context_length_exceeded")
            case buckets.TooLarge():
                return errors.bad(str(error), "messages", "context_length_exceeded")
            case tickets_lib.OutOfTime():
                return errors.Refused(504, str(error), code="timeout")
            case roots.OutOfMemory():
                return errors.Refused(503, str(error), retry_after=5)
            case reading.NotMedia():
                return errors.Refused(415, str(error), "messages")
            case ValueError() if not isinstance(error, generate.NotFinite):
                return errors.bad(str(error), "messages")
        return error

    async def _last(self, events: asyncio.Queue, start: float):
        """Returns the answer."""
        is_first = True
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                raise self._refusal(event) from event
            if is_first:
                self.metrics.first_token.observe(time.monotonic() - start)
                is_first = False
            if event.answer is not None:
                self.metrics.whole.observe(time.monotonic() - start)
                return event.answer

    async def _stream(self, completion: replies.Completion, ticket, events: asyncio.Queue, has_usage: bool,
                      start: float) -> AsyncIterator[bytes]:
        """Yields the events of a stream; a client that hangs up ends it, which frees the row."""
        try:
            yield completion.first()
            is_first = True
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), self.limits.comments)
                except TimeoutError:
                    yield replies.WAITING
                    continue
                if isinstance(event, Exception):
                    yield replies.event(_explained(self._refusal(event), completion.name).body)
                    return
                if is_first:
                    self.metrics.first_token.observe(time.monotonic() - start)
                    is_first = False
                if event.text:
                    yield completion.piece(event.text)
                if event.answer is not None:
                    self.metrics.whole.observe(time.monotonic() - start)
                    yield completion.last(event.answer, has_usage)
                    return
        finally:
            ticket.cancel()


class _Gone(Exception):
    """The client hung up."""


async def _unless_gone(request: requests.Request, work: Awaitable):
    """Returns the result of work; cancels it when the client, whose body has arrived, hangs up.

    Raises:
      _Gone: it did.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hang_up(request: requests.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(responses.StreamingResponse):
    """A stream that gives up its ticket however it ends."""

    def __init__(self, pieces: AsyncIterator[bytes], ticket: tickets_lib.Ticket, headers: dict[str, str]):
        super().__init__(pieces, media_type="text/event-stream",
                         headers=headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._ticket = ticket

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()


def _explained(error: Exception, name: str) -> errors.Refused:
    """Returns what a client is told of an error; the log has the rest."""
    if isinstance(error, errors.Refused):
        return error
    _log.error("request %s failed", name, exc_info=error)
    return errors.Refused(500, f"the server failed; its log names this request {name}")


async def _no_route(request: requests.Request, error: Exception) -> responses.Response:
    status = getattr(error, "status_code", 404)
    raise errors.Refused(status, f"there is no {request.method} {request.url.path[:200]}") from None


class _Answers:
    """Middleware: checks the key, answers errors in the form that clients know, and counts responses."""

    def __init__(self, app: asgi.ASGIApp, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: asgi.Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._server.check_key(scope)
            await self._app(scope, receive, watched)
        except _Gone:
            status = status or 499
        except Exception as error:
            told = _explained(error, f"err-{uuid.uuid4().hex}")
            if status:   # too late to say so
                raise
            headers = told.headers | ({"Connection": "close"} if told.status in (408, 413) else {})
            await responses.JSONResponse(told.body, told.status, headers)(scope, receive, watched)
        finally:
            known = ("/v1/chat/completions", "/v1/models", "/health", "/version", "/metrics")
            route = scope["path"] if scope["path"] in known else "other"
            self._server.metrics.count(route, status)
