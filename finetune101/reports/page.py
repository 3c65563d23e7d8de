"""A report page in the making: sections in one language, written as self-contained HTML and as Markdown."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune101.errors import Refused, escaped, markdown
from finetune101.files import atomic
from finetune101.run import check_folder

TEMPLATES = Path(__file__).parent / "templates"
LANGUAGES = ("en", "zh")

Cell = tuple[str, float | str]  # what a cell of a table shows, and the value by which the table is sorted
Words = Mapping[str, str]
"""The words of pages and pictures in one language, by their key."""


class Name(str):
    """A table's heading that stands as it is, such as a setting's name; other headings are keys of the words."""

    __slots__ = ()


@functools.cache
def read_words(lang: str) -> dict[str, str]:
    """The headings and sentences of a page in the language ``lang``, by their keys."""
    words: dict[str, str] = json.loads((TEMPLATES / f"{lang}.json").read_text(encoding="utf-8"))
    return words


def sentence(words: Words, key: str, /, **values: Any) -> str:
    """The sentence ``key`` of ``words`` with ``values`` in it; where ``n`` is 1, the sentence ``key_one`` if any."""
    if values.get("n") == 1 and f"{key}_one" in words:
        key += "_one"
    return words[key].format(**values)


def decision_text(decision: dict[str, Any], lang: str = "en") -> str:
    """A decision of ``auto`` (see ``Decision.to_json``) in a line: what it is about, its value and the reason."""
    about, value, reason = decision_cells(decision, lang)
    return f"{about}: {value}. {reason}"


def decision_cells(decision: dict[str, Any], lang: str) -> tuple[str, str, str]:
    """What a decision of ``auto`` is about, its value, and the reason in the language ``lang``."""
    words = read_words(lang)
    about = " ".join(filter(None, (words[f"auto_{decision['about']}"], decision["name"])))
    return about, decision["value"], words[f"auto_{decision['why']}"].format(**decision["values"])


class Page:
    """A title, a headline and sections, written to ``stem``.html and .md in ``folder`` when all are there.

    Raises Refused for an unknown language, or when ``folder`` is a file.
    """

    def __init__(self, folder: Path, lang: str, stem: str = "report") -> None:
        if lang not in LANGUAGES:
            raise Refused(f"--lang is {lang}; choose from {', '.join(LANGUAGES)}")
        check_folder(folder)
        self.words = read_words(lang)
        self.folder, self.lang, self.stem = folder, lang, stem
        self.title, self.headline, self.remark, self.explains = "", "", "", True
        self.blanks: list[str] = []  # what is filled in by hand on a printed page, such as a name
        self.sections: list[dict[str, Any]] = []
        self.pictures: dict[str, bytes] = {}

    def say(self, key: str, /, **values: Any) -> str:
        """The sentence ``key`` in the page's language."""
        return sentence(self.words, key, **values)

    def join(self, sentences: Sequence[str]) -> str:
        """Sentences one after the other, with a space between them where the language has one."""
        return self.words["gap"].join(filter(None, sentences))

    def add(self, kind: str, key: str, /, name: str = "", **content: Any) -> None:
        """A section; its title and its text are the words ``key`` and ``key_text``, ``name`` is what it is about."""
        title = self.words[key] + (f" – {name}" if name else "")
        note = self.words.get(f"{key}_text", "").format(name=name, **content)
        self.sections.append({"kind": kind, "title": title, "note": note, **content})

    def picture(
        self,
        key: str,
        draw: Callable[..., Path],
        alt: str,
        name: str = "",
        stem: str = "",
        whole: bool = False,
        **content: Any,
    ) -> None:
        """A section with the picture that ``draw`` writes; ``stem`` names the file, where that has to stay.

        Phones get another one, by ``draw`` with ``narrow``. Of a ``whole`` one they get the same, which is scrolled.
        """
        file = f"{file_stem(stem) or f'{len(self.pictures)}_{key}'}.png"
        with TemporaryDirectory() as folder:
            png = self.pictures[file] = draw(Path(folder) / file).read_bytes()
            phone = "" if whole else _png_uri(draw(Path(folder) / f"phone_{file}", narrow=True).read_bytes())
        self.add("picture", key, name, file=file, uri=_png_uri(png), phone=phone, alt=alt, whole=whole, **content)

    def sheet(
        self, key: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], name: str = "", **content: Any
    ) -> None:
        """A section with a table that has a column for each of ``heads`` and rows of (word, cells)."""
        lines = [(label if isinstance(label, Name) else self.words[label], cells) for label, cells in rows]
        self.add("sheet", key, name, heads=heads, rows=lines, **content)

    def table(
        self, key: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]], name: str = "", **content: Any
    ) -> None:
        """A section with a table that can be sorted and, when it is long, filtered; ``heads`` are words or ``Name``."""
        titles = [head if isinstance(head, Name) else self.words[head] for head in heads]
        self.add("table", key, name, heads=titles, rows=rows, **content)

    def write(self) -> Path:
        """Writes the pictures, the page as HTML and as Markdown; returns the former."""
        env = Environment(  # nosec B701
            loader=FileSystemLoader(TEMPLATES),
            autoescape=lambda name: bool(name and name.endswith(".html")),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        env.filters |= {"md": markdown, "alone": escaped, "fence": _fence}
        pages = {
            f"{self.stem}.{kind}": env.get_template(f"report.{kind}").render(page=self, t=self.words)
            for kind in ("html", "md")
        }
        files = {name: _UNPRINTABLE.sub(lambda one: escaped(one[0]), page).encode() for name, page in pages.items()}
        for name, content in {**self.pictures, **files}.items():
            with atomic(self.folder / name) as part:
                part.write_bytes(content)
        return self.folder / f"{self.stem}.html"


def _png_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# control characters, and what a byte that is no UTF-8 becomes in a file's name
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _fence(lines: Sequence[str]) -> str:
    """The line that begins and ends a block of code with ``lines`` in it."""
    return "`" * max([3, *(len(run) + 1 for line in lines for run in re.findall("`+", line))])


def file_stem(name: str) -> str:
    """``name`` as a part of a file's name: what could leave the folder or is too long becomes a hash."""
    if re.fullmatch(r"[\w+-][\w.+-]{0,80}", name) or not name:
        return name
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:40] + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]


