"""The user's mistake is one sentence that says what to do; how a sentence shows values, names and types.

Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
import reprlib
import types
from collections.abc import Iterator
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

import msgspec


class Refused(ValueError):
    """What the user asked for cannot be done; the message is one sentence that says what to do instead."""


def shown(value: Any) -> str:
    """``value`` for messages, shortened, whatever it holds."""
    short = reprlib.Repr()
    short.maxstring, short.maxother, short.maxlevel = 60, 60, 3
    try:
        return value.isoformat() if hasattr(value, "isoformat") else short.repr(value)
    except ValueError:  # a number of thousands of digits
        return "a very long number"


def shortened(text: str, most: int = 200) -> str:
    """``text`` of at most ``most`` characters, for messages."""
    return text if len(text) <= most else text[: most - 1] + "…"


def escaped(name: str) -> str:
    """``name`` for people: control characters and bytes that are not UTF-8 as \\xNN, so that a terminal shows them."""
    return "".join(
        f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff"
        else c if c.isprintable() or c == " "
        else f"\\x{ord(c):02x}" if ord(c) < 256
        else f"\\u{ord(c):04x}"
        for c in name
    )  # fmt: skip


def markdown(value: object) -> str:
    """``value`` so that Markdown shows it as it is: no HTML, link, picture, emphasis, cell or line of its own."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", escaped(str(value)))
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word they emphasise nothing


def parts(value: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, type) of each part of ``value``, as far as ``kind`` is a table or a list that says."""
    core = bare(kind)
    inner = get_args(core)
    if get_origin(core) in (Union, types.UnionType):
        for option in inner:
            yield from parts(value, option)
    elif isinstance(value, dict) and get_origin(core) is dict:
        yield from ((str(key), one, inner[1]) for key, one in value.items())
    elif isinstance(value, dict) and hasattr(core, "__annotations__"):
        hints = get_type_hints(core, include_extras=True)
        required = ((key, get_args(h)[0] if get_origin(h) is NotRequired else h) for key, h in hints.items())
        yield from ((key, value[key], hint) for key, hint in required if key in value)
    elif isinstance(value, list | tuple) and get_origin(core) in (list, tuple):
        yield from ((str(i), one, inner[0]) for i, one in enumerate(value))


def bare(hint: Any) -> Any:
    """``hint`` without bounds and NotRequired."""
    while hasattr(hint, "__metadata__") or get_origin(hint) is NotRequired:
        hint = hint.__origin__ if hasattr(hint, "__metadata__") else get_args(hint)[0]
    return hint


def must_be(hint: Any) -> str:
    """In words what a value of the type ``hint`` is: "a whole number of at least 1", "one of a, b", "true or false"."""
    bounds = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    core = bare(hint)
    inner = [option for option in get_args(core) if option not in (type(None), Ellipsis)]
    if get_origin(core) in (Union, types.UnionType):
        return ", or ".join([must_be(option) for option in inner] + ["none"] * (type(None) in get_args(core)))
    if get_origin(core) is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if get_origin(core) in (tuple, list):
        fixed = get_origin(core) is tuple and Ellipsis not in get_args(core)
        fewest = len(inner) if fixed else max((meta.min_length or 0 for meta in bounds), default=0)
        amount = f" of {fewest} values" if fixed or fewest > 1 else " of at least one value" if fewest else ""
        return f"a list{amount} in which each is {must_be(inner[0])}" if inner else "a list"
    words = {bool: "true or false", str: "text", int: "a whole number", float: "a number", Any: "a value"}
    word = words.get(core, "a table of names and values")
    return f"{word} {limits}" if core in (int, float) and (limits := _limits(bounds)) else word


def _limits(bounds: list[msgspec.Meta]) -> str:
    limits = {name: getattr(meta, name) for meta in bounds for name in ("ge", "gt", "le", "lt")}
    finite = {name: end for name, end in limits.items() if end is not None and abs(end) < 1e100}
    ends = {name: str(end) if isinstance(end, int) else f"{end:g}" for name, end in finite.items()}
    low = f"of at least {ends['ge']}" if "ge" in ends else f"above {ends['gt']}" if "gt" in ends else ""
    high = f"at most {ends['le']}" if "le" in ends else f"below {ends['lt']}" if "lt" in ends else ""
    return ", ".join(filter(None, (low, high)))
