"""Workers that train in this process, and a search that they ran: real training, and a test can change its code."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune101.config import TrainConfig
from finetune101.experiments.folders import alone
from finetune101.experiments.runner import Ended, Epoch, Event, Task, Workers, train_task
from finetune101.experiments.search import Clock, Search
from finetune101.experiments.search_plan import Plan
from finetune101.experiments.space import point_label


class InProcess:
    """Trains up to ``jobs`` runs in turns, an epoch each; ``deaths`` names tasks whose next worker dies at once."""

    def __init__(self, jobs: int = 1, deaths: list[str] | None = None) -> None:
        self.jobs = jobs
        self.deaths = deaths if deaths is not None else []
        self.started: list[Task] = []
        self._busy: list[tuple[Task, Generator[Event, None, None]]] = []
        self._stopped: list[Task] = []

    def is_free(self) -> bool:
        return len(self._busy) + len(self._stopped) < self.jobs

    def is_busy(self) -> bool:
        return bool(self._busy or self._stopped)

    def start(self, task: Task) -> None:
        self.started.append(task)
        self._busy.append((task, train_task(task)))

    def wait(self, seconds: float) -> list[tuple[Task, Event | None]]:
        if self._stopped:
            task = self._stopped.pop()
            return [(task, Ended(task, is_stopped=True))]
        task, events = self._busy.pop(0)
        if task.config.exp in self.deaths:
            self.deaths.remove(task.config.exp)
            events.close()
            return [(task, None)]
        event = next(events)
        if isinstance(event, Epoch):
            self._busy.append((task, events))
        else:
            events.close()
        return [(task, event)]

    def answer(self, task: Task, go_on: bool) -> None:
        if not go_on:
            number = [busy.config.exp for busy, _ in self._busy].index(task.config.exp)
            self._busy.pop(number)[1].close()
            self._stopped.append(task)

    def close(self) -> None:
        for _, events in self._busy:
            events.close()
        self._busy, self._stopped = [], []


@dataclass
class Searched:
    """A search that ended or was interrupted, as it stood then."""

    search: Search
    epochs: list[tuple[str, int]] = field(default_factory=list)
    """(run, number) of each epoch that was trained."""
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def runs(self) -> set[str]:
        """The names of the runs of which an epoch was trained."""
        return {name for name, _ in self.epochs}

    def scores(self) -> list[tuple[str, ...]]:
        """What is known of each point, apart from time and order."""
        keys = ("state", "best_val_top1", "best_epoch", "epochs", "steps", "error", "rungs")
        return sorted((point_label(entry["point"]), *(str(entry[key]) for key in keys)) for entry in self.entries)


class Simulated(Clock):
    """A clock on which an epoch takes exactly what it costs, and nothing else takes any time."""

    spent = 0.0

    def left(self) -> float:
        assert self.budget is not None
        return self.budget - self.spent

    def count(self, epoch: Epoch) -> None:
        if epoch.is_new:
            self.spent += self.cost(epoch.task.config) / epoch.task.config.optim.epochs

    def time_of(self, configs: Sequence[TrainConfig]) -> float:
        return sum(map(self.cost, configs))


def do_search(plan: Plan, workers: Workers | None = None, stop_after: int = 0, clock: Clock | None = None) -> Searched:
    """Runs ``plan``; as if Ctrl-C were pressed after ``stop_after`` trained epochs."""
    with alone(plan.folder, "search"):
        done = Searched(Search(plan, clock or Clock(plan.budget)))
        with contextlib.closing(done.search.run(workers or InProcess())) as events:
            for event in events:
                if isinstance(event, Epoch) and event.is_new:
                    done.epochs.append((event.task.run.name, event.record["epoch"]))
                    if len(done.epochs) == stop_after:
                        break
        done.entries = done.search.entries()
    return done