def words(value: str) -> Cell:
    """A cell with words."""
    return value, value


def number(value: float | None, form: str = ".2f") -> Cell:
    """A cell with a number, or none."""
    return ("–", -1.0) if value is None else (f"{value:{form}}", value)


SMALLEST_P = 1e-300
"""Below it a p-value is no longer a number of the machine."""


def p_text(p: float) -> str:
    """What stands behind the "p" of a test: "= 0.012"; never "= 0"."""
    return f"= {p:.2g}" if p >= SMALLEST_P else f"< {SMALLEST_P:g}"


def p_cell(p: float | None) -> Cell:
    """A cell with a p-value, or none."""
    return ("–", -1.0) if p is None else (p_text(p).removeprefix("= "), p)


def spread(mean: float | None, sd: float | None, digits: int = 2) -> Cell:
    """A cell with a mean and, where there is one, its standard deviation."""
    if mean is None:
        return number(None)
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else ""), mean


def minutes(seconds: float | None) -> Cell:
    """A cell with a time in minutes: hundredths below one."""
    return number(None if seconds is None else seconds / 60, ".2f" if (seconds or 0) < 60 else ".1f")


def percent(value: float, interval: tuple[float, float], form: str = ".0f") -> Cell:
    """A cell with a share in percent and its interval, the latter in ``form``."""
    return f"{value:{'.1f' if form == '.0f' else form}} ({interval[0]:{form}}–{interval[1]:{form}})", value
