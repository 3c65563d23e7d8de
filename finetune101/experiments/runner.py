"""Trains many runs: in worker processes on this machine, or on a Ray cluster (``cluster.py``); all arrives as events.

A finished run is skipped, a begun one goes on from its last epoch, a failure is recorded and the other runs go on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from finetune101.config import TrainConfig
from finetune101.errors import Refused
from finetune101.evaluation.evaluate import evaluate
from finetune101.files import remove_abandoned
from finetune101.redaction import LOG, keep_error, redacted
from finetune101.run import Run
from finetune101.training.job import AtWork, prepare, sharing
from finetune101.training.log import log_records
from finetune101.training.loop import fit
from finetune101.training.resume import as_started

MAX_LOSSES = 5  # workers that a run may lose without an epoch between: it is the run that kills them
STOPPING = 5.0  # seconds in which workers that are told to stop may do so by themselves
PATIENCE = 30.0  # seconds in which the workers of a killed command let go of their runs


@dataclass(frozen=True)
class Task:
    """A run to train, and to test where ``is_tested``."""

    config: TrainConfig
    is_tested: bool = False

    @property
    def run(self) -> Run:
        """The run's folder."""
        return Run(Path(self.config.runs) / self.config.exp)

    def is_trained(self) -> bool:
        """Whether the run has its last epoch."""
        records = self.run.metrics()
        return bool(records) and records[-1]["epoch"] >= self.config.optim.epochs

    def is_done(self) -> bool:
        """Whether the run is trained to its last epoch, and tested where it is to be."""
        if self.is_tested:  # published evidence may lack its records
            return self.run.has("test.json") and self.run.epochs_left() <= 0
        return self.is_trained()


@dataclass(frozen=True)
class Epoch:
    """An epoch of a run has ended; ``is_new``: it was trained just now."""

    task: Task
    record: dict[str, Any]
    is_new: bool = True


@dataclass(frozen=True)
class Ended:
    """A run has ended; ``is_stopped``: before its last epoch, because it was told to."""

    task: Task
    is_stopped: bool = False


@dataclass(frozen=True)
class Failed:
    """A run has no result."""

    task: Task
    kind: str
    """Name of the exception: "Refused" for what the user can mend, "Diverged" for settings at fault, "OSError" and such
    for a machine at fault, "Killed" for a process that came to an end."""
    message: str
    """One line for people; it begins with ``kind`` but for "Refused"."""
    begun: bool
    """Whether anything of the run was trained."""
    trace: str | None = None
    """The file with the traceback."""

    def __str__(self) -> str:
        return f"{self.message} (traceback: {self.trace})" if self.trace else self.message


Event = Epoch | Ended | Failed


class Workers(Protocol):
    """What trains: processes of this machine, or tasks of a cluster."""

    def is_free(self) -> bool:
        """Whether another run can be started."""

    def is_busy(self) -> bool:
        """Whether any run is being trained."""

    def start(self, task: Task) -> None:
        """Begins or resumes a run."""

    def wait(self, seconds: float) -> list[tuple[Task, Event | None]]:
        """What has happened, within ``seconds``; None for a run whose worker died, which can be started again."""

    def answer(self, task: Task, go_on: bool) -> None:
        """Lets the run go on after an epoch, or stops it there: then an ``Ended`` follows."""

    def close(self) -> None:
        """Stops all runs after their last recorded epoch."""


def run_tasks(
    tasks: Iterable[Task | None], workers: Workers, goes_on: Callable[[Epoch], bool] = lambda epoch: True
) -> Generator[Event | None, None, None]:
    """Trains ``tasks``; yields what happens, and None at least about every second, for a bar that moves.

    The next task is asked for when a worker is free; None in its place: none before another run has ended. After each
    epoch ``goes_on`` says whether the run goes on. An epoch arrives once, also of a run that was interrupted.
    """
    todo, is_more = iter(tasks), True
    arrived: dict[str, int] = {}
    losses: Counter[str] = Counter()
    try:
        while True:
            while is_more and workers.is_free():
                try:
                    task = next(todo)
                except StopIteration:
                    is_more = False
                    break
                if task is None:
                    break
                if task.is_done():
                    for record in task.run.metrics():
                        epoch = Epoch(task, record, is_new=False)
                        yield epoch
                        goes_on(epoch)
                    yield Ended(task)
                else:
                    workers.start(task)
            if not workers.is_busy():
                if is_more:
                    continue
                return
            for task, event in workers.wait(1.0):
                name = task.config.exp
                if event is None:
                    losses[name] += 1
                    if losses[name] < MAX_LOSSES:
                        workers.start(task)
                    else:
                        yield Failed(
                            task, "Killed", f"Killed: {MAX_LOSSES} processes that trained it came to a sudden end, as "
                            "where memory is short; the same command goes on with the run", task.run.last.is_file(),
                        )  # fmt: skip
                elif isinstance(event, Epoch):
                    number = event.record["epoch"]
                    if number <= arrived.get(name, -1):
                        workers.answer(task, True)
                        continue
                    arrived[name] = number
                    if event.is_new:
                        losses[name] = 0
                    yield event
                    workers.answer(task, goes_on(event))
                else:
                    yield event
            yield None
    finally:
        workers.close()


