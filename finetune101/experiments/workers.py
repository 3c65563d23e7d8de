"""The processes of a search: one that works itself, or a parent with workers, which notices those that die."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from finetune101.errors import Refused
from finetune101.experiments.processes import context, follow_parent, open_folder, stop
from finetune101.experiments.queue import Plan, fill, open_study, retry, work
from finetune101.experiments.trial import signature
from finetune101.files import claim, claimed_by
from finetune101.training.job import sharing

Watch = Callable[[optuna.Study, dict[str, Any] | None], None]
NEWBORN = 10.0  # seconds in which a worker must have signed the trial that it took


@contextlib.contextmanager
def alone(plan: Plan) -> Iterator[None]:
    """Keeps a second search out of a folder with a journal. Raises Refused when there is one already."""
    open_folder(plan.folder, "search")
    if plan.storage is not None or os.name != "posix":
        yield
        return
    with claim(plan.folder / "search.lock") as mine:
        if not mine:
            raise Refused(
                f"another search ({claimed_by(plan.folder / 'search.lock')}) is at work in {plan.folder}; "
                "wait for it, or give this one another --exp"
            )
        _mend(plan)
        yield


def _mend(plan: Plan) -> None:
    """Takes off the journal's last line where a crash or a full disk cut it, or nobody could read the rest."""
    journal = plan.folder / "optuna.journal"
    text = journal.read_bytes() if journal.is_file() else b""
    if text and not text.endswith(b"\n"):
        os.truncate(journal, text.rfind(b"\n") + 1)


def run_workers(plan: Plan, watch: Watch) -> optuna.Study:
    """Trains all of ``plan`` that is not finished; ``watch(study, epoch record or None)`` is called every so often.

    Raises Refused when settings, data or weights cannot work. Ctrl-C stops at once; the same plan then goes on.
    """
    study = open_study(plan)
    fill(plan, study)
    deadline = time.monotonic() + (plan.timeout or float("inf"))
    watch(study, None)
    if plan.jobs == 1:
        work(plan, study, deadline, on_epoch=lambda record: watch(study, record))
    else:
        _Parent(plan, study, deadline).run(watch)
    watch(study, None)
    return study


@dataclass
class _Worker:
    process: Any
    errors: Any  # the end of a pipe on which the worker says why it stopped


@dataclass
class _Parent:
    """Starts workers while trials wait, and gives the trials of dead ones back to the queue."""

    plan: Plan
    study: optuna.Study
    deadline: float
    workers: list[_Worker] = field(default_factory=list)
    started: int = 0

    def run(self, watch: Watch) -> None:
        """Until nothing waits and no worker is left."""
        try:
            while True:
                dead = self._reap()
                journal = self.plan.storage is None  # in a database the heartbeat tells who is dead
                if journal and (dead or not self.workers):
                    retry(self.study, self._orphan)
                states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
                waiting = TrialState.WAITING in states and time.monotonic() < self.deadline
                if waiting and len(self.workers) < self.plan.jobs:
                    self._start()
                    continue
                if not self.workers and not (journal and TrialState.RUNNING in states):
                    break
                watch(self.study, None)
                time.sleep(0.2 if self.plan.storage is None else 1)
        finally:
            stop([worker.process for worker in self.workers])

    def _reap(self) -> bool:
        """Takes the ended workers off the list; whether one was killed. Raises Refused when one met an error."""
        ended = [worker for worker in self.workers if worker.process.exitcode is not None]
        self.workers = [worker for worker in self.workers if worker not in ended]
        for worker in ended:
            if worker.errors.poll():
                with contextlib.suppress(EOFError):
                    raise Refused(worker.errors.recv())
            if worker.process.exitcode > 0:
                raise Refused("a worker, or what starts them, came to a sudden end; the same command goes on")
        return any(worker.process.exitcode != 0 for worker in ended)

    def _orphan(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("worker")
        if owner is None:  # taken, not signed yet
            assert trial.datetime_start is not None
            return time.time() - trial.datetime_start.timestamp() > NEWBORN
        return owner not in {signature(worker.process.pid) for worker in self.workers}

    def _start(self) -> None:
        births = context(__name__)
        parent_end, child_end = births.Pipe(duplex=False)
        plan = dataclasses.replace(self.plan, base=sharing(self.plan.base, self.plan.jobs))
        left = self.deadline - time.monotonic()
        self.started += 1
        process = births.Process(target=_main, args=(plan, left, self.started, child_end), name="search-worker")
        process.start()
        child_end.close()
        self.workers.append(_Worker(process, parent_end))


def _main(plan: Plan, seconds: float, number: int, errors: Any) -> None:
    """A worker process; it ends with its parent, and by the parent's SIGTERM as by Ctrl-C."""
    follow_parent()
    try:
        work(plan, open_study(plan), time.monotonic() + seconds, number)
    except Refused as error:
        errors.send(str(error))
    except KeyboardInterrupt:
        pass
