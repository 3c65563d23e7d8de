"""A disk that is full: from the n-th write on, by a shim before the C library, and really, by small tmpfs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.bench import KINDS, Bench, Case, answer_of, left_over, whole
from faults.process import Process, command

TMPFS = 4  # of so many cases, one is a tmpfs where one may be mounted


def arm(folder: Path, n: int, once: bool = False) -> None:
    """Lets the ``n``-th call that writes below ``folder``, and unless ``once`` every later one, fail with ENOSPC."""
    ctypes.CDLL(None).fault_arm(os.fsencode(folder), ctypes.c_long(n), int(once))


def disk(count: int, bench: Bench) -> Iterator[Case]:
    """ENOSPC while a network is trained and tested, in its run and in the cache; then there is room again."""
    kinds, mounts = list(KINDS), _may_mount(bench)
    totals: dict[tuple[str, str], int] = {}
    spread = {"runs": 0.0, "cache": 0.0}
    number = tries = 0
    while number < count:
        if (tries := tries + 1) > 3 * count:
            raise RuntimeError(f"{number} of {tries - 1} tries came to a full disk")
        place = "cache" if number % 3 == 2 else "runs"
        kind = kinds[number % len(kinds)]
        if mounts and number % TMPFS == TMPFS - 1:
            fault = _on_tmpfs(bench, kind, place)
            if fault is not None:
                number += 1
                bench.notes[f"tmpfs as {place}"] += 1
                yield f"{kind}, tmpfs as {place}", fault
            continue
        spread[place] = (spread[place] + 0.618034) % 1  # the golden ratio spreads them evenly, however many they are
        if (kind, place) not in totals:
            totals[kind, place] = _calls(bench, kind, place)
            bench.notes[f"writing calls below {place}"] += totals[kind, place]
        n, once = 1 + int(spread[place] * totals[kind, place]), bench.rng.random() < 0.3
        fault = _by_shim(bench, kind, place, n, once)
        if fault is not None:
            number += 1
            yield f"{kind}, {'only ' * once}call {n} below {place}", fault


def _calls(bench: Bench, kind: str, place: str) -> int:
    """How many calls write below runs or cache in the work on a training of ``kind``."""
    folder = bench.new_folder("counted")
    log = folder / "calls"

    def call() -> int:
        arm(folder / place, -1)
        code = command(*_work(bench, kind, folder))()
        log.write_text(str(ctypes.CDLL(None).fault_calls()))
        return code

    ended = Process(call, {"FINETUNE101_CACHE": str(bench.cache(folder))}).wait()
    if ended.code:
        raise RuntimeError(f"the undisturbed training failed: {ended.err[-2000:]}")
    return int(log.read_text())


def _work(bench: Bench, kind: str, folder: Path) -> list[list[str]]:
    """Train and evaluate, or the rest of it; one kind is reported as well."""
    run = folder / "runs" / "r"
    resume = (run / "config.json").is_file()
    report = ["report", str(run), "--out", str(folder / "runs" / "page"), "--no-gallery", "--no-explain"]
    words = [bench.words(kind, folder / "runs", resume), ["evaluate", str(run), "--data", str(bench.data)]]
    return [*words, report] if kind == "train+val" else words


def _by_shim(bench: Bench, kind: str, place: str, n: int, once: bool) -> str | None:
    folder = bench.new_folder("full")
    (folder / "runs").mkdir()
    cache = bench.cache(folder)

    def full() -> int:
        arm(folder / place, n, once)
        return _counting(folder, bench, kind)

    return _recovers(bench, kind, folder, cache, full, lambda: None)


def _counting(folder: Path, bench: Bench, kind: str) -> int:
    """Does the work in this process; how many calls found a full disk then stands in ``folder``."""
    try:
        return command(*_work(bench, kind, folder))()
    finally:
        (folder / "full_calls").write_text(str(ctypes.CDLL(None).fault_full()))


def _was_full(folder: Path) -> bool:
    """Whether a call of the work found a full disk; a process that died before it could tell counts as such."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "full_calls").read_text()) > 0
    return True


def _recovers(
    bench: Bench, kind: str, folder: Path, cache: Path, full: Callable[[], int], make_room: Callable[[], None]
) -> str | None:
    """Runs ``full``, judges how it ended, makes room and does the rest of the work: what is wrong with all of it.

    None where nothing was wrong because no call found a full disk.
    """
    answer, environment = bench.answer(kind), {"FINETUNE101_CACHE": str(cache)}
    ended = Process(full, environment).wait()
    run = folder / "runs" / "r"
    if fault := ended.fault():
        return fault
    if run.is_dir() and (fault := whole(run)):
        return fault
    if not ended.code and not _was_full(folder):
        bench.notes["never full, tried again"] += 1
        shutil.rmtree(folder, ignore_errors=True)
        return None
    bench.notes["ended by a sentence" if ended.code else "went on without"] += 1
    make_room()
    again = Process(command(*_work(bench, kind, folder)), environment).wait()
    if fault := again.fault(allowed=(0,)):
        return f"afterwards: {fault}"
    fault = answer.difference(answer_of(run)) or left_over(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return f"afterwards: {fault}" if fault else ""


def _may_mount(bench: Bench) -> bool:
    folder = bench.new_folder("mount")
    mounted = _mount("size=64k", folder)
    if mounted:
        _unmount(folder)
    return mounted


def _mount(options: str, folder: Path) -> bool:
    try:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        return False


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=True)


def _on_tmpfs(bench: Bench, kind: str, place: str) -> str | None:
    """A tmpfs that is too small from the start on, or that somebody else fills while the training writes."""
    folder = bench.new_folder("tmpfs")
    (folder / "runs").mkdir()
    target = folder / place
    target.mkdir(exist_ok=True)
    small, after = bench.rng.random() < 0.5, bench.rng.uniform(0, bench.answer(kind).seconds)
    kilobytes = bench.rng.randint(4, 6000)
    if place == "cache":  # the kernels fit: without them numbers differ by rounding
        kilobytes = bench.kernel_bytes() // 1024 + bench.rng.randint(32, 300)
    if not _mount(f"size={kilobytes}k" if small else "size=24m", target):
        return "the tmpfs could not be mounted"
    cache, filler = bench.cache(folder), target / "filler"

    def full() -> int:
        arm(target, -1)
        return _counting(folder, bench, kind)

    def filled() -> int:
        other = os.fork()
        if not other:
            _fill(filler, after)
        code = full()
        os.waitpid(other, 0)
        return code

    def make_room() -> None:
        filler.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=200m", str(target)], capture_output=True, check=True)

    try:
        return _recovers(bench, kind, folder, cache, full if small else filled, make_room)
    finally:
        _unmount(target)


def _fill(file: Path, after: float) -> None:
    """Ends this process when it has written to ``file`` all that fits."""
    time.sleep(after)
    try:
        with open(file, "wb", buffering=0) as opened:
            while opened.write(b"\0" * 65536):
                pass
    except OSError:
        pass
    os._exit(0)
