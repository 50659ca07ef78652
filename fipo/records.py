"""Strict conversion between frozen dataclasses and plain values (JSON, YAML).

An unknown key, a missing one, a wrong type: each is a `UserError` that names the key, the value and what was expected.
Nothing is bent but integers to floats and lists to tuples.
"""

import dataclasses
import sys
import types
import typing
from typing import Any, Literal, TypeVar

from fipo.errors import UserError

T = TypeVar("T")


def require(condition: bool, key: str, given: Any, expected: str) -> None:
    """Raise the `UserError` of a config value that is not as expected."""
    if not condition:
        shown = repr(given)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        raise UserError(f"config: {str(key).rstrip('.')[:200]} is {shown}; expected {expected}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON or YAML values: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type[T], values: Any, path: str = "") -> T:
    """Build the record `cls` from plain values. Strict: unknown keys, missing keys and wrong types are `UserError`s."""
    require(isinstance(values, dict), path or "the config", values, "a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    for key in values:
        require(key in hints, f"{path}{key}", values[key], f"one of the keys {', '.join(hints)}")
    required = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for key in required:
        require(key in values, f"{path}{key}", None, "a value: it has no default")
    return cls(**{key: _convert(hints[key], value, f"{path}{key}") for key, value in values.items()})


def _as_number(value: Any) -> str:
    """How YAML wants a number that it took for text, as 3e-4."""
    try:
        mantissa, e, exponent = f"{value:s}".lower().partition("e")
        float(value)
    except (TypeError, ValueError):
        return ""
    point = "" if "." in mantissa else ".0"
    return f"; YAML reads this as text, write {mantissa}{point}{e}{exponent}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the type `hint`; integers pass as floats, lists as tuples, nothing else is bent."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(arguments[0], value, path)
    if origin is Literal:
        require(isinstance(value, str) and value in arguments, path, value, "one of " + ", ".join(arguments))
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), path, value, "a list")
        return tuple(_convert(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{path}.")
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        require(number, path, value, "a finite number" + _as_number(value))
        return float(value)
    require(isinstance(value, hint) and not (hint is int and isinstance(value, bool)), path, value, hint.__name__)
    require(hint is not int or abs(value) < 2**63, path, value, "an integer of at most 64 bits")
    return value
