"""The folder of a study or a search: one command at a time works in it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune101.errors import Refused
from finetune101.files import claim, claimed_by
from finetune101.run import kind_of


@contextlib.contextmanager
def alone(folder: Path, kind: str) -> Iterator[None]:
    """Makes the ``folder`` of a ``kind`` ("search" or "study") if need be, and keeps a second command out of it.

    Raises Refused where it cannot be written, is that of something else, or another command is at work in it.
    """
    check_kind(folder, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(f"cannot write in {folder}: {error.strerror}; give another --runs or --exp") from error
    with one_command(folder, kind):
        yield


@contextlib.contextmanager
def one_command(folder: Path, kind: str) -> Iterator[None]:
    """Keeps a second command of that ``kind`` out of ``folder``. Raises Refused naming the one that is in it."""
    lock = folder / f"{kind}.lock"
    with claim(lock) as is_ours:
        if not is_ours:
            raise Refused(
                f"another {kind} ({claimed_by(lock)}) is at work in {folder}; wait for it, or give this one another"
                " --exp"
            )
        yield


def check_kind(folder: Path, kind: str) -> None:
    """Raises Refused when ``folder`` is that of another kind of work than ``kind``, such as a run."""
    if (held := kind_of(folder)) not in ("", kind):
        raise Refused(f"{folder} is the folder of a {held}; give the {kind} another --exp")
