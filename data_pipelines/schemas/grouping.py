"""Rows that belong to one image or video."""

from collections.abc import Iterable


def by(rows: Iterable[dict], column: str) -> list[tuple[str, list[dict]]]:
    """Returns (value, rows with this value) of a column, both in order of appearance."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return list(groups.items())
