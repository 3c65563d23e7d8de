"""A decision of ``auto``: what was decided, and why; the words are those of the report page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decision:
    """``value`` was decided ``about`` something."""

    about: str
    """The key of what it is about; the page has it as the word auto_ABOUT."""
    value: str
    """Numbers and names, the same in every language."""
    why: str
    """The key of the reason; the page has it as the sentence auto_WHY, with ``values`` in it."""
    values: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    """Of what network, where there are several decisions about the same."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
