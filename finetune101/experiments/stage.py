"""A stage of a search: points on one schedule, an Optuna study that one driver asks and tells.

The driver alone writes the journal, so ``optuna-dashboard RUNS/EXP/optuna.journal`` shows the search while it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from finetune101.config import TrainConfig, change, validate
from finetune101.errors import Refused
from finetune101.experiments.point_run import run_of, write_hparams
from finetune101.experiments.runner import Ended, Epoch, Failed, Task
from finetune101.experiments.space import Point, Range, Space, point_label
from finetune101.recipes import rescheduled
from finetune101.run import Run

Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "halving"]
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
TWINS = 20  # points in a row that were drawn before: then a search of a few values ends
NETWORK = {"model", "size", "weights", "pretrain", "head", "freeze", "cached_features", "batch_size", "freeze_norm"}
"""Settings of which some do not go together."""


class _OneWriter(JournalFileOpenLock):
    """No lock: the driver is the journal's only writer."""

    def acquire(self, blocking: bool = True) -> bool:
        """Nothing to wait for."""
        return True

    def release(self) -> None:
        """Nothing to let go of."""


def open_journal(folder: Path) -> JournalStorage:
    """The journal of the search in ``folder``, new or old. Raises Refused for a damaged one."""
    path = folder / "optuna.journal"
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):  # a crash or a full disk cut the last line, or nobody could read the rest
        os.truncate(path, text.rfind(b"\n") + 1)
    try:
        return JournalStorage(JournalFileBackend(str(path), _OneWriter(str(path))))
    except Exception as error:  # Optuna's reader: a damaged file raises nearly anything
        raise Refused(
            f"{path} is damaged ({type(error).__name__}); remove it and give the command again, it finds the runs"
        ) from error


