"""A Python that sees some of the installed packages and no others, as in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

AS_PROGRAM = "runpy.run_path(sys.argv[0], run_name='__main__')"
AS_FINETUNE101 = "runpy.run_module('finetune101', run_name='__main__')"


def needed(*distributions: str) -> set[str]:
    """``distributions`` and all that they need, without extras."""
    names, todo = set[str](), list(distributions)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in names:
            continue
        names.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement, _, marker = line.partition(";")
            if not marker or not re.search(r"extra|python_version *<|platform|os_name|implementation", marker):
                todo.append(re.split(r"[^A-Za-z0-9_.\-]", requirement.strip())[0])
    return names


def environment(folder: Path, *distributions: str) -> list[str]:
    """A Python that can import ``distributions`` and what they need, and nothing else that is installed here."""
    for name in needed(*distributions):
        for file in importlib.metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / top).symlink_to(file.locate().parents[len(file.parts) - 1] / top)
    code = "import sys, runpy; sys.path[:0] = {paths!r}; sys.argv = sys.argv[1:]; {run}"
    return [sys.executable, "-I", "-S", "-c", code, str(folder)]


def run(python: list[str], paths: list[Path], act: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs ``act`` with ``words`` as arguments in the ``environment`` ``python``, with ``paths`` first on its path."""
    *start, code, folder = python
    code = code.format(paths=[*map(str, paths), folder], run=act)
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "FINETUNE101_CACHE": str(Path(folder) / "cache")}
    return subprocess.run([*start, code, *map(str, words)], capture_output=True, text=True, env=env, timeout=120)
