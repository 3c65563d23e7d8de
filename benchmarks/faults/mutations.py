"""Changes of files: bytes, text and JSON values, by chance."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

WRONG: tuple[Any, ...] = (
    None, [], {}, "", "x", -1, 0, 1.5, 1e308, 10**30, True, [[1]], {"a": {}}, "../../../x", "/etc/passwd", "\0",
    "\ud800", "<script>alert(1)</script>", "nan", "x" * 100_000, [0] * 10_000, float("nan"), float("inf"),
)  # fmt: skip
LINES = (
    "a: &x [*x]", "- : -", "? !!python/object/apply:os.system ['touch MARKER']", "lr: !!binary x", "\t", "[", "}", "\0",
    "lr: 1e-2", "lr: .nan", "optim: {lr: yes}", "system: {device: gpu}", "a: " + "[" * 300, "é\xff", "=", '"',
    "on: off",
)  # fmt: skip
SIZES = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff")  # as numbers in a header


def changed_bytes(rng: random.Random, content: bytes) -> bytes:
    """``content`` cut, grown, or with some bytes changed, moved or repeated; early bytes are hit more often.

    Never ``content`` itself.
    """
    while (changed := _other_bytes(rng, content)) == content:
        pass
    return changed


def _other_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        at = min(int(len(data) * rng.random() ** rng.choice([1, 3, 8])), max(0, len(data) - 1))
        size = rng.choice([1, 2, 4, 8, 64, 1000])
        way = rng.randrange(8)
        if way < 3 and data:
            data[at] = rng.choice([0, 255, 127, 128, data[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
        elif way == 3:
            data[at : at + size] = b""
        elif way == 4:
            data[at:at] = rng.randbytes(size)
        elif way == 5:
            data[at : at + 4] = rng.choice(SIZES)
        elif way == 6:
            data[at:at] = data[at : at + size] * rng.choice([1, 2, 50])
        else:
            del data[at:]
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists the first items."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(min(3, len(value))):
            yield from places(value[number], (*path, number))


def changed_json(rng: random.Random, value: Any) -> str:
    """``value`` as JSON text with one to three of its places wrong, missing, or of another kind; never ``value``."""
    while (changed := _other_json(rng, value)) == json.dumps(value):
        pass
    return changed


def _other_json(rng: random.Random, value: Any) -> str:
    made = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice([path for path in places(made) if path] or [()])
        wrong = copy.deepcopy(rng.choice(WRONG))
        if not path:
            made = wrong
            continue
        at = made
        for key in path[:-1]:
            at = at[key]
        if rng.random() < 0.2:
            del at[path[-1]]
        else:
            at[path[-1]] = wrong
    return json.dumps(made)


def changed_text(rng: random.Random, text: str) -> bytes:
    """``text`` with lines repeated, swapped, dropped or foreign, or with other bytes; never the lines of ``text``."""
    lines = "\n".join(text.splitlines()).encode("utf-8", "surrogatepass")
    while (changed := _other_text(rng, text)).rstrip(b"\n") == lines:
        pass
    return changed


def _other_text(rng: random.Random, text: str) -> bytes:
    lines = text.splitlines() or [""]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, way = rng.randrange(len(lines)), rng.randrange(6)
        if way == 0:
            lines.insert(at, rng.choice(LINES))
        elif way == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif way == 2 and len(lines) > 1:
            del lines[at]
        elif way == 3:
            head, sign, _ = lines[at].partition(rng.choice([":", "=", ","]))
            wrong = str(rng.choice(WRONG))[:200]
            lines[at] = f"{head}{sign} {wrong}"
        elif way == 4:
            lines[at] = " " * rng.randrange(9) + lines[at]
        else:
            return changed_bytes(rng, "\n".join(lines).encode("utf-8", "surrogatepass"))
    return "\n".join(lines).encode("utf-8", "surrogatepass")
