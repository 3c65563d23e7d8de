"""Commands of finetune101 as processes: forked from this one, which has everything imported, or started afresh."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PATIENCE = 600.0  # seconds after which a command counts as hanging: the machine may have other work
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")

Changes = Mapping[str, str | None]
"""Environment variables to set, or with None to remove."""


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``code``: its exit code, or the signal that killed it as a negative number."""

    code: int
    out: str
    err: str
    cpu: float
    """Seconds of CPU time, without those of its children."""
    peak: int
    """Bytes of memory at most."""
    hung: bool = False

    def fault(self, allowed: Sequence[int] = (0, 2)) -> str:
        """What is wrong with it: traceback, hang, exit code, code 2 without one sentence; "" for nothing."""
        if self.hung:
            return f"did not end within {PATIENCE:.0f} s"
        if "Traceback (most recent call last)" in self.err:
            return f"traceback, code {self.code}: ...{self.err[-700:]}"
        if self.code not in allowed:
            return f"exit code {self.code}: ...{self.err[-700:]}"
        sentences = [line for line in self.err.splitlines() if line.startswith("error:")]
        if self.code == 2 and len(sentences) != 1:
            return f"{len(sentences)} sentences: ...{self.err[-700:]}"
        return ""


class Process:
    """A process that calls a function, forked; its standard streams are files."""

    def __init__(self, call: Callable[[], int], environment: Changes | None = None, cwd: Path | None = None) -> None:
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.started = time.monotonic()
        self.ended: Ended | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(call, environment or {}, cwd, self.out, self.err)

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        if self.ended is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
                self.ended = Ended(os.waitstatus_to_exitcode(status), _text(self.out), _text(self.err), cpu, peak)
        return self.ended is None

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Its end; after so many seconds it is killed and counts as hanging."""
        end = time.monotonic() + seconds
        while self.is_alive():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                while self.is_alive():
                    time.sleep(0.01)
                ended = self.ended
                assert ended is not None
                self.ended = Ended(ended.code, ended.out, ended.err, ended.cpu, ended.peak, hung=True)
                break
            time.sleep(0.005)
        assert self.ended is not None
        return self.ended

    def send(self, number: int) -> bool:
        """Sends a signal; whether the process was alive."""
        if not self.is_alive():
            return False
        os.kill(self.pid, number)
        return True

    def cpu(self) -> float:
        """Seconds of CPU time so far."""
        return cpu_of(self.pid)


class Fresh(Process):
    """The same with a new interpreter: ``python -m finetune101`` with ``words``."""

    def __init__(self, words: Sequence[str], environment: Changes | None = None, cwd: Path | None = None) -> None:
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.started, self.ended = time.monotonic(), None
        variables = {**os.environ, **(environment or {})}
        self._popen = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            cwd=cwd,
            env={name: value for name, value in variables.items() if value is not None},
            preexec_fn=_usual_signals,
        )
        self.pid = self._popen.pid

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        alive = super().is_alive()
        if self.ended is not None:
            self._popen.returncode = self.ended.code  # it was waited for here
        return alive


def command(*argvs: Sequence[str]) -> Callable[[], int]:
    """A call of the command line with each of ``argvs``, until one does not return 0."""

    def call() -> int:
        from finetune101.cli.main import main

        for argv in argvs:
            sys.argv = ["finetune101", *argv]
            if code := main(argv):
                return code
        return 0

    return call


def module(*words: str) -> list[str]:
    """The words of ``python`` for a command of finetune101."""
    return ["-m", "finetune101", *words]


def cpu_of(pid: int) -> float:
    """Seconds of CPU time of a process so far; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / TICKS
    return 0.0


def children_of(pid: int) -> list[int]:
    """Process numbers of the living children of ``pid``."""
    children = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = file.read_text().rpartition(")")[2].split()
            children += [int(file.parent.name)] if int(words[1]) == pid and words[0] != "Z" else []
    return sorted(children)


def _text(file: BinaryIO) -> str:
    file.seek(0)
    with file:
        return file.read().decode("utf-8", "replace")


def _usual_signals() -> None:
    """Ctrl-C and SIGTERM as a terminal leaves them: shells ignore Ctrl-C in what they start behind."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _become(call: Callable[[], int], environment: Changes, cwd: Path | None, out: BinaryIO, err: BinaryIO) -> None:
    """The rest of a forked process: ``call``, then the end, without what the parent does at its own end."""
    code = 1
    try:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None  # asked again: TMPDIR may be another one
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, out.fileno(), err.fileno())):
            os.dup2(file, number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if cwd:
            os.chdir(cwd)
        code = call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
