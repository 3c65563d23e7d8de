"""Commands and errors as they may be printed and kept: without secrets, with every traceback."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import sys
import traceback
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote

HIDDEN = "***"
LOG = "error.log"
"""The file beside a run that holds the tracebacks of what went wrong in it."""

_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]{0,40}://)(?P<user>[^\s'\"]*)@")
_NAMED = re.compile(
    r"(?P<name>(?<![A-Za-z0-9])(?:--?)?[A-Za-z0-9_\-]*"
    r"(?:passwd|password|passphrase|pwd|secret|token|api[_\-]?key|access[_\-]?key|credentials?)[A-Za-z0-9_\-]*)"
    r"(?P<sign>\s*[=:]\s*|\s+(?=[^\s\-]))(?P<value>'[^']*'|\"[^\"]*\"|[^\s&;,'\"]+)",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_\-]{16,}|glpat-[\w\-]{16,}"
    r"|xox[abpr]-[\w\-]{10,}|AKIA[A-Z0-9]{12,}|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]*)"
)
_SECRET_NAME = re.compile(r"passw|passphrase|secret|token|api_?key|access_?key|credential", re.IGNORECASE)


def redacted(text: str, words: Sequence[str] | None = None) -> str:
    """``text`` without secrets: users and passwords in addresses, ``password=...``, tokens, and what ``words`` hide.

    ``words`` are the command line (default: this process's); a password that stands in it, or in a variable of the
    environment that is named like one, is hidden wherever it stands.
    """
    for secret in _secrets(sys.argv if words is None else words):
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(lambda match: match["scheme"] + HIDDEN + "@", text)
    text = _NAMED.sub(
        lambda match: match[0] if match["sign"].isspace() and not match["name"].startswith("-")
        else match["name"] + match["sign"] + HIDDEN,
        text,
    )  # fmt: skip
    return _TOKENS.sub(HIDDEN, text)


def _secrets(words: Iterable[str]) -> list[str]:
    """Passwords that stand in the command line or in variables of the environment, longest first."""
    named = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    named = {value for value in named if not (os.path.isabs(value) and os.path.exists(value))}  # a file of secrets
    held = {value for value in named if len(value) > 5 and not value.isdigit()}
    for word in words:
        for match in _USER.finditer(word):
            password = match["user"].partition(":")[2]
            held |= {form for form in (password, unquote(password)) if len(form) > 2}
        for match in _NAMED.finditer(word):
            if not match["sign"].isspace():
                held |= {form for form in (match["value"], unquote(match["value"])) if len(form) > 4}
    return sorted(held, key=len, reverse=True)


def command_line(argv: Sequence[str]) -> str:
    """The command line ``argv`` (with the program first) as a person types it, without secrets."""
    name = argv[0].replace("\\", "/").rsplit("/", 1)[-1] if argv else ""
    words = ["python", "-m", "finetune101"] if name == "__main__.py" else [name]
    flag = ""
    for word in argv[1:]:
        if flag.startswith("--") and _SECRET_NAME.search(flag) and not word.startswith("--"):
            words.append(HIDDEN)
        else:
            words.append(redacted(word, argv))
        flag = word
    return shlex.join(words).replace("'***'", HIDDEN)


def traceback_of(error: BaseException) -> str:
    """The traceback of ``error`` as text, without secrets."""
    return redacted("".join(traceback.format_exception(error)))


def keep_error(error: BaseException, folder: Path) -> Path | None:
    """Adds the traceback of ``error`` to error.log in ``folder``; None where there is no such folder or no room."""
    if not folder.is_dir():
        return None
    when, version = datetime.now().isoformat(timespec="seconds"), platform.python_version()
    text = f"{when}, Python {version}: {command_line(sys.argv)}\n"
    with contextlib.suppress(OSError):
        with open(folder / LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}{traceback_of(error)}\n")
        return folder / LOG
    return None
