"""Tables of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator


def cell(text: object) -> str:
    """``text`` for a cell of a table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;").strip()


def rows(head: str, lines: Iterator[str]) -> list[str]:
    """A table; nothing without ``lines``."""
    body = list(lines)
    return ["", head, "|" + "---|" * head.count(" |"), *body] if body else []
