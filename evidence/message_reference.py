"""The list of messages in docs/faq.md from every sentence of ``Refused`` in the code."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from md_tables import cell, rows

ROOT = Path(__file__).parent.parent


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
            if len(re.findall(r"[a-z]{2,}", wrong or message)) > 0:  # more than what another function says
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
