"""What the commands of many trainings share: their folder, the processes, and what is kept of those that fail."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from finetune101.errors import Refused
from finetune101.redaction import keep_error, redacted
from finetune101.run import kind_of


def context(module: str) -> Any:
    """How worker processes are born: from a server that has imported ``module``, where there is such a thing."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    births = multiprocessing.get_context("forkserver")
    births.set_forkserver_preload([module])
    return births


def follow_parent() -> None:
    """Makes this worker process end with its parent, and by the parent's SIGTERM as by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent decides
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)  # as if killed: whoever gives the command again finds the last epoch


def stop(processes: list[Any]) -> None:
    """Asks ``processes`` to stop as by Ctrl-C, and after 15 seconds makes them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(15)
        process.kill()
        process.join()


def described(error: BaseException) -> str:
    """Kind and first line of ``error``: "OutOfMemoryError: CUDA out of memory"."""
    lines = redacted(str(error)).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def keep_trace(folder: Path, error: BaseException) -> str:
    """Adds the traceback of ``error`` to error.log in ``folder``, the run's; returns that file's name, if it could."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return str(keep_error(error, folder) or "")


def open_folder(folder: Path, kind: str) -> None:
    """Makes the ``folder`` of a ``kind`` ("search" or "study") if need be.

    Raises Refused where it cannot be written, or is that of something else.
    """
    check_kind(folder, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(f"cannot write in {folder}: {error.strerror}; give another --runs or --exp") from error


def check_kind(folder: Path, kind: str) -> None:
    """Raises Refused when ``folder`` is that of another kind of work than ``kind``, such as a run."""
    if (held := kind_of(folder)) not in ("", kind):
        raise Refused(f"{folder} is the folder of a {held}; give the {kind} another --exp")
