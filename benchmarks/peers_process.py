"""One command of ``benchmarks/peers.py``: its seconds, the memory of its process tree, and the limits of --isa avx2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE = 2.0  # seconds between two looks at the memory


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    command: str
    code: int
    seconds: float
    memory_mb: float | None
    """Peak of the tree's proportional memory (PSS), or of the largest process where that is more. Linux only."""
    output: str


def _tree(pid: int) -> Iterator[int]:
    """A process and those below it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield from _tree(int(child))


def _memory_mb(pid: int) -> float:
    """Proportional memory of a process tree in MB (10^6 bytes): pages of several processes count once."""
    kilobytes = 0
    for process in _tree(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes * 1024 / 1e6


def run_process(command: Sequence[str | Path], environment: Mapping[str, str], limit: float) -> Finished:
    """Runs a command in a process group of its own; after ``limit`` seconds, or on an error, the group is killed."""
    words = list(map(str, command))
    peak = 0.0
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        looked = started
        try:
            while True:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                now = time.perf_counter()
                if ended:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                if now - started > limit:
                    os.killpg(process.pid, signal.SIGKILL)
                if now - looked > SAMPLE:
                    peak, looked = max(peak, _memory_mb(process.pid)), now
                time.sleep(0.01)
        finally:
            with contextlib.suppress(ProcessLookupError):  # workers that a killed or failed command left
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        text = output.read().decode(errors="replace")
    memory = max(peak, usage.ru_maxrss * 1024 / 1e6)
    return Finished(" ".join(words), process.returncode, now - started, round(memory), text)


def wrap_compiler(isa: str, work: Path) -> None:
    """With avx2, a gcc in work/bin that compiles for AVX2 where it is told to compile for this machine."""
    gcc = shutil.which("gcc")
    if isa != "avx2" or gcc is None:
        return
    file = work / "bin/gcc"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'#!/bin/bash\nexec {gcc} "${{@/-march=native/-march=x86-64-v3}}"\n',
        encoding="utf-8",
    )
    file.chmod(0o755)


def limits(isa: str, work: Path) -> dict[str, str]:
    """Environment variables that keep PyTorch, its libraries and our C kernels to AVX2."""
    if isa != "avx2":
        return {}
    return {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "PATH": f"{work / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
