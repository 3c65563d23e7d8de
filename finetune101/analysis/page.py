"""A report page in the making: sections in one language, written as self-contained HTML and as Markdown."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune101.runs import atomic

TEMPLATES = Path(__file__).parent / "templates"
LANGUAGES = ("en", "zh")

Cell = tuple[str, float | str]  # what is shown, and what is sorted by


class Page:
    """A title, a headline and sections; pictures lie in ``folder``. Raises ValueError for an unknown language."""

    def __init__(self, folder: Path, lang: str) -> None:
        if lang not in LANGUAGES:
            raise ValueError(f"--lang is {lang}; choose from {', '.join(LANGUAGES)}")
        self.words: dict[str, str] = json.loads((TEMPLATES / f"{lang}.json").read_text(encoding="utf-8"))
        self.folder, self.lang = folder, lang
        self.title, self.headline = "", ""
        self.sections: list[dict[str, Any]] = []

    def say(self, key: str, /, **values: Any) -> str:
        """The sentence ``key`` in the page's language."""
        return self.words[key].format(**values)

    def add(self, kind: str, key: str, /, name: str = "", **content: Any) -> None:
        """A section; its title and its text are the words ``key`` and ``key_text``, ``name`` is what it is about."""
        title = self.words[key] + (f" – {name}" if name else "")
        note = self.words.get(f"{key}_text", "").format(name=name, **content)
        self.sections.append({"kind": kind, "title": title, "note": note, **content})

    def picture(
        self, key: str, draw: Callable[[Path], Path], alt: str, name: str = "", stem: str = "", **content: Any
    ) -> None:
        """A section with the picture that ``draw`` writes; ``stem`` names the file, where that has to stay."""
        count = sum(section["kind"] == "picture" for section in self.sections)
        file = draw(self.folder / f"{stem or f'{count}_{key}'}.png")
        uri = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        self.add("picture", key, name, file=file.name, uri=uri, alt=alt, wide=key == "confusion", **content)

    def table(self, key: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]], name: str = "") -> None:
        """A section with a table that can be sorted and, when it is long, filtered; ``heads`` are words."""
        self.add("table", key, name, heads=[self.words.get(head, head) for head in heads], rows=rows)

    def write(self) -> Path:
        """Writes report.html and report.md; returns the former."""
        env = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=lambda name: bool(name and name.endswith(".html")),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        env.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
        for name in ("report.html", "report.md"):
            text = env.get_template(name).render(page=self, t=self.words)
            with atomic(self.folder / name) as part:
                part.write_text(text, encoding="utf-8")
        return self.folder / "report.html"


def text(value: str) -> Cell:
    """A cell with words."""
    return value, value


def number(value: float | None, form: str = ".2f") -> Cell:
    """A cell with a number, or none."""
    return ("–", -1.0) if value is None else (f"{value:{form}}", value)


def spread(mean: float, sd: float | None) -> Cell:
    """A cell with a mean and, where there is one, its standard deviation."""
    return f"{mean:.2f}" + (f" ± {sd:.2f}" if sd is not None else ""), mean


def percent(value: float, interval: tuple[float, float], form: str = ".0f") -> Cell:
    """A cell with a share in percent and its interval, the latter in ``form``."""
    return f"{value:{'.1f' if form == '.0f' else form}} ({interval[0]:{form}}–{interval[1]:{form}})", value
