"""Two trainings of one name, and many processes that make one cache."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.bench import Answer, Bench, Case
from faults.process import Process, command

TOGETHER = 8  # processes that make one cache
NEW_PIDS = 0x20000000  # CLONE_NEWPID


def twice(count: int, bench: Bench) -> Iterator[Case]:
    """In turns: two new trainings of one name, two that overwrite, two that resume, eight with one cache (two ways)."""
    ways: list[Callable[[Bench, Path], str | None]] = [_two_new, _one_cache, _two_overwrite, _one_number, _two_resume]
    done = 0
    while done < count:
        way = ways[done % len(ways)]
        folder = bench.new_folder("twice")
        fault = way(bench, folder)
        if fault is None:
            bench.notes["one had ended before, tried again"] += 1
        else:
            done += 1
            yield (way.__doc__ or "").rstrip("."), fault
        if not fault:
            shutil.rmtree(folder, ignore_errors=True)


def _seeded(bench: Bench, seed: int, runs: Path, *more: str) -> Callable[[], int]:
    return command([*bench.words("scratch", runs), "--seed", str(seed), *more])


def _answers(bench: Bench) -> list[Answer]:
    """What the trainings with seeds 0 and 1 come to, made once."""
    folder = bench.folder / "seeds"
    answers = []
    for seed in (0, 1):
        runs = folder / str(seed)
        if not runs.is_dir():
            Process(_seeded(bench, seed, runs)).wait()
        result = bench.judged(runs / "r")
        if isinstance(result, str):
            raise RuntimeError(result)
        answers.append(result)
    return answers


def _two_at_once(bench: Bench, folder: Path, *more: str) -> str | None:
    """Two trainings with seeds 0 and 1 into one run, the second a little later; what is wrong with the outcome.

    None where the first had ended before the second began.
    """
    answers, environment = _answers(bench), {"FINETUNE101_CACHE": str(bench.cache(folder))}
    first = Process(_seeded(bench, 0, folder, *more), environment)
    time.sleep(bench.rng.choice([0.0, 0.02, 0.2, bench.rng.uniform(0, bench.answer("scratch").seconds)]))
    second = Process(_seeded(bench, 1, folder, *more), environment)
    together = first.is_alive()
    ended = [first.wait(), second.wait()]
    for one in ended:
        if fault := one.fault():
            return fault
    if not together:
        return None
    codes = [one.code for one in ended]
    if 0 not in codes or (codes == [0, 0] and "--overwrite" not in more):
        return f"exit codes {codes}: {ended[0].err[-300:]} {ended[1].err[-300:]}"
    refused = next((one.err for one in ended if one.code), "")
    if refused and not any(words in refused for words in ("is being trained by", "exists; add --resume")):
        return f"refused by another sentence: {refused[-300:]}"
    bench.notes["the second refused" if codes[1] else "the first refused" if codes[0] else "one after the other"] += 1
    result = bench.judged(folder / "r")
    if isinstance(result, str):
        return result
    winners = [answer for answer, code in zip(answers, codes, strict=True) if code == 0]
    differences = [answer.difference(result) for answer in winners]
    return "" if "" in differences else f"mixed: {differences[0]}"


def _two_new(bench: Bench, folder: Path) -> str | None:
    """two new trainings of one name."""
    return _two_at_once(bench, folder)


def _two_overwrite(bench: Bench, folder: Path) -> str | None:
    """two trainings that overwrite one run."""
    Process(_seeded(bench, 0, folder)).wait()
    return _two_at_once(bench, folder, "--overwrite")


def _two_resume(bench: Bench, folder: Path) -> str | None:
    """two trainings that resume one run."""
    answer = bench.answer("scratch")
    environment = {"FINETUNE101_CACHE": str(bench.cache(folder))}
    begun = Process(command(bench.words("scratch", folder)), environment)
    while begun.is_alive() and not (folder / "r/metrics.jsonl").is_file():
        time.sleep(0.002)
    begun.send(signal.SIGKILL)
    if begun.wait().code != -signal.SIGKILL:
        return None
    words = bench.words("scratch", folder, resume=True)
    both = [Process(command(words), environment), Process(command(words), environment)]
    ended = [process.wait() for process in both]
    for one in ended:
        if fault := one.fault():
            return fault
    bench.notes["resumed: one refused"] += any(one.code for one in ended)
    if all(one.code for one in ended):
        return f"both were refused: {ended[0].err[-300:]}"
    result = bench.judged(folder / "r")
    return result if isinstance(result, str) else answer.difference(result)


def _cache(bench: Bench, folder: Path, before: Callable[[], None]) -> str:
    """Eight trainings with one empty cache at once; what is wrong with the outcome."""
    bench.answer("scratch")
    cache = bench.cache(folder)
    processes = []
    for number in range(TOGETHER):
        words = bench.words("scratch", folder / str(number))

        def call(words: list[str] = words) -> int:
            before()
            return command(words)()

        processes.append(Process(call, {"FINETUNE101_CACHE": str(cache)}))
    ended = [process.wait() for process in processes]
    for one in ended:
        if fault := one.fault(allowed=(0,)):
            return fault
    made = sum(one.out.count("Decoding") for one in ended)
    if made != 1:
        return f"{made} processes decoded the images"
    for number in range(TOGETHER):
        if fault := bench.as_trained(folder / str(number) / "r", "scratch"):
            return fault
    left = [path.name for path in cache.rglob(".*")]
    return f"left in the cache: {left}" if left else ""


def _one_cache(bench: Bench, folder: Path) -> str:
    """eight processes that make one cache."""
    return _cache(bench, folder, lambda: None)


def _one_number(bench: Bench, folder: Path) -> str:
    """eight processes of one number, as in containers, that make one cache."""
    return _cache(bench, folder, _number_one)


def _number_one() -> None:
    """Goes on in a process that is number 1 of a space of its own; where that is not allowed, only says so."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_PIDS):
        os.getpid = lambda: 1
        return
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    assert os.getpid() == 1
