"""Initial positions of streams, and their redistribution when the number of streams changes.

rows.py defines a position. After a redistribution every number is still read exactly once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.stream import ledger

NO_PACKER = json.dumps({"waits": [], "longest_wait": 0})


def first(stream: int, book: ledger.Ledger) -> dict[str, Any]:
    """Returns the initial position of a stream."""
    return book.state() | {"next": stream, "backlog": "[]", "waiting": "[]", "packer": NO_PACKER,
                           "killers": "[]"}


def redivide(positions: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """Returns the positions of `number` streams that read exactly what the given ones had left to read.

    Numbers that wait in a packer, or that are lower than the next one of the most advanced stream, become
    backlog of the new streams, lowest first. The first new stream gets the counts and lists of broken
    records.
    """
    highest = max(position["next"] for position in positions)
    start = -(-highest // number) * number
    left = set()
    for position in positions:
        left |= {*json.loads(position["waiting"]), *json.loads(position["backlog"]),
                 *range(position["next"], start, len(positions))}
    left = sorted(left)
    poison = sorted({tuple(place) for position in positions for place in json.loads(position["killers"])})
    longest = max(json.loads(position["packer"])["longest_wait"] for position in positions)
    books = [ledger.merge(positions)] + [ledger.EMPTY] * (number - 1)
    return [books[stream] | {
        "next": start + stream, "backlog": json.dumps(left[stream::number]), "waiting": "[]",
        "packer": json.dumps({"waits": [], "longest_wait": longest}), "killers": json.dumps(poison)}
        for stream in range(number)]
