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
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

from field_meanings import MEANINGS

import finetune101
from finetune101 import schemas
from finetune101.cli.help import GROUPS, POSITIONAL, FlagHelp, flags_with_help
from finetune101.cli.main import DATA_VERBS, VERBS
from finetune101.cli.parse import _defaults
from finetune101.config import TrainConfig
from finetune101.errors import must_be
from finetune101.models import table
from finetune101.recipes import RECIPES

ROOT = Path(__file__).parent.parent
MARKS = ("<!-- generated: python evidence/references.py -->", "<!-- end of generated -->")
CLASSES = {
    "Run": "run", "Network": "deploy.network", "Prediction": "deploy.prediction", "Explanation": "deploy.explain",
    "Evaluation": "evaluation.result", "Comparison": "reports.comparison",
}  # fmt: skip
"""What the functions of the Python interface return -> the module that holds it."""


def cell(text: object) -> str:
    """``text`` for a cell of a table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;").strip()


def rows(head: str, lines: Iterator[str]) -> list[str]:
    """A table; nothing without ``lines``."""
    body = list(lines)
    return ["", head, "|" + "---|" * head.count(" |"), *body] if body else []


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


# --- Python ---


def interface() -> str:
    """The functions of the package, and the classes that they return."""
    lines = ["", "## Functions"]
    for name in finetune101.__all__:
        value = getattr(finetune101, name)
        if inspect.isfunction(value):
            lines += _described(f"finetune101.{name}", value)
    lines += ["", "## What they return"]
    for name, module in CLASSES.items():
        kind = getattr(importlib.import_module(f"finetune101.{module}"), name)
        lines += ["", f"### {name}", "", *_text(inspect.getdoc(kind) or "")]
        fields = _field_texts(kind)
        lines += rows("| attribute | what it is |", (f"| `{one}` | {cell(text)} |" for one, text in fields.items()))
        for method, value in vars(kind).items():
            if method.startswith("_") or method in fields:
                continue
            if isinstance(value, property):
                lines += ["", f"`{name}.{method}`: {cell(inspect.getdoc(value) or '')}"]
            elif inspect.isfunction(value):
                lines += _described(f"{name}.{method}", value, "####")
    return "\n".join(lines).strip()


def _described(name: str, function: Callable[..., Any], heading: str = "###") -> list[str]:
    """Signature and docstring of a function."""
    return [
        "",
        f"{heading} {name}",
        "",
        "```python signature",
        _signature(name, function),
        "```",
        "",
        *_text(inspect.getdoc(function) or ""),
    ]


def _signature(name: str, function: Callable[..., Any]) -> str:
    """``name(arguments) -> type``, an argument a line where it would be long."""
    signature = inspect.signature(function)
    listed = [one for one in signature.parameters.values() if one.name != "self"]
    words, star = [], False
    for one in listed:
        if one.kind is one.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        star = star or one.kind is one.VAR_POSITIONAL
        prefix = "*" if one.kind is one.VAR_POSITIONAL else "**" if one.kind is one.VAR_KEYWORD else ""
        default = "" if one.default is one.empty else f" = {one.default!r}"
        words.append(f"{prefix}{one.name}: {one.annotation}{default}".replace("'", '"'))
    end = "" if signature.return_annotation is inspect.Signature.empty else f" -> {signature.return_annotation}"
    short = f"{name}({', '.join(words)}){end}"
    return short if len(short) <= 100 else f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){end}"


def _text(doc: str) -> Iterator[str]:
    """A docstring as Markdown: its arguments as a list, names of the code in code."""
    before, _, rest = doc.partition("\nArgs:\n")
    arguments, _, after = rest.partition("\n\n")
    yield _prose(before.strip())
    if arguments:
        yield ""
        for item in re.split(r"\n(?=    ?\w+: )", f"\n{textwrap.dedent(arguments)}"):
            for line in re.split(r"\n(?=\w+: )", item.strip("\n")):
                word, _, text = line.partition(": ")
                yield f"- `{word.strip()}`: {_prose(' '.join(text.split()))}"
    if after.strip():
        yield ""
        yield _prose(after.strip())


def _prose(text: str) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _field_texts(kind: type) -> dict[str, str]:
    """Name -> what it is, of each public field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, below in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id[0] != "_":
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            texts[field.target.id] = _prose(str(text)) or f"`{ast.unparse(field.annotation)}`"
    return texts


# --- recipes and networks ---


def recipes() -> str:
    """Each recipe: its docstring, and what differs from the defaults of the settings."""
    lines: list[str] = []
    plain = dataclasses.asdict(TrainConfig(exp="x"))
    for name, recipe in RECIPES.items():
        config = recipe("x", pretrain=not name.startswith("scratch"))
        lines += ["", f"### {name}", "", *_text(inspect.getdoc(recipe) or "")]
        settings = [
            (f"{part}.{field}", value)
            for part, fields in dataclasses.asdict(config).items()
            if isinstance(fields, dict)
            for field, value in fields.items()
            if value != plain[part][field]
        ]
        lines += rows("| setting | value |", (f"| `{field}` | `{_plain(value)}` |" for field, value in settings))
    return "\n".join(lines).strip()


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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


# --- messages ---


@functools.cache
def messages() -> str:
    """Every sentence of ``Refused``: what is wrong, and the cure behind the last semicolon."""
    lines: list[str] = []
    files = sorted((ROOT / "finetune101").rglob("*.py"))
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    words: dict[str, str] = {}
    for tree in trees.values():
        words |= {name: text for name, text in _constants(tree).items() if name.isupper()}
    by_room: dict[str, dict[str, str]] = {}
    for file, tree in trees.items():
        room = file.relative_to(ROOT / "finetune101").parts[0].removesuffix(".py")
        for message in sorted(_sentences(tree, words | _constants(tree))):
            wrong, _, cure = message.rpartition("; ")
            if len(re.findall(r"[a-z]{2,}", wrong or message)) > 1:  # more than what another function says
                by_room.setdefault(room, {})[cell(wrong or message)] = cell(cure if wrong and cure != "…" else "")
    for room, sentences in sorted(by_room.items()):
        lines += ["", f"### {room}"]
        lines += rows("| message | what to do |", (f"| {wrong} | {cure} |" for wrong, cure in sentences.items()))
    return "\n".join(lines).strip()


def _constants(tree: ast.Module) -> dict[str, str]:
    """The texts that have one name in a module, and are no argument of a function."""
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    texts: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            is_text = isinstance(node.value, ast.JoinedStr) or isinstance(getattr(node.value, "value", None), str)
            texts.setdefault(node.targets[0].id, []).append(_sentence(node.value, {}) if is_text else "…")
    once = {name: several[0] for name, several in texts.items() if len(several) == 1 and several[0] != "…"}
    return {name: text for name, text in once.items() if name not in arguments}


def _sentences(tree: ast.Module, words: dict[str, str]) -> set[str]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    return {_sentence(node.args[0], words) for node in calls if getattr(node.func, "id", "") == "Refused"}


def _sentence(node: ast.expr, words: dict[str, str]) -> str:
    """The text of an expression, with … for what is known only when it happens."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_sentence(part, words) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return words.get(node.value.id, "…") if isinstance(node.value, ast.Name) else "…"
    if isinstance(node, ast.BoolOp):
        return _sentence(node.values[-1], words)
    if isinstance(node, ast.Name):
        return words.get(node.id, "…")
    return "…"


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
        for page in (docs / f"{name}.md", docs / "zh" / f"{name}.md"):
            text = page.read_text(encoding="utf-8") if page.is_file() else ""
            if MARKS[0] not in text or (new := with_part(text, part)) == text:
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
