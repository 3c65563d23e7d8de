"""The parts of docs/ that the code itself knows: ``python evidence/references.py`` writes them between their marks.

commands.md from the verbs' flags, api.md from docstrings, recipes.md and networks.md from their tables, run-folder.md
from the schemas, faq.md from every sentence of ``Refused``, results.md from results/claims.json. With --check nothing
is written, and the exit code is 1 where a page differs.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

from api_reference import as_markdown, interface
from chinese_tables import in_chinese
from field_meanings import MEANINGS
from md_tables import cell, rows
from message_reference import messages

from finetune101 import schemas
from finetune101.cli.help import GROUPS, POSITIONAL, FlagHelp, as_typed, flags_with_help
from finetune101.cli.main import DATA_VERBS, VERBS
from finetune101.cli.parse import _defaults
from finetune101.config import TrainConfig
from finetune101.errors import must_be
from finetune101.models import table
from finetune101.recipes import RECIPES

ROOT = Path(__file__).parent.parent
MARKS = ("<!-- generated: python evidence/references.py -->", "<!-- end of generated -->")


# --- commands ---


@functools.cache
def commands() -> str:
    """Every verb with every flag."""
    lines: list[str] = []
    verbs = {f"data {name}": home for name, home in DATA_VERBS.items()} | VERBS
    for name, home in {**verbs, "search report": "many_runs:search_report"}.items():
        module, _, function = home.partition(":")
        verb = getattr(importlib.import_module(f"finetune101.cli.{module}"), function)
        prog = f"finetune101 {name}"
        flags = list(flags_with_help(verb, _defaults(verb, [], prog, "")))
        positional = [flag for flag in flags if flag.part == POSITIONAL]
        lines += ["", f"## {prog}", "", (inspect.getdoc(verb) or "").split("\n\nArgs:")[0], "", "```text"]
        lines += [" ".join([prog, *(flag.name.upper() for flag in positional), "[FLAGS]"]), "```"]
        lines += rows(
            "| argument | what it is |", (f"| `{flag.name.upper()}` | {cell(flag.about)} |" for flag in positional)
        )
        for part, title in GROUPS.items():
            own = [flag for flag in flags if flag.part == part]
            heading = f"| {title.lower()} | what it does | default |"
            lines += rows(heading, (f"| {_word(flag)} | {cell(flag.about)} | {_default(flag)} |" for flag in own))
    return "\n".join(lines).strip()


def _word(flag: FlagHelp) -> str:
    name = flag.name.replace("_", "-")
    return f"`--{name}`, `--no-{name}`" if flag.default is True else f"`{cell(f'--{name} {flag.takes}')}`"


def _default(flag: FlagHelp) -> str:
    if flag.default in (None, "", ()) or flag.default is inspect.Parameter.empty:
        return ""
    if isinstance(flag.default, bool):
        return "on" if flag.default else "off"
    if isinstance(flag.default, str | int | float | tuple):
        value = flag.default
        return f"`{cell(' '.join(map(str, value)) if isinstance(value, tuple) else value)}`"
    return ""


# --- recipes and networks ---


def recipes() -> str:
    """Each recipe: its docstring, and what differs from the defaults of the settings."""
    lines: list[str] = []
    plain = dataclasses.asdict(TrainConfig(exp="x"))
    for name, recipe in RECIPES.items():
        config = recipe("x", pretrain=not name.startswith("scratch"))
        lines += ["", f"### {name}", "", *as_markdown(inspect.getdoc(recipe) or "")]
        settings = [
            (f"{part}.{field}", value)
            for part, fields in dataclasses.asdict(config).items()
            if isinstance(fields, dict)
            for field, value in fields.items()
            if value != plain[part][field]
        ]
        lines += rows("| setting | value |", (f"| `{field}` | `{as_typed(value)}` |" for field, value in settings))
    return "\n".join(lines).strip()


@functools.cache
def networks() -> str:
    """The table of networks."""
    lines = []
    for name in table.names():
        entry = table.lookup(name)
        if isinstance(entry.weights, tuple):
            million = sum(_millions(part) for part in entry.weights)
            source, licence = " + ".join(f"`{part}`" for part in entry.weights), "as its parts"
        else:
            million = _millions(name)
            source, licence = _source(entry.weights)
        size = f"{entry.preprocessing.size}{', no other' if entry.fixed_size else ''}"
        lines.append(f"| `{name}` | {size} | {million:.1f} | {source} | {licence} |")
    head = "| network | size, px | million weights | ImageNet weights from | licence of the weights |"
    return "\n".join(rows(head, iter(lines))).strip()


def _millions(name: str) -> float:
    return sum(tensor.numel() for tensor in table.lookup(name).outline().values()) / 1e6


def _source(weights: Any) -> tuple[str, str]:
    if isinstance(weights, table.Package):
        return f"the package `{weights.project}` {weights.version}", "Apache-2.0"
    return f"torchvision, `{weights.name}`", "BSD-3-Clause (torchvision)"


# --- the run folder ---


def run_folder() -> str:
    """The fields of every file that has a schema."""
    lines: list[str] = []
    files = {file: kind for file, kind in schemas.SCHEMAS.items() if file != "config.json"}
    for file, kind in {**files, "metrics.jsonl": schemas.Record}.items():
        lines += ["", f"## {file}", "", MEANINGS[kind.__name__][""]]
        lines += rows("| field | type | always | meaning |", _fields(kind, ""))
    return "\n".join(lines).strip()


def _fields(kind: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(kind, include_extras=True).items():
        always, inner = True, hint
        if get_origin(inner) is NotRequired:
            always, inner = False, get_args(inner)[0]
        meaning = MEANINGS.get(kind.__name__, {}).get(name) or _docs_of_fields().get(f"{kind.__name__}.{name}", "")
        assert meaning, f"say in field_meanings.py what {kind.__name__}.{name} means, or below the field in schemas.py"
        takes = re.sub(r", at most 1(0{6,}|e\+\d+)", "", must_be(inner)).replace(
            "a table of names and values", "a table"
        )
        yield f"| `{prefix}{name}` | {cell(takes)} | {'yes' if always else ''} | {cell(meaning)} |"
        if table_of := next((one for one in _inside(inner) if hasattr(one, "__required_keys__")), None):
            many = "[]" if "list[" in str(inner) else ""
            yield from _fields(table_of, f"{prefix}{name}{many}.")


@functools.cache
def _docs_of_fields() -> dict[str, str]:
    """Class.field -> the text below the field in schemas.py."""
    texts = {}
    for kind in ast.parse(inspect.getsource(schemas)).body:
        if isinstance(kind, ast.ClassDef):
            for field, below in itertools.pairwise(kind.body):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    texts[f"{kind.name}.{ast.unparse(field.target)}"] = str(ast.literal_eval(below.value))
    return texts


def _inside(hint: Any) -> Iterator[Any]:
    yield hint
    for part in get_args(hint):
        yield from _inside(part)


# --- claims ---


def claims() -> str:
    """Every claim of results/claims.json."""
    listed = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))
    head = "| claim | value | unit | n | spread | kind |"
    lines = (
        f"| `{one['id']}` | {one['value']} | {cell(one['unit'])} | {one['n']} | {_spread(one['spread'])} "
        f"| {one['kind']} |"
        for one in listed
    )
    return "\n".join(rows(head, lines)).strip()


def _spread(spread: Any) -> str:
    if isinstance(spread, list):
        return " to ".join(map(str, spread))
    return "" if spread is None else f"± {spread}"


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "api": interface,
    "recipes": recipes,
    "networks": networks,
    "run-folder": run_folder,
    "faq": messages,
    "results": claims,
}
"""Page -> what writes its part."""


def with_part(text: str, part: str) -> str:
    """``text`` with ``part`` between its marks. Raises ValueError where it has none."""
    before, first, rest = text.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not (first and last):
        raise ValueError(f"no place for it: {MARKS[0]} ... {MARKS[1]}")
    return f"{before}{first}\n\n{part}\n\n{last}{after}"


def main(argv: list[str] | None = None, docs: Path = ROOT / "docs") -> int:
    """Writes the parts into the pages, English and Chinese; with --check says which page differs, and returns 1."""
    parser = argparse.ArgumentParser(description="the generated parts of docs/")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page differs")
    check = parser.parse_args(argv).check
    different = 0
    for name, make in PARTS.items():
        part = make()
        for page, own in ((docs / f"{name}.md", part), (docs / "zh" / f"{name}.md", in_chinese(part))):
            text = page.read_text(encoding="utf-8") if page.is_file() else ""
            if MARKS[0] not in text or (new := with_part(text, own)) == text:
                continue
            different += 1
            if check:
                print(f"{page} is not as the code: python evidence/references.py writes it", file=sys.stderr)
            else:
                page.write_text(new, encoding="utf-8")
                print(f"{page}: written")
    return int(check and different > 0)


if __name__ == "__main__":
    sys.exit(main())
