"""An announcement of the cloud reaches the run as a signal, exactly once."""

import http.server
import threading
import time

import pytest

from launch.support import notices


@pytest.fixture
def metadata(monkeypatch):
    """Serves a machine's metadata: nothing announced for two requests, then the values that a test sets."""
    values, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.partition("?")[0].rpartition("/")[2]
            asked.append((key, self.path, self.headers["Metadata-Flavor"]))
            first = values.get("first", {}).get(key)
            quiet = first or {"maintenance-event": "NONE", "preempted": "FALSE"}[key]
            late = sum(name == key for name, *_ in asked) > 2
            if late and key not in values:
                closing.wait()  # nothing changes, so the server sends no answer
            self.send_response(200)
            self.send_header("ETag", "abc")
            self.end_headers()
            self.wfile.write((values[key] if late and key in values else quiet).encode())

        def log_message(self, *_):
            pass

    closing = threading.Event()
    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield values, asked
    closing.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("key, value", [
    ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")])
def test_a_notice_makes_one_signal(key, value, metadata, capfd):
    values, asked = metadata
    values[key] = value
    acted = threading.Semaphore(0)
    notices.listen(acted.release)
    assert acted.acquire() and not acted.acquire(timeout=0.2)
    assert f"the machine's {key} is {value}" in capfd.readouterr().err
    paths = [path for name, path, flavour in asked if name == key and flavour == "Google"]
    assert len(paths) == 3 and "last_etag=0" in paths[0] and "last_etag=abc" in paths[1]


def test_a_notice_of_maintenance_that_was_there_before_the_run_makes_no_signal(metadata, capfd):
    """Otherwise a run that saved because of it and was restarted would save and restart in a loop."""
    values, asked = metadata
    values["first"] = {"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}
    acted = threading.Semaphore(0)
    notices.listen(acted.release)
    until = time.monotonic() + 60
    while sum(key == "maintenance-event" for key, *_ in asked) < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not acted.acquire(timeout=0.2) and "from the start: continuing" in capfd.readouterr().err


def test_a_notice_of_maintenance_after_an_earlier_one_is_over_makes_a_signal(metadata):
    values, _ = metadata
    values["first"] = {"maintenance-event": "NONE"}
    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    acted = threading.Semaphore(0)
    notices.listen(acted.release)
    assert acted.acquire(timeout=60)
