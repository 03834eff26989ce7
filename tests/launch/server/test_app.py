"""The routes over an engine that does as it is told: full queues, slow answers, failures, clients that go."""

import socket
import threading
import time

import httpx
import openai
import pytest

from launch.server import app as app_lib
from launch.server import listening
from launch.server import media
from launch.server import page
from launch.server import reading
from molmo2_jax import config as config_lib
from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.serving import engine as engine_lib
from molmo2_jax.serving import roots
from molmo2_jax.serving import tickets

QUEUE = 3
INPUTS = config_lib.InputConfig()
ASK = {"model": "m", "messages": [{"role": "user", "content": "What?"}]}
SEE = {"model": "m", "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}


class Engine:
    """Answers with what `events` holds: events, or exceptions; waits for `go` before the first."""

    def __init__(self):
        self.totals, self.roots = engine_lib.Totals(), roots.Roots(0)
        self.is_open, self.most_tokens, self.num_rows, self.num_busy, self.num_waiting = True, 99, 1, 0, 0
        self.compilations = 0
        self.events, self.go, self.refusals = [], threading.Event(), []
        self.tickets, self.told = [], threading.Event()

    def submit(self, request, tell):
        if self.refusals:
            raise self.refusals.pop(0)
        if request.key is not None and request.crops is None:
            raise tickets.NotSeen("not seen")
        ticket = tickets.Ticket(request, tell, types.Media(), (1, 0), [5], [], 9, None, False)
        self.tickets.append(ticket)

        def work():
            self.go.wait()
            for event in self.events:
                ticket.tell(event)
            self.told.set()

        threading.Thread(target=work, daemon=True).start()
        return ticket


class Readers:
    """Reads nothing, slowly, and counts how often."""

    def __init__(self):
        self.calls, self.go, self.error = 0, threading.Event(), None

    def read(self, job):
        self.calls += 1
        self.go.wait()
        if self.error:
            raise self.error
        return types.Crops(*[None] * 4), types.Media()


@pytest.fixture
def served(monkeypatch):
    """(engine, readers, URL) of a server in this process that answers "Yes." """
    monkeypatch.setattr(listening, "HEADER_SECONDS", 1.0)
    engine, readers = Engine(), Readers()
    engine.events = [tickets.Event("Ye"), tickets.Event("s.", generate.Answer(text="Yes.", new_tokens=2))]
    engine.go.set()
    readers.go.set()
    made = app_lib.Server(engine, readers, media.Sources(media.Rules(), INPUTS),
                           page=page.Page(page.Drawer(60.0, 1 << 32), 60.0), model="m", queue=QUEUE,
                          limits=app_lib.Limits(body=1000, arrival=1.0, comments=0.05))
    listener = listening.bind("127.0.0.1", 0)
    server = listening.server(made.app(), seconds=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield engine, readers, listening.url(listener)
    engine.go.set()
    readers.go.set()
    server.should_exit = True
    thread.join()


def post(url, body=ASK, **more):
    return httpx.post(f"{url}/chat/completions", json=body | more, timeout=60, trust_env=False)


@pytest.mark.slow(6)
def test_a_full_queue_is_429_and_the_openai_package_tries_again(served):
    engine, _, url = served
    engine.num_waiting = QUEUE
    response = post(url)
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full" and engine.totals.refused == 1
    engine.num_waiting, engine.refusals = 0, [tickets.Full("full"), tickets.Closed("closed")]
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=2)
    found = client.chat.completions.create(model="m", messages=ASK["messages"])
    assert found.choices[0].message.content == "Yes." and not engine.refusals


def test_the_queue_counts_requests_whose_media_are_being_read_and_reads_a_medium_once(served):
    engine, readers, url = served
    readers.go.clear()
    found = []

    def ask():
        while (status := post(url, SEE).status_code) == 429:   # one of the requests below came first
            time.sleep(0.01)
        found.append(status)

    threads = [threading.Thread(target=ask) for _ in range(QUEUE)]
    for thread in threads:
        thread.start()
    late = time.monotonic() + 60
    while post(url).status_code != 429:
        assert time.monotonic() < late
    readers.go.set()
    for thread in threads:
        thread.join()
    assert found == [200] * QUEUE and readers.calls == 1


def test_before_the_programs_are_compiled_everything_is_503(served):
    engine, _, url = served
    engine.is_open = False
    for response in (post(url), httpx.get(f"{url.removesuffix('/v1')}/health", trust_env=False)):
        assert response.status_code == 503 and int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("error, status, words", [
    (RuntimeError("/secret/path failed"), 500, "its log names this request"),
    (generate.NotFinite("logits must be finite"), 500, "its log names this request"),
    (tickets.OutOfTime("within 3 seconds"), 504, "within 3 seconds"),
    (roots.OutOfMemory("too little memory"), 503, "too little memory")])
def test_failures_have_a_status_and_no_path(served, error, status, words):
    engine, _, url = served
    engine.events = [error]
    response = post(url)
    assert response.status_code == status and words in response.json()["error"]["message"]
    assert "/secret" not in response.text
    streamed = post(url, stream=True)
    assert streamed.status_code == 200   # too late for another one
    assert words in streamed.text.split("data: ")[-1] and "[DONE]" not in streamed.text
    with pytest.raises(openai.APIError, match=words):
        list(openai.OpenAI(base_url=url, api_key="x").chat.completions.create(
            model="m", messages=ASK["messages"], stream=True))


def test_errors_that_trying_again_does_not_help_say_so(served):
    engine, _, url = served
    engine.events = [tickets.OutOfTime("late")]
    client = openai.OpenAI(base_url=url, api_key="x", max_retries=5)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="m", messages=ASK["messages"])
    assert len(engine.tickets) == 1


