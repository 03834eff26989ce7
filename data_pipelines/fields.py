"""Validation of values read from JSON. Functions return the accepted value as an Example stores it.

All raise ValueError naming the field, the rule and the value: "clip: must be [start, end] in seconds; got 2".
"""

import collections
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from molmo2_jax.inputs import prompt

_SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer accepts them
_LARGEST = 1e300                            # larger numbers are treated as infinite


def require(ok: Any, field: str, rule: str, value: Any) -> None:
    """Checks a rule.

    Raises:
      ValueError: not `ok`; the message is "field: rule; got value".
    """
    if not ok:
        raise ValueError(f"{field}: {rule}; got {shorten(value)}")


def shorten(value: Any) -> str:
    """Returns repr(value) for error messages, in at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_object(value: Any, field: str, allowed: Sequence[str], required: Sequence[str]) -> None:
    """Checks a JSON object's fields.

    Raises:
      ValueError: `value` is no object, lacks a field of `required`, or has one that is not in `allowed`.
    """
    require(isinstance(value, dict), field, "must be an object", value)
    unknown = [name for name in value if name not in allowed]
    require(not unknown, field, f"must only have the fields {', '.join(allowed)}", unknown)
    missing = [name for name in required if name not in value]
    require(not missing, field, f"must have the fields {', '.join(required)}", sorted(value))


def items(value: Any, field: str, is_filled: bool) -> list:
    """Returns a list.

    Raises:
      ValueError: it is not a list, or is empty although `is_filled`.
    """
    require(isinstance(value, list), field, "must be a list", value)
    require(value or not is_filled, field, "must not be empty", value)
    return value


def text(value: Any, field: str) -> str:
    """Returns a text.

    Raises:
      ValueError: it is blank, has an unpaired surrogate or contains a special token.
    """
    require(isinstance(value, str) and value.strip(), field, "must be a text that is not empty", value)
    is_whole = value.isascii() or not _SURROGATE.search(value)
    require(is_whole, field, "must not hold half of a surrogate pair", value)
    try:
        prompt.refuse_reserved(value, prompt.RESERVED + prompt.CHOICES)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    return value


def texts(value: Any, field: str) -> str | tuple[str, ...]:
    """Returns a text, or a tuple of texts of which each use draws one.

    Raises:
      ValueError: see text; or the list is empty.
    """
    if not isinstance(value, list):
        return text(value, field)
    return tuple(text(one, f"{field}[{i}]") for i, one in enumerate(items(value, field, True)))


def number(value: Any, field: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns a number as a float.

    Raises:
      ValueError: it is not a finite number in [low, high].
    """
    require(is_finite(value), field, "must be a finite number", value)
    require(value >= low, field, f"must be >= {low}", value)
    require(value <= high, field, f"must be <= {high}", value)
    return float(value)


def identity(value: Any, field: str) -> int:
    """Returns an object's id or a count.

    Raises:
      ValueError: it is not an integer >= 0.
    """
    require(is_int(value) and value >= 0, field, "must be an integer >= 0", value)
    return value


def flag(value: Any, field: str) -> bool:
    """Returns a boolean.

    Raises:
      ValueError: it is not true or false.
    """
    require(isinstance(value, bool), field, "must be true or false", value)
    return value


def pair(value: Any, field: str, check: Callable[[Any], bool], rule: str) -> tuple:
    """Returns a pair of values that both pass `check`; `rule` describes them in the message.

    Raises:
      ValueError: it is not such a pair.
    """
    is_pair = isinstance(value, list) and len(value) == 2 and all(map(check, value))
    require(is_pair, field, f"must be {rule}", value)
    return tuple(value)


def unique(values: Iterable, field: str, name: str) -> None:
    """Checks that no value repeats; `name` describes the values in the message.

    Raises:
      ValueError: a value repeats.
    """
    repeated = [value for value, times in collections.Counter(values).items() if times > 1]
    require(not repeated, field, f"must not repeat the same {name}", repeated)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive_int(value: Any) -> bool:
    return is_int(value) and value > 0


def is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -_LARGEST <= value <= _LARGEST