def train_task(task: Task) -> Generator[Event, None, None]:
    """Trains and tests what ``task`` lacks: an ``Epoch`` for each of its records, then ``Ended`` or ``Failed``."""
    run = task.run
    with contextlib.suppress(OSError):
        remove_abandoned(run.path)  # of a killed worker
    try:
        is_trained = task.is_trained()
        for record in run.metrics() if is_trained or run.last.is_file() else []:
            yield Epoch(task, record, is_new=False)
        if not is_trained:
            job = _prepared(task.config, run)
            epochs: Any = fit(job, quiet=True)
            logged: Any = log_records(job.run, epochs)
            with contextlib.closing(epochs), contextlib.closing(logged):
                for record in logged:
                    yield Epoch(task, record)
        if task.is_tested and not run.has("test.json"):
            evaluate(run)
        run.last.unlink(missing_ok=True)  # a finished run is not continued, and there are many
        (run.path / LOG).unlink(missing_ok=True)  # of an earlier try
        yield Ended(task)
    except Refused as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # such as a full disk
        yield Failed(task, type(cause).__name__, str(error), run.has("config.json"))
    except Exception as error:  # out of memory, or a fault of ours: kept, and the others go on
        yield Failed(task, type(error).__name__, first_line(error), run.has("config.json"), _keep_trace(run, error))


def _prepared(config: TrainConfig, run: Run) -> Any:
    """The job of ``config``, begun or not; waits for the workers of a command that was killed a moment ago."""
    until = time.monotonic() + PATIENCE
    while True:
        is_begun = run.has("config.json")
        try:
            return prepare(as_started(config, run) if is_begun else config, resume=is_begun)
        except AtWork:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def first_line(error: BaseException) -> str:
    """Kind and first line of ``error``: "OutOfMemoryError: CUDA out of memory"."""
    lines = redacted(str(error)).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _keep_trace(run: Run, error: BaseException) -> str | None:
    """Adds the traceback of ``error`` to error.log of the run; that file's name, if it could be written."""
    with contextlib.suppress(OSError):
        run.path.mkdir(parents=True, exist_ok=True)
    return str(keep_error(error, run.path) or "") or None


class LocalWorkers:
    """Processes on this machine, ``jobs`` at most, which share its cores; each trains one run after the other."""

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        self._births = _births()
        self._idle: list[tuple[Any, Any]] = []  # (process, our end of its pipe)
        self._busy: dict[Any, tuple[Any, Task]] = {}  # by our end of the pipe

    def is_free(self) -> bool:
        return len(self._busy) < self.jobs

    def is_busy(self) -> bool:
        return bool(self._busy)

    def start(self, task: Task) -> None:
        while self._idle:
            if self._send(*self._idle.pop(), task):
                return
        ours, theirs = self._births.Pipe()
        process = self._births.Process(
            target=_work, args=(theirs, os.getcwd(), dict(os.environ)), name="finetune101-worker"
        )
        with _without_script():
            process.start()
        theirs.close()
        if not self._send(process, ours, task):
            self._busy[ours] = process, task  # it died at once: the next wait says so

    def _send(self, process: Any, pipe: Any, task: Task) -> bool:
        """Gives ``task`` to a worker; False where it died while it was idle."""
        config = sharing(task.config, self.jobs) if self.jobs > 1 else task.config
        try:
            pipe.send(Task(config, task.is_tested))
        except OSError:
            return False
        self._busy[pipe] = process, task
        return True

    def wait(self, seconds: float) -> list[tuple[Task, Event | None]]:
        events: list[tuple[Task, Event | None]] = []
        for pipe in connection.wait(list(self._busy), seconds):
            process, task = self._busy[pipe]
            try:
                event: Any = pipe.recv()  # type: ignore[union-attr, call-arg]
            except (EOFError, OSError):  # it was killed, as by the system when memory is short
                del self._busy[pipe]
                process.join()
                events.append((task, None))
                continue
            if not isinstance(event, Epoch):
                del self._busy[pipe]
                self._idle.append((process, pipe))
            events.append((task, event))
        return events

    def answer(self, task: Task, go_on: bool) -> None:
        pipe = next(pipe for pipe, (_, own) in self._busy.items() if own == task)
        with contextlib.suppress(OSError):  # it died meanwhile: the next wait says so
            pipe.send(go_on)

    def close(self) -> None:
        processes = [process for process, _ in [*self._idle, *self._busy.values()]]
        for process in processes:
            process.terminate()
        until = time.monotonic() + STOPPING
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
            process.join()
        self._idle, self._busy = [], {}


def _births() -> Any:
    """How worker processes are born: from a server that has imported this module, where there is such a thing."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    births = multiprocessing.get_context("forkserver")
    births.set_forkserver_preload([__name__])
    return births


SCRIPT = ("__file__", "__spec__")  # by which a worker finds the script that started it


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Hides the script that runs: a worker would run it once more, from its first line on."""
    script = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(script).pop(name) for name in SCRIPT if name in vars(script)}
    script.__spec__ = None
    try:
        yield
    finally:
        vars(script).update(hidden)


def _work(pipe: Any, folder: str, environment: dict[str, str]) -> None:
    """A worker process: trains what comes through ``pipe``; after an epoch it waits for the answer.

    It works in ``folder`` with the driver's ``environment``: those of the server that it is born from may be older.
    """
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the driver decides
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    driver = multiprocessing.parent_process()
    assert driver is not None
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        while True:
            task = pipe.recv()
            with contextlib.closing(train_task(task)) as events:
                for event in events:
                    pipe.send(event)
                    if isinstance(event, Epoch) and not pipe.recv():
                        events.close()
                        pipe.send(Ended(task, is_stopped=True))
                        break


def _end_with(driver: Any) -> None:
    driver.join()
    os._exit(1)  # as if killed: whoever gives the command again finds the last epoch