@pytest.mark.parametrize("error, status", [
    (reading.Failed("their decoder crashed"), 400), (reading.NotMedia("is a zip archive"), 415),
    (ValueError("cannot be decoded"), 400), (RuntimeError("/secret"), 500)])
def test_media_that_cannot_be_read(served, error, status):
    _, readers, url = served
    readers.error = error
    response = post(url, SEE)
    assert response.status_code == status and "/secret" not in response.text


def test_a_stream_without_news_has_comments(served):
    engine, _, url = served
    engine.go.clear()
    with httpx.stream("POST", f"{url}/chat/completions", json=ASK | {"stream": True}, timeout=60,
                      trust_env=False) as response:
        lines = response.iter_lines()
        seen = [next(lines) for _ in range(8)]
        assert seen.count(": waiting") > 1 and '"role": "assistant"' in seen[0]
        engine.go.set()
        rest = [*lines]
    assert rest[-2:] == ["data: [DONE]", ""] and any('"content": "s."' in line for line in rest)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_gives_up_its_ticket(served, stream):
    engine, _, url = served
    engine.go.clear()
    with pytest.raises(httpx.TimeoutException), httpx.stream(
            "POST", f"{url}/chat/completions", json=ASK | {"stream": stream}, timeout=0.2,
            trust_env=False) as response:
        time.sleep(1)
        for _ in response.iter_lines():
            break
        raise httpx.ReadTimeout("as if")
    late = time.monotonic() + 60
    while not (engine.tickets and engine.tickets[0].is_cancelled):
        assert time.monotonic() < late
        time.sleep(0.01)
    engine.go.set()
    assert post(url).status_code == 200


def test_bodies_and_headers_that_do_not_arrive_cost_their_connection(served):
    _, _, url = served
    host, port = httpx.URL(url).host, httpx.URL(url).port
    for start, answer in ((b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{",
                           b"HTTP/1.1 408"), (b"POST /v1/chat/comp", b""), (b"", b"")):
        with socket.create_connection((host, port)) as connection:
            connection.settimeout(60)
            connection.sendall(start)
            assert connection.recv(100)[:12] == answer
    assert post(url, user="x" * 2000).status_code == 413
    assert post(url).status_code == 200
