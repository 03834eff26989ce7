"""Positions of all streams together: the first ones, and what becomes of them when their number changes.

Positions are those of stream.py. Whatever happens, each number is read once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines import ledger

NO_PACKER = json.dumps({"waits": [], "longest_wait": 0})


def first(stream: int, book: ledger.Ledger) -> dict[str, Any]:
    """Returns the position at which a stream begins."""
    return book.state() | {"next": stream, "backlog": "[]", "waiting": "[]", "packer": NO_PACKER,
                           "killers": "[]"}


def redivide(positions: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """Returns the positions of `number` streams that read exactly what the given ones had left to read.

    What waited in a packer or lay behind the stream that had come farthest is shared out as backlog, lowest
    numbers first. Counts and lists of broken records go to the first of the new streams.
    """
    highest = max(position["next"] for position in positions)
    start = -(-highest // number) * number
    left = set()
    for position in positions:
        left |= {*json.loads(position["waiting"]), *json.loads(position["backlog"]),
                 *range(position["next"], start, len(positions))}
    left = sorted(left)
    killers = sorted({tuple(place) for position in positions for place in json.loads(position["killers"])})
    longest = max(json.loads(position["packer"])["longest_wait"] for position in positions)
    books = [ledger.merge(positions)] + [ledger.EMPTY] * (number - 1)
    return [books[stream] | {
        "next": start + stream, "backlog": json.dumps(left[stream::number]), "waiting": "[]",
        "packer": json.dumps({"waits": [], "longest_wait": longest}), "killers": json.dumps(killers)}
        for stream in range(number)]
