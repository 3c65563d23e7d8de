"""docs/api.md from the docstrings of the Python interface."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from md_tables import cell, rows

import finetune101

CLASSES = {
    "Run": "run", "Network": "deploy.network", "Prediction": "deploy.prediction", "Explanation": "deploy.explain",
    "Evaluation": "evaluation.result", "Comparison": "reports.comparison",
}  # fmt: skip
"""What the functions of the Python interface return -> the module that holds it."""


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
        lines += ["", f"### {name}", "", *as_markdown(inspect.getdoc(kind) or "")]
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
        *as_markdown(inspect.getdoc(function) or ""),
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


def as_markdown(doc: str) -> Iterator[str]:
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
