"""Judges of captions: an endpoint on this machine, answers that are recorded, requests that fail."""

import http.server
import json
import threading

import pytest

from data_pipelines.scoring import statements
from data_pipelines.suites import judges


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers with the next of `said`: a text, or a status."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        answer = self.server.said.pop(0)
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        if isinstance(answer, str):
            self.wfile.write(json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judges, "FIRST_WAIT", 0.001)
    with http.server.HTTPServer(("localhost", 0), Judge) as one:
        one.asked, one.said = [], []
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        one.url = f"http://localhost:{one.server_port}/v1/"
        yield one
        one.shutdown()
        thread.join()


FACTS = [statements.Statement("A dog runs.", "Action"), statements.Statement("It is red.", None)]
TARGET = statements.Target(statements=tuple(FACTS), caption="A red dog runs.")


def test_an_endpoint_is_asked_in_three_steps_and_never_twice(server, tmp_path, monkeypatch):
    monkeypatch.setenv(judges.KEY, "secret")
    server.said = ["A dog runs.", "A dog runs. | Action\nThe sky | Objct", "1. Stated\n2. Not Stated",
                   "1. Stated\n2. Not Stated"]
    record = tmp_path / "out/judgements.jsonl"
    judge = judges.endpoint(server.url, "some-model", record)
    scores = statements.score([TARGET], ["A dog runs."], judge)
    assert (scores["recall"], scores["precision"], scores["f1"]) == (0.5, 0.5, 0.5)
    paths, keys, bodies = zip(*server.asked)
    assert set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer secret"}
    assert all((body["model"], body["temperature"]) == ("some-model", 0) for body in bodies)
    assert "Quantity/Number" in bodies[1]["messages"][0]["content"]
    assert "1. A dog runs.\n2. It is red." in bodies[2]["messages"][0]["content"]
    again = statements.score([TARGET], ["A dog runs."], judges.endpoint(server.url, "some-model", record))
    assert again == scores and len(server.asked) == 4
    assert statements.score([TARGET], ["A dog runs."], statements.recorded(record)) == scores


def test_a_question_about_a_caption_is_answered_once(server, tmp_path):
    server.said = ["B. sits"]
    record = tmp_path / "judgements.jsonl"
    given = "What does it do?\nA. runs\nB. sits", "A dog sits."
    judge = judges.endpoint(server.url, record=record)
    assert [judge.choose(*given) for _ in range(2)] == ["B. sits"] * 2
    [(_, _, body)] = server.asked
    assert all(text in body["messages"][0]["content"] for text in given)
    assert statements.recorded(record).choose(*given) == "B. sits"
    with pytest.raises(ValueError, match="must hold answers about every caption; got none to 'Which"):
        statements.recorded(record).choose("Which?", "A dog sits.")


def test_a_record_torn_by_a_kill_goes_on(server, tmp_path):
    record = tmp_path / "judgements.jsonl"
    record.write_text('{"caption": "x", "split": "y | Action"}\n{"caption": "z", "spl')
    server.said = ["facts", "b | Action"]
    judge = judges.endpoint(server.url, record=record)
    assert judge.split("x") == [statements.Statement("y", "Action")]
    assert judge.split("z") == [statements.Statement("b", "Action")]
    assert set(statements.read_record(record)[0]) == {"x", "z"}


def test_a_busy_endpoint_is_asked_again_and_a_refusal_ends(server):
    server.said = [503, 429, "fine"]
    assert judges.complete(server.url, "m", "p") == "fine"
    server.said = [401]
    with pytest.raises(judges.JudgeError, match="must answer; got status 401"):
        judges.complete(server.url, "m", "p")
    server.said = [500] * judges.ATTEMPTS
    with pytest.raises(judges.JudgeError, match="status 500"):
        judges.complete(server.url, "m", "p")


def test_no_endpoint_is_an_error_and_no_caption_is_skipped(monkeypatch):
    monkeypatch.setattr(judges, "FIRST_WAIT", 0.001)
    with pytest.raises(judges.JudgeError, match="the judge at http://localhost:9 must answer"):
        statements.score([TARGET], ["A dog."], judges.endpoint("http://localhost:9"))
