"""Values of a YAML file as the types that a config declares, and names one may have meant."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, Literal

__all__ = ["coerce", "near"]


def near(name: str, known: Any) -> str:
    """What to add to a message about an unknown name: the one that was meant, or all."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; known: {', '.join(known)}"


def coerce(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as its field's type. YAML reads 1e-3 as a string, so numbers in strings are accepted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"config: {where} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str) and args[0] is str:
            value = [value]
        if not isinstance(value, (list, tuple)) or (Ellipsis not in args and len(value) != len(args)):
            kind = "names" if args[0] is str else "numbers"
            raise ValueError(f"config: {where} must be a list of {kind}, got {value!r}")
        return tuple(coerce(v, args[0], where) for v in value)
    if hint is bool or isinstance(value, bool):
        if hint is not bool or not isinstance(value, bool):
            raise ValueError(f"config: {where} must be {hint.__name__}, got {value!r}")
        return value
    if hint is str:
        if not isinstance(value, str):
            raise ValueError(f"config: {where} must be text, got {value!r}")
        return value
    try:
        number = float(value)
        if hint is int:
            if not number.is_integer():
                raise ValueError
            return int(value) if isinstance(value, int) else int(number)
        return number
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"config: {where} must be {hint.__name__}, got {value!r}") from None
