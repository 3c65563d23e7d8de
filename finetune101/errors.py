"""The user's mistake: one sentence that says what to do. Every other exception is a bug and keeps its traceback."""

from __future__ import annotations


class Refused(ValueError):
    """What the user asked for cannot be done; the message is one sentence that says what to do instead."""