def make_sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of that name; the points of a grid are fixed, so that nothing is left to draw."""
    return optuna.samplers.TPESampler(seed=seed) if name == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def make_pruner(name: Pruner) -> optuna.pruners.BasePruner:
    """The pruner within a run: below the median of the others at the same share of their schedules, or none."""
    return optuna.pruners.MedianPruner() if name == "median" else optuna.pruners.NopPruner()


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """The trial's point: what was fixed for it, else what the sampler draws."""
    point: Point = {}
    for name, values in space.items():
        if not isinstance(values, Range):
            point[name] = trial.suggest_categorical(name, values)
        elif isinstance(values.low, int) and isinstance(values.high, int):
            point[name] = trial.suggest_int(name, values.low, values.high, log=values.log)
        else:
            point[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return point


def shortened_schedule(config: TrainConfig, share: float) -> TrainConfig:
    """``config`` with ``share`` of its epochs as a whole schedule."""
    optim = config.optim
    epochs = max(1, round(optim.epochs * share)) if optim.epochs else 0
    return config if epochs == optim.epochs else replace(config, optim=rescheduled(optim, epochs))


@dataclass
class Stage:
    """Points of ``space`` around ``base``, each a run of ``share`` of its epochs; one Optuna study."""

    name: str
    base: TrainConfig
    space: Space
    storage: JournalStorage
    sampler: Sampler = "grid"
    pruner: Pruner = "none"
    share: float = 1.0
    study: optuna.Study = field(init=False)
    at_work: dict[str, tuple[optuna.Trial, Point, list[dict[str, Any]]]] = field(init=False, default_factory=dict)
    """Trial, point and records of each run that is not ended, by the name of the run."""
    late: set[int] = field(init=False, default_factory=set)
    """The numbers of trials that this command has no time for."""
    earlier: int = field(init=False)
    """How many trials earlier commands began."""

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # the progress bar says what there is to say
        pruner = make_pruner(self.pruner)
        try:
            self.study = optuna.load_study(storage=self.storage, study_name=self.name, pruner=pruner)
        except KeyError:  # create_study with load_if_exists would write to the journal every time
            self.study = optuna.create_study(
                storage=self.storage, study_name=self.name, pruner=pruner, direction="maximize"
            )
        self.earlier = len(self.study.get_trials(deepcopy=False))

    @property
    def folder(self) -> Path:
        """Where the runs are."""
        return Path(self.base.runs) / self.base.exp

    def config_of(self, point: Point) -> TrainConfig:
        """The settings of the run of ``point``. Raises Refused for values that do not go together."""
        config = shortened_schedule(change(self.base, point) if point else self.base, self.share)
        validate(config)
        return config

    def labels(self) -> set[str]:
        """The labels of all points that were begun."""
        return {point_label(trial.params) for trial in self.study.get_trials(deepcopy=False)}

    def drawn(self) -> int:
        """How many points were drawn so far, second tries not counted."""
        return sum("is_again" not in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))

    def tasks(self, points: Sequence[Point]) -> Iterator[Task]:
        """The runs that ``points`` lack, those of an interrupted command first; {} is a point that the sampler draws.

        Their trials are marked as running.
        """
        begun = self.late | {trial.number for trial, _, _ in self.at_work.values()}
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.number in begun:
                continue
            yield from self._begin(optuna.Trial(self.study, frozen._trial_id))
        for faulty in self._faulty():  # by our fault, or the machine's: tried again
            trial = self._ask(faulty.params)
            trial.set_user_attr("is_again", True)
            yield from self._begin(trial)
        drawn = self.labels()
        for number, point in enumerate(points):
            if point_label(point) in drawn if point else number < self.drawn():
                continue
            if not point and self._last_are_twins():
                return  # few values are left, if any
            yield from self._begin(self._ask(point))

    def _last_are_twins(self) -> bool:
        """Whether the last ``TWINS`` points that the sampler drew had been drawn before."""
        last = self.study.get_trials(deepcopy=False)[-TWINS:]
        return len(last) == TWINS and all("same_as" in trial.user_attrs for trial in last)

    def _faulty(self) -> list[FrozenTrial]:
        """The trials of earlier commands that a fault of the program or the machine ended, and none replaced."""
        trials = self.study.get_trials(deepcopy=False)
        last = {trial.user_attrs.get("run"): trial for trial in trials if "same_as" not in trial.user_attrs}
        return [trial for trial in last.values() if trial.user_attrs.get("is_fault") and trial.number < self.earlier]

    def _ask(self, point: Point) -> optuna.Trial:
        """A new trial of ``point``, or of what the sampler draws, from a seed of its own: a resumed search agrees."""
        seed = int(np.random.SeedSequence([self.base.system.seed, self.drawn()]).generate_state(1)[0])
        self.study.sampler = make_sampler(self.sampler, seed)
        if point and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.enqueue_trial(point)
        return self.study.ask()

    def _begin(self, trial: optuna.Trial) -> Iterator[Task]:
        """The run of ``trial``; nothing where its settings cannot be, or an earlier trial has the same run."""
        point = suggest(trial, self.space)
        try:
            config = self.config_of(point)
        except Refused as error:  # such as more warm-up than epochs: only the combination is wrong
            self._tell_failed(trial, str(error))
            return
        run = run_of(self.folder, config)
        trial.set_user_attr("run", run.name)
        twins = [
            other for other in self.study.get_trials(deepcopy=False)
            if other.user_attrs.get("run") == run.name and other.number < trial.number
            and not other.user_attrs.get("is_fault")
        ]  # fmt: skip
        if twins:
            trial.set_user_attr("same_as", twins[0].number)
            has_value = twins[0].state == TrialState.COMPLETE
            self.study.tell(trial, twins[0].value if has_value else None, None if has_value else TrialState.FAIL)
            return
        config = replace(config, exp=f"{self.base.exp}/{run.name}")
        self.at_work[config.exp] = trial, point, []
        yield Task(config)

    def is_running(self) -> bool:
        """Whether a run of the stage is not ended."""
        return bool(self.at_work)

    def interrupted(self) -> int:
        """How many trials are begun and not ended."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)))

    def ended(self) -> int:
        """How many points ended, also those that are the run of another one."""
        return self.drawn() - self.interrupted()

    def goes_on(self, epoch: Epoch) -> bool:
        """Takes the record of an epoch; whether the pruner lets the run go on."""
        trial, _, records = self.at_work[epoch.task.config.exp]
        records.append(epoch.record)
        number, epochs = epoch.record["epoch"], epoch.task.config.optim.epochs
        if epoch.record["val_top1"] is None:
            raise Refused("a search needs validation images; use --fit-on train and a --val-size above 0")
        step = round(100 * number / epochs) if self.pruner == "median" and epochs else number
        if step not in self.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(epoch.record["val_top1"], step)
        return not (trial.should_prune() and number < epochs)

    def end(self, event: Ended | Failed, *, may_fail: bool = False) -> None:
        """Tells Optuna how a run ended. Raises Refused for a mistake of every point, where none ``may_fail``."""
        trial, point, records = self.at_work.pop(event.task.config.exp)
        run = event.task.run
        if records:
            best = max(records, key=lambda record: (record["val_top1"] or 0, -(record["val_loss"] or 0)))  # as training
            trial.set_user_attr("best_val_top1", best["val_top1"])
            trial.set_user_attr("best_epoch", best["epoch"])
            trial.set_user_attr("epochs", records[-1]["epoch"])
            trial.set_user_attr("steps", records[-1]["step"])
            trial.set_user_attr("seconds", round(sum(r["seconds"] + r["val_seconds"] for r in records), 3))
        if isinstance(event, Failed):
            is_of_all = event.kind == "Refused" and not may_fail and not NETWORK & set(self.space)
            if is_of_all:  # such as weights that are not there
                raise Refused(event.message)
            trial.set_user_attr("trace", event.trace)
            trial.set_user_attr("is_fault", event.kind not in ("Refused", "Diverged"))  # of the program, or the machine
            self._tell_failed(trial, event.message)
            return
        if event.is_stopped:
            run.best.unlink(missing_ok=True)
            run.last.unlink(missing_ok=True)
            self.study.tell(trial, state=TrialState.PRUNED)
            return
        if not any(run.path.glob("*.hparams")):
            write_hparams(run, point, best["val_top1"])
        self.study.tell(trial, best["val_top1"])

    def leave(self, exp: str) -> None:
        """Lets go of a run that is out of time: its trial stays open, and the same command goes on with it."""
        trial, _, _ = self.at_work.pop(exp)
        self.late.add(trial.number)

    def _tell_failed(self, trial: optuna.Trial, reason: str) -> None:
        """Ends a trial that cannot be trained as a pruned one, so that the sampler learns to avoid its point."""
        trial.set_user_attr("error", reason.splitlines()[0])
        self.study.tell(trial, state=TrialState.PRUNED)

    def entries(self, order: Sequence[Point] = ()) -> list[dict[str, Any]]:
        """One entry for each ended point, best first, equal ones in ``order``; failed ones last, with the reason."""
        first = {point_label(point): i for i, point in enumerate(order)}
        trials = self.study.get_trials(deepcopy=False, states=ENDED)
        last = {t.user_attrs.get("run", t.number): t for t in trials if "same_as" not in t.user_attrs}
        entries = [self._entry(trial) for trial in last.values()]
        return sorted(
            entries,
            key=lambda e: (
                e["error"] is not None, -(e["best_val_top1"] or 0), first.get(point_label(e["point"]), e["trial"]),
            ),
        )  # fmt: skip

    def _entry(self, trial: FrozenTrial) -> dict[str, Any]:
        attrs, error = trial.user_attrs, trial.user_attrs.get("error")
        return {
            "point": {name: trial.params[name] for name in self.space},
            "state": "failed" if error else "complete" if trial.state == TrialState.COMPLETE else "pruned",
            **{key: attrs.get(key) for key in ("best_val_top1", "best_epoch", "epochs", "steps", "seconds")},
            "error": error,
            "trace": attrs.get("trace"),
            "trial": trial.number,
            "run": str(self.folder / attrs["run"]) if "run" in attrs else None,
        }

    def keep_best(self) -> None:
        """Of the ended runs only the best keeps its weights: many would fill the disk."""
        for entry in self.entries()[1:]:
            if entry["run"]:
                Run(Path(entry["run"])).best.unlink(missing_ok=True)
