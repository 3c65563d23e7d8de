"""Calls with hostile files in processes that live long: what they raise, how long they take, what they touch."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults.process import Process

CPU = 10.0  # seconds of CPU time that a call may take
WALL = 200.0  # seconds after which a call counts as hanging, on a machine with other work
MEMORY = 2 * 2**30
ROOM = 3 * 2**30  # bytes of addresses beyond those at hand
PROGRAMS = ("gcc", "fc-list")  # which the program itself starts
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "webbrowser.open"}


@dataclass(frozen=True)
class Call:
    """A call with hostile files. ``call`` gets an empty folder and returns what is wrong, "" for nothing."""

    name: str
    files: int
    call: Callable[[Path], str]


class Watch:
    """What the process writes outside of its folders, and what it starts, from the moment that ``folders`` is set."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.events: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folders:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & WRITES or (isinstance(mode, str) and set(mode) & set("wax+"))
            if writes and isinstance(path, str | bytes | os.PathLike) and self._is_outside(path):
                self.events.append(f"wrote {os.fsdecode(path)}")
        elif event in CHANGES:
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike) and self._is_outside(path):
                self.events.append(f"{event} {os.fsdecode(path)}")
        elif event in RUNS and not os.fsdecode(os.fspath(arguments[0])).endswith(PROGRAMS):
            self.events.append(f"{event} {arguments[:2]}")

    def _is_outside(self, path: Any) -> bool:
        name = os.path.abspath(os.fsdecode(path))
        return not any(f"{name}/".startswith(f"{folder}/") for folder in self.folders)


def run_calls(
    calls: Sequence[Call], folder: Path, cache: Path, notes: Counter[str] | None = None
) -> list[tuple[Call, str]]:
    """What is wrong with each of ``calls``, made one after the other; a process that dies is replaced.

    ``notes`` counts the calls that took longer on the clock than they may take of CPU time: the looser limit let them.
    """
    results: list[tuple[Call, str]] = []
    while len(results) < len(calls):
        rest, log = calls[len(results) :], folder / f"log_{len(results)}"
        log.touch()
        # PyTorch's compiler makes its own folder, whose name it otherwise has from the process that it was imported in
        own = {"FINETUNE101_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(folder / "work" / "tmp" / "inductor")}
        process = Process(partial(_work, rest, folder, log), own)
        done, since = 0, time.monotonic()
        while process.is_alive():
            if (count := log.read_bytes().count(b"\n")) > done:
                done, since = count, time.monotonic()
            if time.monotonic() - since > WALL:
                process.send(signal.SIGKILL)
            time.sleep(0.02)
        ended = process.wait()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        faults = [fault for fault, _ in lines]
        if slow := sum(seconds > CPU for _, seconds in lines):
            (notes if notes is not None else Counter())["the looser limit was needed"] += slow
        results += zip(rest, faults, strict=False)
        if len(faults) < len(rest):
            why = {-signal.SIGPROF: f"more than {CPU:g} s of CPU time", -signal.SIGKILL: "a hang, or no memory"}
            said = why.get(ended.code, f"the process ended with {ended.code}: {ended.err[-500:]}")
            results.append((rest[len(faults)], said))
    return results


def _work(calls: Sequence[Call], folder: Path, log: Path) -> int:
    """Makes the calls in this process, with limits; writes a line for each into ``log``."""
    sys.dont_write_bytecode = True
    work = folder / "work"
    work.mkdir(exist_ok=True)
    (work / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(work / "tmp")
    watch = Watch()
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ROOM, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, one in enumerate(calls):
        place = work / f"{log.name}_{number}"
        place.mkdir()
        os.chdir(place)
        drawing = [str(Path.home() / name / "matplotlib") for name in (".cache", ".config")]
        watch.folders = [str(place), str(work / "tmp"), os.environ["FINETUNE101_CACHE"], "/proc", "/dev", *drawing]
        since = time.monotonic()
        fault = _limited(one, place)
        seconds = time.monotonic() - since
        watch.folders = []
        fault = fault or "; ".join(watch.events[:3]) or "code was run" * (place / "MARKER").exists()
        watch.events.clear()
        os.chdir(work)
        if not fault:
            shutil.rmtree(place, ignore_errors=True)
        with open(log, "a") as lines:
            lines.write(json.dumps([fault, seconds]) + "\n")
    return 0


def _limited(one: Call, place: Path) -> str:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    signal.setitimer(signal.ITIMER_PROF, CPU)
    try:
        fault = one.call(place)
    except BaseException:
        fault = f"raised: ...{traceback.format_exc()[-900:]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if not fault and (peak := peak_memory()) > MEMORY:
        return f"took {peak / 1e9:.1f} GB"
    return fault


def peak_memory() -> int:
    """Bytes of memory of this process at most since the last reset."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def said(argv: Sequence[str], allowed: Sequence[int] = (0, 2)) -> str:
    """Calls the command line; what is wrong with its exit code or its sentences, "" for nothing."""
    from finetune101.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    text = err.getvalue()
    sentences = [line for line in text.splitlines() if line.startswith("error:")]
    if code not in allowed or "Traceback" in text:
        return f"exit code {code}: ...{text[-500:]}"
    if code == 2 and (len(sentences) != 1 or len(sentences[0]) > 1500):
        return f"{len(sentences)} sentences: ...{text[-500:]}"
    if code == 1 and not names_a_failure(text, out.getvalue()):
        return f"exit code 1 without a sentence: ...{text[-500:]}"
    return "too much memory was asked for" if "memory of this machine" in text else ""


def names_a_failure(err: str, out: str) -> bool:
    """Whether a command that ended with 1 says which image fails and why, or what ``data verify`` could not read."""
    told = [line for line in err.splitlines() if re.match(r"(error|failed): \S.*", line)]
    return bool(told) or bool(re.search(r"(?m)^ *(unreadable|truncated|not an image).*[1-9]", out))
