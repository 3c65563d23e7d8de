"""A search: one driver draws points, has them trained, and keeps the best; resumable, and bounded by a budget.

With --pruner halving it is asynchronous successive halving (ASHA: Li et al., 2020; Hyperband: Li et al., 2018) in which
a rung is a whole short schedule: of every four points the best one goes on to the whole of its epochs. A run's own
curve would mislead, as its rate has not dropped yet.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune101.config import TrainConfig
from finetune101.data.images import find_data, index_images
from finetune101.data.layouts import layout_for
from finetune101.errors import Refused
from finetune101.experiments import outcome
from finetune101.experiments.folders import alone
from finetune101.experiments.runner import Ended, Epoch, Event, Failed, Task, Workers, run_tasks
from finetune101.experiments.search_plan import ETA, Plan, check_plan, search_name
from finetune101.experiments.space import Point, point_label
from finetune101.experiments.stage import Stage, open_journal
from finetune101.run import Run
from finetune101.training import duration
from finetune101.training.job import sharing

MARGIN = 1.2  # by which the runs that a new point may lead to can take longer than foreseen
ENOUGH = 8  # points before which no time is kept for seeds: another point is worth more


@dataclass
class Clock:
    """The time that is left, and what runs cost: their estimate, corrected by what the first ones took."""

    budget: float | None
    cost: Callable[[TrainConfig], float] = lambda config: 0.0
    """Estimated seconds of a run, with its share of the cores."""
    jobs: int = 1
    """Runs at a time."""
    started: float = field(default_factory=time.monotonic)
    _begun: float | None = field(init=False, default=None)
    _trained: float = field(init=False, default=0.0)

    def left(self) -> float:
        """Seconds that are left for runs; a few are kept for the files at the end."""
        if self.budget is None:
            return math.inf
        return self.budget - max(3.0, 0.03 * self.budget) - (time.monotonic() - self.started)

    def count(self, epoch: Epoch) -> None:
        """Takes notice of a trained epoch."""
        config = epoch.task.config
        if not epoch.is_new or self.budget is None or not epoch.record["epoch"]:
            return
        if self._begun is None:  # the first epoch of all also decodes the images
            self._begun = time.monotonic()
            return
        self._trained += self.cost(config) / config.optim.epochs

    def time_of(self, configs: Sequence[TrainConfig]) -> float:
        """Seconds that all of ``configs`` take, ``jobs`` of them at a time."""
        if self.budget is None or not configs:
            return 0.0
        costs = [self.cost(config) for config in configs]
        took = time.monotonic() - self._begun if self._begun is not None else 0.0
        slower = took * self.jobs / self._trained if self._trained and took > 1 else 1.0
        return max(sum(costs) / self.jobs, max(costs)) * slower


@dataclass
class Search:
    """The driver: stages of a plan one after the other, each on the best points of the one before."""

    plan: Plan
    clock: Clock
    probe: Stage | None = field(init=False, default=None)
    rungs: list[Stage] = field(init=False)
    final: Stage | None = field(init=False, default=None)
    trained: float = field(init=False, default=0.0)
    """Seconds of training and validation by this command."""
    _stage_of: dict[str, Stage] = field(init=False, default_factory=dict)
    """The stage of each run that is at work, by the name of the run."""
    _late: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        plan, name, journal = self.plan, search_name(self.plan), open_journal(self.plan.folder)
        if plan.probe:
            self.probe = Stage(f"{name} (probe)", plan.probe, {}, journal)
        self.rungs = [
            Stage(
                name if share == 1 else f"{name} ({round(plan.base.optim.epochs * share)} epochs)", plan.base,
                plan.space, journal, plan.sampler if number == 0 else "grid",
                "median" if plan.pruner == "median" else "none", share,
            )
            for number, share in enumerate(plan.shares())
        ]  # fmt: skip
        if plan.finalists:
            first = plan.base.system.seed
            space = {**plan.space, "seed": list(range(first, first + plan.seeds))}
            self.final = Stage(f"{name} ({plan.seeds} seeds)", plan.base, space, journal)

    def run(self, workers: Workers) -> Generator[Event | None, None, None]:
        """Trains what is missing; yields what happens, and None about every second."""
        with contextlib.closing(run_tasks(self._tasks(), workers, self._goes_on)) as events:
            for event in events:
                if isinstance(event, Epoch):
                    self.clock.count(event)
                    if event.is_new:
                        self.trained += event.record["seconds"] + event.record["val_seconds"]
                elif event is not None:
                    self._end(event)
                yield event
                if self.clock.left() < 0:
                    return

    def _end(self, event: Ended | Failed) -> None:
        """Takes notice of the end of a run."""
        exp = event.task.config.exp
        stage = self._stage_of.pop(exp)
        if exp in self._late:
            stage.leave(exp)
            return
        stage.end(event, may_fail=stage is self.probe)  # a network may have no linear output layer
        if stage in self.rungs:
            stage.keep_best()

    def _goes_on(self, epoch: Epoch) -> bool:
        """Whether a run goes on: neither its pruner nor the budget stops it."""
        config = epoch.task.config
        if not self._stage_of[config.exp].goes_on(epoch):
            return False
        is_last = epoch.record["epoch"] >= config.optim.epochs
        if is_last or not epoch.is_new or self.clock.time_of([config]) / config.optim.epochs <= self.clock.left():
            return True
        self._late.add(config.exp)
        return False

    def _tasks(self) -> Iterator[Task | None]:
        """The runs of all stages, each when there is time for it; None: not before another run has ended."""
        if self.probe:
            yield from self._until_ended(self.probe, self.probe.tasks([{}]))
        first, whole = self.rungs[0], self.rungs[-1]
        if first is not whole and self._has_time(whole, 0):  # the recipe itself: what follows can only be better
            for own in whole.tasks(self.plan.first):
                self._note(own, whole)
                yield own
        order = self.plan.points()
        points, is_more = first.tasks(order), True
        while True:
            task = self._promoted(order, is_more) if whole is not first else None
            if task is None and is_more:
                if not first.drawn() or self._has_time(first, 1):
                    task = next(points, None)
                    self._note(task, first)
                is_more = task is not None
                if not is_more:
                    continue  # now more of them may go on
            if task is None and not first.is_running() and not whole.is_running():
                break
            yield task
        if self.final:
            seeds, best = self.final.space["seed"], self._best()
            assert isinstance(seeds, list)
            seeded = [{**point, "seed": seed} for seed in seeds for point in best]
            yield from self._until_ended(self.final, self.final.tasks(seeded))

    def _best(self) -> list[Point]:
        """The points that become finalists."""
        entries = self.rungs[-1].entries(self.plan.points())
        return [entry["point"] for entry in entries if entry["state"] == "complete"][: self.plan.finalists]

    def _note(self, task: Task | None, stage: Stage) -> None:
        if task:
            self._stage_of[task.config.exp] = stage

    def _until_ended(self, stage: Stage, tasks: Iterator[Task]) -> Iterator[Task | None]:
        """``tasks`` of ``stage``, as many as there is time for; then None until the last one has ended."""
        while stage is self.probe or self._has_time(stage, 0):
            task = next(tasks, None)
            if task is None:
                break
            self._note(task, stage)
            yield task
        while stage.is_running():
            yield None

    def _promotable(self, order: Sequence[Point], is_more: bool) -> list[Point]:
        """The points of the first rung that may go on to the whole schedule and have not begun it, best first."""
        ended = [entry["point"] for entry in self.rungs[0].entries(order) if entry["state"] == "complete"]
        most = len(ended) // ETA if is_more or self.rungs[0].is_running() else math.ceil(len(ended) / ETA)
        begun = self.rungs[-1].labels()
        return [point for point in ended[:most] if point_label(point) not in begun]

    def _promoted(self, order: Sequence[Point], is_more: bool) -> Task | None:
        """The next run of the whole schedule, an interrupted one first; None where there is none, or no time for it."""
        whole = self.rungs[-1]
        if not self._has_time(whole, 0):
            return None
        task = next(whole.tasks(self._promotable(order, is_more)[:1]), None)
        self._note(task, whole)
        return task

    def _has_time(self, stage: Stage, more: int) -> bool:
        """Whether another run of ``stage`` ends in time, and with ``more`` points one of them the whole schedule."""
        if self.plan.budget is None:
            return True
        running = [own.config_of({}) for own in self.stages() for _ in own.at_work]
        runs = [*running, stage.config_of({})]
        if stage is self.rungs[0]:
            points = stage.drawn() + more
            seeded = self.plan.finalists * (self.plan.seeds - 1) if points >= ENOUGH else 0
            promoted = math.ceil(points / ETA) - self.rungs[-1].drawn() if len(self.rungs) > 1 else 0
            runs += [self.plan.base] * (max(promoted, 0) + seeded)
        margin = MARGIN if stage is self.rungs[0] and len(self.rungs) > 1 else 1.0
        return margin * self.clock.time_of(runs) <= self.clock.left()

    def stage_name(self) -> str:
        """Which stage is at work, in words."""
        stages = list(self._stage_of.values())
        if self.probe and self.probe in stages:
            return "probe"
        if self.final and self.final in stages:
            return "finalists"
        if len(self.rungs) == 1:
            return ""
        return "whole schedule" if self.rungs[-1] in stages else "short schedule"

    def stages(self) -> list[Stage]:
        """All stages, in order."""
        return [stage for stage in (self.probe, *self.rungs, self.final) if stage]

    def points_left(self) -> int:
        """Points that the same command still trains; with a budget those that were begun."""
        first = self.rungs[0]
        begun = sum(stage.interrupted() for stage in self.stages())
        return begun if self.plan.budget else max(begun, len(self.plan.points()) - first.ended())

    def probe_entry(self) -> dict[str, Any] | None:
        """The output layer alone; None where the plan has no such stage, or it has not ended."""
        return next(iter(self.probe.entries()), None) if self.probe else None

    def entries(self) -> list[dict[str, Any]]:
        """One entry for each point, from the last rung that it reached; those of the last rung come first.

        ``rungs``: its accuracy after each number of epochs.
        """
        order = self.plan.points()
        entries: dict[str, dict[str, Any]] = {}
        for stage in self.rungs:
            for entry in stage.entries(order):
                label = point_label(entry["point"])
                before = entries.get(label, {"rungs": {}})
                if entry["error"] and before["rungs"]:
                    continue  # it has a score of a shorter schedule
                entry["rungs"] = dict(before["rungs"])
                if entry["epochs"] is not None and len(self.rungs) > 1:
                    entry["rungs"][str(entry["epochs"])] = entry["best_val_top1"]
                if stage is not self.rungs[-1] and entry["state"] == "complete":
                    entry["state"] = "pruned"
                entries[label] = entry
        return sorted(
            entries.values(),
            key=lambda e: (e["error"] is not None, e["state"] != "complete", -(e["best_val_top1"] or 0)),
        )

    def finalists(self) -> list[dict[str, Any]]:
        """The best points, where each has a run of every seed, by their mean accuracy (%), best first."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for entry in self.final.entries() if self.final else []:
            groups.setdefault(point_label(without_seed(entry["point"])), []).append(entry)
        best = [point_label(point) for point in self._best()]
        if not best or any(len(groups.get(label, [])) < self.plan.seeds for label in best):
            return []  # the budget ended before: means of some and single scores of others are not compared
        return sorted((average(groups[label]) for label in best), key=lambda one: (one["failed"], -(one["mean"] or 0)))


