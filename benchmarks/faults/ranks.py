"""Trainings in two processes of which one is killed or stopped, or whose torchrun is killed; then resumed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from faults.bench import Answer, Bench, Case
from faults.process import Ended, Fresh, Process, children_of, command

SILENCE = 15.0  # seconds after which a process that does not answer is given up, in these trainings
SOON = 60.0  # seconds in which the others end
OVERLOADED = 180.0  # the same where more processes than cores want to run
IN_VAIN = 5  # trainings in a row that ended before they were struck
LONGER = ["--epochs", "10"]
WAYS = ("a rank is killed", "a rank is stopped", "a rank is terminated")
LAUNCHED = ("torchrun: a rank is killed", "torchrun itself is killed", "torchrun: a rank is stopped")


def ranks(count: int, bench: Bench) -> Iterator[Case]:
    """Three of four with ranks of our own, which have everything imported; the others with torchrun."""
    answer: Answer | None = None
    number = in_vain = 0
    while number < count:
        launched = number % 4 == 3
        ways = LAUNCHED if launched else WAYS
        way = ways[(number // 4 if launched else number) % len(ways)]
        if answer is None:
            answer = _undisturbed(bench)
        folder = bench.new_folder("ranks")
        fault = _launched(bench, folder, way) if launched else _own(bench, folder, way)
        if fault is None:
            bench.notes["had ended before, tried again"] += 1
            if (in_vain := in_vain + 1) == IN_VAIN:
                raise RuntimeError(f"{way}: {IN_VAIN} trainings in a row ended before")
        else:
            number, in_vain = number + 1, 0
            bench.notes[way] += 1
            yield way, fault or _resumed(bench, folder, answer)
        shutil.rmtree(folder, ignore_errors=True)


def _start(bench: Bench, folder: Path, resume: bool = False) -> list[Process]:
    """Both ranks, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = bench.cache(folder)
    return [
        Process(
            command([*bench.words("scratch", folder, resume), *LONGER]),
            {
                "FINETUNE101_CACHE": str(cache), "FINETUNE101_TIMEOUT": str(SILENCE), "WORLD_SIZE": "2",
                "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]  # fmt: skip


def _undisturbed(bench: Bench) -> Answer:
    folder = bench.new_folder("two")
    ended = [rank.wait() for rank in _start(bench, folder)]
    answer = bench.judged(folder / "r")
    if any(one.code for one in ended) or isinstance(answer, str):
        raise RuntimeError(f"two ranks failed: {answer} {ended[0].err[-2000:]} {ended[1].err[-2000:]}")
    return answer


def _begun(bench: Bench, run: Path, is_alive: Process) -> None:
    """Waits until the ranks train, and a moment more."""
    while is_alive.is_alive() and not (run / "metrics.jsonl").is_file():
        time.sleep(0.005)
    time.sleep(bench.rng.uniform(0, 0.5 * bench.answer("scratch").seconds))


def _late(sent: float, bench: Bench) -> str:
    """Whether the others took too long, in words."""
    seconds = time.monotonic() - sent
    busy = os.getloadavg()[0] > len(os.sched_getaffinity(0))
    bench.notes["slowest end, seconds"] = max(bench.notes["slowest end, seconds"], round(seconds))
    bench.notes["the looser limit was needed"] += busy and SOON < seconds <= OVERLOADED
    return f"the others ended after {seconds:.0f} s" if seconds > (OVERLOADED if busy else SOON) else ""


def _own(bench: Bench, folder: Path, way: str) -> str | None:
    """What is wrong with how both ranks ended; None where the victim had ended before."""
    processes = _start(bench, folder)
    _begun(bench, folder / "r", processes[0])
    victim = bench.rng.randrange(2)
    number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "terminated": signal.SIGTERM}[way.split()[-1]]
    sent = time.monotonic()
    sending = processes[victim].send(number)
    other = processes[1 - victim].wait(OVERLOADED)
    late = _late(sent, bench)
    if number == signal.SIGSTOP:
        processes[victim].send(signal.SIGKILL)
    ended = processes[victim].wait()
    if other.code == 0 and (not sending or ended.code == 0):
        return None
    if number == signal.SIGTERM and (fault := ended.fault(allowed=(0, 143))):
        return f"the terminated rank: {fault}"
    return late or ("" if other.code == 0 else first_sentence(other))


def first_sentence(ended: Ended) -> str:
    """What is wrong with the first complaint on standard error: it must be one sentence of ours with a remedy."""
    if ended.hung:
        return "the other rank does not end"
    signs = ("error", "Error", "Traceback", "terminated", "terminate called")
    lines = re.split(r"[\r\n]", ended.err)  # the progress bar of a killed rank may stand before a sentence
    first = next((line for line in lines if any(sign in line for sign in signs)), "")
    is_ours = re.search(r"(error: |terminated; ).*--resume", first)
    return "" if is_ours else f"exit code {ended.code}, the first complaint is: {first[:300] or ended.err[-300:]}"


def _launched(bench: Bench, folder: Path, way: str) -> str | None:
    """The same of two ranks below torchrun; None where they had ended before."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "finetune101"]
    variables = {"FINETUNE101_CACHE": str(bench.cache(folder)), "FINETUNE101_TIMEOUT": str(SILENCE)}
    launcher = Fresh([*launch, *bench.words("scratch", folder), *LONGER], variables)
    _begun(bench, folder / "r", launcher)
    pids = children_of(launcher.pid)
    if len(pids) != 2:
        ended = launcher.wait()
        return None if ended.code == 0 else f"the ranks are not there: {ended.err[-500:]}"
    victim = launcher.pid if "itself" in way else bench.rng.choice(pids)
    sent = time.monotonic()
    with contextlib.suppress(ProcessLookupError):  # it has just ended: so has torchrun, with 0
        os.kill(victim, signal.SIGSTOP if "stopped" in way else signal.SIGKILL)
    others = [pid for pid in pids if pid != victim]
    while any(_is_alive(pid) for pid in others) and time.monotonic() - sent < OVERLOADED:
        time.sleep(0.05)
    late, left = _late(sent, bench), [pid for pid in others if _is_alive(pid)]
    if "stopped" in way:
        launcher.wait(OVERLOADED)  # it ends what is stopped
    for pid in pids:
        if _is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    if left:
        return f"{len(left)} ranks train on"
    ended = launcher.wait()
    return None if ended.code == 0 else late or first_sentence(ended)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _resumed(bench: Bench, folder: Path, answer: Answer) -> str:
    """What is wrong with the training when it has been resumed by two ranks; "" for nothing."""
    resume = (folder / "r/config.json").is_file()
    for one in [rank.wait() for rank in _start(bench, folder, resume)]:
        if fault := one.fault(allowed=(0,)):
            return f"resumed: {fault}"
    result = bench.judged(folder / "r")
    fault = result if isinstance(result, str) else answer.difference(result)
    return f"resumed: {fault}" if fault else ""
