"""The help of a verb: its most used flags; ``--help-all`` lists every flag in groups."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from finetune101.config import flag_of
from finetune101.errors import bare

MOST_USED = {
    "train": (
        "exp", "data", "recipe", "pretrain", "model", "epochs", "lr", "batch_size", "size", "seed", "resume",
        "overwrite",
    ),
    "study": (
        "exp", "data", "arms", "models", "seeds", "splits", "train_per_class", "epochs", "scratch_epochs", "size",
        "jobs", "cluster", "dry_run",
    ),
    "search": (
        "exp", "data", "budget", "grid", "space", "stage", "sampler", "pruner", "trials", "finalists", "jobs",
        "cluster", "dry_run",
    ),
    "lr_find": (
        "data", "recipe", "pretrain", "model", "low", "high", "steps", "out", "batch_size", "size", "seed", "threads",
    ),
}  # fmt: skip
"""Verb -> the flags that its short help shows, the first ones first."""
WIDTH = 100
POSITIONAL = "positional"


GROUPS = {
    "": "Flags", "data": "Data", "augment": "Augmentation", "model": "Network", "optim": "Optimisation",
    "system": "Machine",
}  # fmt: skip
"""Part of the settings -> the title of its flags in the long help."""


@dataclasses.dataclass(frozen=True)
class FlagHelp:
    """One flag of a verb: its name, what it takes, its default, what it does, and the part of the settings it is of."""

    name: str
    takes: str
    default: Any
    about: str
    part: str = ""


def verb_help(verb: Callable[..., int], prog: str, defaults: dict[str, Any], *, every: bool) -> str:
    """The help of ``verb``: its most used flags, or ``every`` flag in groups."""
    flags = {flag.name: flag for flag in flags_with_help(verb, defaults)}
    positional = [name for name, flag in flags.items() if flag.part == POSITIONAL]
    usage = " ".join([prog, *(name.upper() for name in positional), "[FLAGS]"])
    about = inspect.getdoc(verb) or ""
    lines = [f"usage: {usage}", "", about.split("\n\nArgs:")[0]]
    if positional:
        lines += ["", *(line for name in positional for line in _entry(name.upper(), _about(flags[name])))]
    names = MOST_USED.get(verb.__name__.removesuffix("_as_original"))
    if names and not every:
        lines += ["", "The most used flags:", *_listed(flags[name] for name in names)]
        return "\n".join([*lines, "", f"{prog} --help-all lists all {len(flags)} flags."])
    for part, title in GROUPS.items():
        if own := [flag for flag in flags.values() if flag.part == part]:
            lines += ["", f"{title}:", *_listed(own)]
    return "\n".join(lines)


def _listed(flags: Iterable[FlagHelp]) -> list[str]:
    lines = []
    for flag in flags:
        name = flag.name.replace("_", "-")
        word = f"--[no-]{name}" if flag.default is True else f"--{name} {flag.takes}".rstrip()
        lines += _entry(word, _about(flag))
    return lines


def _about(flag: FlagHelp) -> str:
    """What a flag does, and its default."""
    plain = isinstance(flag.default, str | int | float | tuple) and not isinstance(flag.default, bool)
    plain = plain and flag.default not in ((), "")
    return f"{flag.about} Default: {as_typed(flag.default)}." if plain and "Default" not in flag.about else flag.about


def _entry(word: str, about: str) -> list[str]:
    """A flag and its text in two columns."""
    texts = textwrap.wrap(about, WIDTH - 30) or [""]
    head = [f"  {word:26}  {texts[0]}"] if len(word) <= 26 else [f"  {word}", f"{'':30}{texts[0]}"]
    return head + [f"{'':30}{text}" for text in texts[1:]]


def flags_with_help(verb: Callable[..., int], defaults: dict[str, Any]) -> Iterator[FlagHelp]:
    """Every flag of ``verb``, those of its settings included; arguments without a flag are of the part POSITIONAL."""
    texts = _argument_texts(inspect.getdoc(verb) or "")
    parameters = inspect.signature(verb).parameters
    for name, hint in get_type_hints(verb, include_extras=True).items():
        if name == "return" or tyro.conf.Suppress in getattr(hint, "__metadata__", ()):
            continue
        value = defaults.get(name, parameters[name].default)
        if dataclasses.is_dataclass(bare(hint)):
            yield from _flags_of_settings(bare(hint), value, "")
        else:
            is_flag = parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            yield FlagHelp(flag_of(name, hint), _takes(hint), value, texts.get(name, ""), "" if is_flag else POSITIONAL)


def _flags_of_settings(kind: Any, values: Any, part: str) -> Iterator[FlagHelp]:
    texts = _field_texts(kind)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value = getattr(values, name, defaults[name])
        if dataclasses.is_dataclass(bare(hint)):
            yield from _flags_of_settings(bare(hint), value, name)
        else:
            yield FlagHelp(flag_of(name, hint), _takes(hint), value, texts.get(name, ""), part)


def _takes(hint: Any) -> str:
    """What a flag takes, in capitals; "" for a switch."""
    kind = bare(hint)
    if get_origin(kind) in (Union, types.UnionType):
        return next(_takes(option) for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{_takes(get_args(kind)[0])} ..."
    return {bool: "", int: "N", float: "X", str: "TEXT"}.get(kind, "VALUE")


def as_typed(value: Any) -> str:
    """``value`` as one types it behind a flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _argument_texts(doc: str) -> dict[str, str]:
    """Name -> text of the section Args of a docstring."""
    texts: dict[str, str] = {}
    name = ""
    for line in doc.partition("\nArgs:\n")[2].splitlines():
        word, colon, text = line.strip().partition(": ")
        if colon and word.isidentifier() and line.startswith("    ") and not line.startswith("     "):
            name, texts[word] = word, text
        elif name:
            texts[name] += f" {line.strip()}"
    return {name: text.strip() for name, text in texts.items()}


def _field_texts(kind: type) -> dict[str, str]:
    """Name -> the string below each field of a dataclass, those of its bases included."""
    bases = [base for base in reversed(kind.__mro__[1:]) if dataclasses.is_dataclass(base)]
    texts = {name: text for base in bases for name, text in _field_texts(base).items()}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts
