"""Turns the cloud's notices that this machine will be shut down into SIGTERM, on which a run saves and ends.

The metadata of a TPU machine announce preemption and maintenance before it is shut down. A maintenance notice
remains until the maintenance is over, and a run that saved because of it starts again on the same machine.
A maintenance notice that is present from the start is therefore only reported; otherwise the run would save
and restart in a loop.
Source: the cloud's pages "About VM metadata" and "Preemptible VM instances", November 2026.
"""

import os
import signal
import sys
import threading
import time
import urllib.request

_QUIET = {"maintenance-event": "NONE", "preempted": "FALSE"}  # key: its value while nothing is announced
_STAYS = "maintenance-event"
_RETRY = 30.0  # seconds before an unreachable server is asked again


def listen(act=lambda: os.kill(os.getpid(), signal.SIGTERM)) -> None:
    """Calls `act` on a notice; by default it sends SIGTERM to this process.

    GCE_METADATA_HOST names another metadata server.
    """
    for key in _QUIET:
        threading.Thread(target=_listen, args=(key, act), daemon=True, name=f"notices of {key}").start()


def _listen(key, act):
    host, etag, before = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal"), "0", None
    while True:
        url = (f"http://{host}/computeMetadata/v1/instance/{key}?wait_for_change=true&timeout_sec=60"
               f"&last_etag={etag}")
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=90) as answer:
                value, etag = answer.read().decode().strip(), answer.headers.get("ETag", "0")
        except OSError:
            time.sleep(_RETRY)
            continue
        is_first, is_new, before = before is None, value != before, value
        if value == _QUIET[key] or not is_new:
            continue
        if is_first and key == _STAYS:
            print(f"the machine's {key} is {value} from the start: continuing", file=sys.stderr, flush=True)
            continue
        print(f"the machine's {key} is {value}: saving, then leaving", file=sys.stderr, flush=True)
        act()
        return
