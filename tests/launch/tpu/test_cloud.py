"""The meaning of the cloud's answers, and how long a call is retried."""

import sys
import time

import pytest

from launch.tpu import cloud as tpu_cloud
from launch.tpu.cloud import Kind

FAST = tpu_cloud.Pace(poll=0.003, patience=0.2)


@pytest.mark.parametrize("kind, text", [
    (Kind.TRANSIENT, "ERROR: HttpError <503>: The service is currently unavailable."),
    (Kind.TRANSIENT, "ERROR: (gcloud.compute.tpus.describe) UNAVAILABLE: The service is gone"),
    (Kind.TRANSIENT, 'ERROR: {"code": 502, "message": "Bad Gateway"}'),
    (Kind.TRANSIENT, "HTTPError 500: internal"),
    (Kind.TRANSIENT, "ERROR: (gcloud) INTERNAL: Internal error encountered."),
    (Kind.TRANSIENT, "DEADLINE_EXCEEDED: Deadline expired before operation could complete."),
    (Kind.TRANSIENT, "ERROR: gcloud crashed: ('Connection aborted.')"),
    (Kind.TRANSIENT, "There was a problem refreshing your current auth tokens: Max retries exceeded (Failed "
                     "to establish a new connection). Please run: gcloud auth login"),
    (Kind.TRANSIENT, "RESOURCE_EXHAUSTED: Quota exceeded for metric 'Queries', limit 'Queries per minute'"),
    (Kind.TRANSIENT, "HttpError <429>: Too Many Requests"),
    (Kind.TRANSIENT, "ssh: connect to host 10.0.0.2 port 22: Connection refused"),
    (Kind.TRANSIENT, "FAILED_PRECONDITION: the queued resource is SUSPENDING"),
    (Kind.QUOTA, "ERROR: Quota 'TPUV5PPerProject' exceeded. Limit: 4.0."),
    (Kind.QUOTA, "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPodPerProjectPerZoneForTPUAPI' has been exceeded. "
                 "Limit: 503 in zone us-east5-a."),
    (Kind.QUOTA, "HttpError 429: Insufficient quota to satisfy the request"),
    (Kind.CAPACITY, 'RESOURCE_EXHAUSTED: no more capacity in the zone "here-a"; you can try another zone'),
    (Kind.CAPACITY, "HttpError 429: the zone does not have enough resources to fulfill the request"),
    (Kind.REFUSED, "ERROR: (gcloud) your login has expired"),
    (Kind.REFUSED, "Reauthentication failed. cannot prompt during non-interactive execution."),
    (Kind.REFUSED, "('invalid_grant: Bad Request', {'error': 'invalid_grant'})"),
    (Kind.REFUSED, "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied (or it may not exist)"),
    (Kind.REFUSED, "PERMISSION_DENIED: the API has not been used in project 503 before"),
    (Kind.REFUSED, 'INVALID_ARGUMENT: invalid value for "runtime version"'),
    (Kind.REFUSED, "ERROR: (gcloud.compute.tpus) unrecognized arguments: --best-effort"),
    (Kind.REFUSED, "The connection to the server localhost:8080 was refused - did you ...?"),
    (Kind.EXISTS, "ALREADY_EXISTS: Resource 'queuedResources/job' already exists"),
    (Kind.ABSENT, "NOT_FOUND: Resource 'queuedResources/job' was not found"),
    (Kind.UNCLEAR, "ERROR: gcloud crashed (TypeError): 'NoneType' object is not subscriptable"),
    (Kind.UNCLEAR, "")])
def test_answers_are_told_apart(kind, text):
    assert tpu_cloud.classify(text) is kind


def test_the_clouds_own_words_are_one_line():
    text = "Asking\nERROR: (gcloud.compute.tpus) RESOURCE_EXHAUSTED: no capacity\n  try another zone\n"
    assert tpu_cloud.sentence(text) == "RESOURCE_EXHAUSTED: no capacity try another zone"
    assert tpu_cloud.sentence("a\nb\nc\nd") == "b c d" and tpu_cloud.sentence("") == "no reason was given"


def script(tmp_path, *outcomes):
    """Returns a command whose calls have these outcomes, (status, text) each; the last one repeats."""
    tmp_path.joinpath("call.py").write_text(f"""
import pathlib, sys
count = pathlib.Path({str(tmp_path / "count")!r})
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
outcomes = {outcomes!r}
status, text = outcomes[min(number, len(outcomes) - 1)]
print(text, file=sys.stderr if status else sys.stdout)
sys.exit(status)""")
    return [sys.executable, str(tmp_path / "call.py")]


def calls(tmp_path):
    return int((tmp_path / "count").read_text())


def test_a_call_without_a_clear_answer_is_repeated(tmp_path, capsys):
    words = script(tmp_path, (1, "HttpError <503>"), (1, "HttpError <503>"), (1, "strange"), (0, "ACTIVE"))
    caller = tpu_cloud.Caller(tpu_cloud.Pace(poll=0.003, patience=600))
    assert caller.ask(words, "a look").out == "ACTIVE\n" and calls(tmp_path) == 4
    assert capsys.readouterr().err.count("503") == 1  # an unchanged error is reported once


@pytest.mark.parametrize("text", ["PERMISSION_DENIED: no", "your login has expired", "INVALID_ARGUMENT: no"])
def test_a_refusal_is_final(text, tmp_path):
    words = script(tmp_path, (1, text))
    with pytest.raises(tpu_cloud.Problem, match=f"a look was refused: {text}"):
        tpu_cloud.Caller(FAST).ask(words, "a look")
    assert calls(tmp_path) == 1


@pytest.mark.parametrize("text, kind", [
    ("NOT_FOUND: x", Kind.ABSENT), ("ALREADY_EXISTS: x", Kind.EXISTS), ("Quota 'X' exceeded", Kind.QUOTA)])
def test_a_clear_answer_is_returned_at_once(text, kind, tmp_path):
    answer = tpu_cloud.Caller(FAST).ask(script(tmp_path, (1, text)), "a look")
    assert answer.kind is kind and calls(tmp_path) == 1


def test_patience_ends_with_the_clouds_words(tmp_path):
    with pytest.raises(tpu_cloud.Problem, match="a look failed: no more capacity today"):
        tpu_cloud.Caller(FAST).ask(script(tmp_path, (1, "no more capacity today")), "a look")
    assert calls(tmp_path) > 1


def test_pauses_grow_to_five_minutes():
    pauses = tpu_cloud.Pace().pauses()
    taken = [next(pauses) for _ in range(10)]
    assert taken[:3] == [5, 10, 20] and taken[-1] == 300 and taken == sorted(taken)


def test_a_caller_that_ends_ends_what_it_runs_and_starts_no_more():
    caller = tpu_cloud.Caller(FAST)
    process = caller.start(["sh", "-c", "sleep 600 & wait"])
    start = time.monotonic()
    caller.end()
    assert caller.finish(process) == 143 and time.monotonic() - start < 300
    with pytest.raises(tpu_cloud.Ended):
        caller.run(["true"])


def test_a_call_that_hangs_is_no_answer():
    answer = tpu_cloud.Caller(FAST).run(["sleep", "600"], seconds=0.05)
    assert answer.kind is Kind.TRANSIENT


def test_a_missing_program_is_one_sentence():
    with pytest.raises(tpu_cloud.Problem, match="no-such-program must be installed"):
        tpu_cloud.Caller(FAST).run(["no-such-program"])
