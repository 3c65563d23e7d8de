"""Trainings that are killed, terminated and interrupted, and resumed."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from faults.bench import Answer, Bench, Case, disturbed
from faults.process import Fresh, Process

SOON = 10.0  # seconds of CPU time, and on a machine without other work of any time, in which a stopped training ends
OVERLOADED = 120.0  # seconds that it may take where more processes than cores want to run


def kills(count: int, bench: Bench) -> Iterator[Case]:
    """kill -9 at random moments; every second one waits until a temporary file of a checkpoint is open."""
    rng = bench.rng

    def strike(process: Process, run: Path, answer: Answer) -> str | None:
        if rng.random() < 0.5:
            seen = rng.randint(1, 8)
            while seen and process.is_alive():
                seen -= bool(_parts(run))
                time.sleep(0.0005)
        else:
            _sleep(process, rng.uniform(0, answer.seconds))
        if not process.send(signal.SIGKILL):
            return None
        ended = process.wait()
        if ended.code != -signal.SIGKILL:
            return None
        writing = [name for name in _parts(run) if name.startswith((".last.", ".best."))]
        bench.notes["while a checkpoint was written"] += bool(writing)
        return ""

    return disturbed(bench, strike, count)


def signals(count: int, bench: Bench) -> Iterator[Case]:
    """SIGTERM and SIGINT while training and, every second one, in a fresh process from its first moments on."""
    rng = bench.rng
    fresh_seconds = 0.0

    def strike(process: Process, run: Path, answer: Answer) -> str | None:
        nonlocal fresh_seconds
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        fresh = isinstance(process, Fresh)
        if fresh and not fresh_seconds:
            process.wait()  # the first one tells how long they take
            fresh_seconds = time.monotonic() - process.started
            return None
        _sleep(process, rng.uniform(0.05, fresh_seconds if fresh else answer.seconds))
        cpu, begun, sent = process.cpu(), (run / "config.json").is_file(), time.monotonic()
        if not process.send(number):
            return None
        ended = process.wait()
        seconds = time.monotonic() - sent
        if ended.code == 0 or (ended.code == -number and "Test it:" in ended.out):  # it had done its work
            return None
        bench.notes["in a fresh process"] += fresh
        bench.notes["slowest, tenths of a second"] = max(bench.notes["slowest, tenths of a second"], int(seconds * 10))
        if not begun and fresh and _by_python(ended.err) and ended.code in (-number, 128 + number, 1):
            bench.notes["before the first line of finetune101"] += 1
            return ""
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        last = (ended.err.strip().splitlines() or [""])[-1]
        # Python itself ends by the signal where Ctrl-C came while it ran the text of a class; shells tell both as 130
        if fault := ended.fault(allowed=(128 + number, -number) if fresh else (128 + number,)):
            return fault
        if not last.startswith(word) or (begun and "--resume" not in last):
            return f"no sentence: {last}"
        busy = os.getloadavg()[0] > len(os.sched_getaffinity(0))
        bench.notes["the looser limit was needed"] += busy and SOON < seconds <= OVERLOADED
        if ended.cpu - cpu > SOON or seconds > (OVERLOADED if busy else SOON):
            return f"ended {seconds:.1f} s after the signal, {ended.cpu - cpu:.1f} s of CPU time"
        return ""

    turns = itertools.cycle([False, True])
    return disturbed(bench, strike, count, is_fresh=lambda: next(turns))


def _by_python(text: str) -> bool:
    """Whether nothing of finetune101 was running: no words, or a traceback without its files."""
    return not text.strip() or ("Traceback" in text and "finetune101/" not in text)


def _sleep(process: Process, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


def _parts(run: Path) -> list[str]:
    try:
        return [name for name in os.listdir(run) if name.endswith(".part")]
    except OSError:
        return []
