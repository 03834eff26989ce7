import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from launch.support import field_types


@dataclasses.dataclass(frozen=True)
class Parent:
    size: int = 1
    derived: int = dataclasses.field(init=False, default=0)


class Child(Parent):
    pass


def built(cls, is_called=True):
    return field_types.Built(cls, cls.__name__, is_called)


FITTING = [
    (3, int), (3, float), (3.5, float), (True, bool), ("a", str), (None, None), (None, int | None),
    ((), tuple[int, ...]), ((1, 2), tuple[int, ...]), ((1, "a"), tuple[int, str]),
    ((("a", 1), "b"), tuple[str | tuple[str, float], ...]), ("a", Literal["a", 2]),
    ({"a": 1}, Mapping[str, int]), ({}, dict[str, int]), ((1, 2), Sequence[int]),
    ([1], Any), (built(Child), Parent), (built(Parent), Parent | None),
    ((built(Child), built(Parent)), tuple[Parent, ...]),
]
UNFITTING = [
    (True, int), (1, bool), (3.0, int), ("3", float), (None, int), (False, None), ([1], tuple[int, ...]),
    ((1,), tuple[int, int]), ((1, "a"), tuple[int, ...]), (1, Literal[True, "a"]),
    ({1: 1}, Mapping[str, int]), ([1], Sequence[int]), (built(Parent), Child),
    (built(Child, is_called=False), Parent), (built(Parent), int), ("a", tuple[str, ...]),
]


@pytest.mark.parametrize("value, annotation", FITTING)
def test_values_that_fit(value, annotation):
    assert field_types.problem(value, annotation) is None


@pytest.mark.parametrize("value, annotation", UNFITTING)
def test_values_that_do_not_fit(value, annotation):
    message = field_types.problem(value, annotation)
    assert message.startswith("must be ") and f"; got {value!r}" in message


def test_lists_and_classes_come_with_the_spelling_that_was_meant():
    assert field_types.problem([[1, 2]], tuple[tuple[int, int], ...]) == (
        "must be tuple[tuple[int, int], ...]; got [[1, 2]] (a list; write ((1, 2),))")
    assert field_types.problem(built(Child, is_called=False), Parent | None) == (
        "must be Parent or None; got @Child (the class; write @Child() for an object)")


def test_only_fields_of_the_constructor_can_be_set():
    assert field_types.of(Parent) == {"size": int}
