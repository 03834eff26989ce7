"""Checks values against the type annotations of fields: bool is not int, a list is not a tuple."""

import collections.abc
import dataclasses
import types
import typing
from typing import Any


@dataclasses.dataclass(frozen=True)
class Built:
    """Placeholder for an object that gin will build: `@name()` is an instance of cls, `@name` cls itself."""
    cls: Any
    name: str
    is_called: bool

    def __repr__(self):
        return f"@{self.name}" + "()" * self.is_called


def of(cls: type) -> dict[str, Any]:
    """Returns the annotation of every field of a dataclass that its constructor takes."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def fits(value: Any, annotation: Any) -> bool:
    """Returns whether a field with this annotation may hold the value; an int is accepted as a float."""
    if annotation is Any:
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _items_fit(value, arguments)
    if origin is not None and issubclass(origin, collections.abc.Mapping):
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items())
    if origin is collections.abc.Sequence:
        return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
    if isinstance(value, Built):
        return (value.is_called and isinstance(value.cls, type) and isinstance(annotation, type)
                and issubclass(value.cls, annotation))
    if annotation in (None, type(None)):
        return value is None
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def _items_fit(values: tuple, annotations: tuple) -> bool:
    if annotations[-1:] == (...,):
        annotations = annotations[:1] * len(values)
    return len(values) == len(annotations) and all(map(fits, values, annotations))


def describe(annotation: Any) -> str:
    """Returns the annotation as short text: `tuple[int, int]`, `'a' or 'b'`, `VisionConfig`."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(map(repr, arguments))
    if arguments:
        name = typing.get_origin(annotation).__name__
        return f"{name}[{', '.join('...' if a is ... else describe(a) for a in arguments)}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def problem(value: Any, annotation: Any) -> str | None:
    """Returns the rest of a sentence that says why the value does not fit, or None if it fits."""
    if fits(value, annotation):
        return None
    hint = ""
    if isinstance(value, list) and fits(_tuples(value), annotation):
        hint = f" (a list; write {_tuples(value)!r})"
    elif isinstance(value, Built) and fits(dataclasses.replace(value, is_called=True), annotation):
        hint = f" (the class; write {value!r}() for an object)"
    return f"must be {describe(annotation)}; got {value!r}{hint}"


def _tuples(value: Any) -> Any:
    """Returns the value with lists replaced by tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