def without_seed(point: Point) -> Point:
    """``point`` without its seed."""
    return {name: value for name, value in point.items() if name != "seed"}


def average(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One entry for the seeds of a point: mean and standard deviation of their accuracies (%)."""
    scores = [entry["best_val_top1"] for entry in group if entry["state"] == "complete"]
    has_weights = [entry["run"] for entry in group if entry["run"] and Run(Path(entry["run"])).best.is_file()]
    return {
        "point": without_seed(group[0]["point"]),
        "mean": statistics.fmean(scores) if scores else None,
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "seeds": {str(entry["point"]["seed"]): entry["best_val_top1"] for entry in group},
        "failed": len(group) - len(scores),
        "run": next(iter(has_weights), group[0]["run"]),
    }


OF_BUDGET = "{l_bar}{bar}| {n_fmt} of {total_fmt} s{postfix}"


class Progress:
    """A bar over the points, or over the budget, with the best accuracy so far."""

    def __init__(self, search: Search) -> None:
        plan, self.search = search.plan, search
        total, form = (round(plan.budget), OF_BUDGET) if plan.budget else (len(plan.points()), None)
        self.bar = tqdm(
            total=total, desc=plan.base.exp, unit="point", bar_format=form, dynamic_ncols=True, mininterval=0.5,
            smoothing=0,
        )  # fmt: skip
        self.epoch = ""

    def show(self, event: Event | None) -> None:
        """Brings the bar to where the search stands after ``event``."""
        if isinstance(event, Epoch):
            self.epoch = f"epoch {event.record['epoch']} of {event.task.config.optim.epochs}"
        clock, rung = self.search.clock, self.search.rungs[0]
        entries = self.search.rungs[-1].entries() or rung.entries()
        done = time.monotonic() - clock.started if clock.budget else len(rung.entries())
        best = f"best {entries[0]['best_val_top1']:.2f} %" if entries and not entries[0]["error"] else ""
        self.bar.set_postfix_str(", ".join(filter(None, [self.search.stage_name(), best, self.epoch])), refresh=False)
        self.bar.update(min(round(done), self.bar.total) - self.bar.n)
        if sys.stderr.isatty():  # in a log file every refresh would be a line
            self.bar.refresh()


def run_search(
    plan: Plan,
    table: Path,
    plots: Path,
    draw: outcome.Draw,
    workers: Workers,
    cost: Callable[[TrainConfig], float] | None = None,
) -> int:
    """Trains what is missing of ``plan``, prints the ranking and writes all results, also when it is interrupted.

    ``table`` gets the original's form, ``plots`` the curves of every trial, drawn by ``draw`` (records, file, title).
    ``cost`` estimates the seconds of a run; by default a few steps are measured.
    Returns 1 where a point failed by a fault of the program or the machine, else 0. Raises Refused for a plan, data or
    weights that cannot work.
    """
    check_plan(plan)
    clock = Clock(plan.budget, (cost or run_cost(plan)) if plan.budget else lambda config: 0.0, plan.jobs)
    _check_budget(plan, clock)
    with alone(plan.folder, "search"):
        outcome.check_same(plan)
        print(outcome.estimate(plan), flush=True)
        search, started = Search(plan, clock), time.perf_counter()
        progress = Progress(search)
        try:
            with contextlib.closing(search.run(workers)) as events:
                for event in events:
                    progress.show(event)
                    if isinstance(event, Ended):  # each takes a moment, which at the end would exceed the budget
                        path = str(event.task.run.path)
                        ended = [entry for entry in search.entries() if entry["run"] == path]
                        outcome.draw_curves(plan, ended, plots, draw)
        finally:
            progress.bar.close()
            result = outcome.Outcome(search.entries(), search.finalists(), search.probe_entry())
            if result.entries or result.probe:
                wall = time.perf_counter() - started
                took = {"wall_seconds": wall, "training_seconds": search.trained} if search.trained else None
                outcome.write_search(plan, search_name(plan), result, took, table)
                outcome.draw_curves(plan, result.entries, plots, draw)
    outcome.print_ranking(plan, result, table, search.points_left())
    return int(any(entry["trace"] is not None for entry in result.entries))


def run_cost(plan: Plan) -> Callable[[TrainConfig], float]:
    """Estimated seconds of a run, by a few steps of each network, size and batch size on this machine."""
    data = plan.base.data
    index = index_images(find_data(data.root), layout_for(data.protocol))
    images, paces = duration.count(index, data), dict[str, duration.Pace]()

    def cost(config: TrainConfig) -> float:
        kind = duration.step_kind(config)
        if kind not in paces:
            with duration.undisturbed():
                shared = sharing(config, plan.jobs) if plan.jobs > 1 else config
                paces[kind] = duration.measure(shared, len(index.classes))
        return paces[kind].of(duration.Work(config, images))

    return cost


def _check_budget(plan: Plan, clock: Clock) -> None:
    """Raises Refused where the budget is too short for one run."""
    if plan.budget is not None and (needed := clock.cost(plan.base)) > clock.left():
        raise Refused(
            f"one run of {plan.base.optim.epochs} epochs takes about {duration.in_words(needed)}, more than the budget;"
            " give a longer --budget, fewer --epochs or a smaller --size"
        )
