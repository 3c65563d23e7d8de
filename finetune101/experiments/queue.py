"""A search is an Optuna study: a queue of trials in a storage, and workers that call ``study.optimize`` on it.

A trial in state FAIL was interrupted, by Ctrl-C, kill or the end of its time: it is queued again, and its run goes on
from the last epoch. Points that cannot be trained are PRUNED with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from finetune101.config import TrainConfig, change
from finetune101.errors import Refused
from finetune101.experiments.space import Point, Range, Space, point_label, points
from finetune101.experiments.trial import FINISHED, NotMine, Objective, OutOfTime, split_hash
from finetune101.models.table import lookup
from finetune101.redaction import storage_shown
from finetune101.run import Run
from finetune101.training.resume import essence

Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "asha"]
MAX_RETRIES = 20  # a trial that kills its worker each time must end


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to search, and how."""

    base: TrainConfig
    space: Space
    sampler: Sampler = "grid"
    pruner: Pruner = "none"
    trials: int | None = None
    """How many. Default: the whole grid."""
    timeout: float | None = None
    """Seconds."""
    jobs: int = 1
    """Worker processes."""
    storage: str | None = None
    """Database for several machines. Default: a journal file in the folder of the search."""
    only: tuple[Point, ...] = ()
    """Train these points rather than the space's (finalists)."""
    heartbeat: int = 15
    """Seconds between two signs of life in a database; a worker silent for four times as long is dead."""

    @property
    def folder(self) -> Path:
        """Where everything about the search is."""
        return Path(self.base.runs) / self.base.exp

    def queue(self) -> list[Point]:
        """The points to train; {} where the sampler draws one. Raises Refused for a grid of ranges."""
        if self.only:
            return list(self.only)
        if self.sampler != "grid":
            return [{}] * (self.trials or 0)
        grid = points(self.space)
        if self.trials or self.pruner != "none":  # a part of a grid in order would be a corner of it
            order = np.random.default_rng(self.base.system.seed).permutation(len(grid))
            grid = [grid[i] for i in order]
        return grid[: self.trials]


def check_plan(plan: Plan) -> None:
    """Raises Refused, in one sentence that says what to do, for a plan that cannot work."""
    rules = [
        (plan.trials is None or plan.trials >= 1, f"--trials is {plan.trials}; give at least 1"),
        (plan.sampler == "grid" or plan.trials, f"--sampler {plan.sampler} goes on for ever; add --trials such as 20"),
        (plan.jobs >= 1, f"--jobs is {plan.jobs}; give at least 1"),
        (plan.timeout is None or plan.timeout > 0, "--timeout must be above 0; write it like 30m or 2h"),
        (plan.base.data.fit_on == "train", "a search chooses by validation images; leave --fit-on train+val out"),
        (plan.base.optim.val_every == 1, "a search compares trials at every epoch; leave --val-every out"),
    ]
    for fine, message in rules:
        if not fine:
            raise Refused(message)
    models = plan.space.get("model", [])
    for name in models if isinstance(models, list) else []:
        lookup(name)
    plan.queue()


def study_name(plan: Plan) -> str:
    """Names the study: another base, split, space, sampler or pruner is another one (the runs are shared by all)."""
    text = json.dumps(
        [essence(plan.base), split_hash(plan.base.data), described(plan.space), plan.sampler, plan.pruner, plan.only]
    )
    return f"{plan.base.exp}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def described(space: Space) -> dict[str, Any]:
    """The space as JSON types, as ``space.make`` reads it."""
    return {name: str(values) if isinstance(values, Range) else values for name, values in space.items()}


class KernelLock(JournalFileOpenLock):
    """The journal's lock, held by the kernel: a killed worker lets go of it at once, not after a grace period.

    On file systems without such locks it is Optuna's, a file that is there or not.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path + ".open")
        self._path, self._descriptor = path + ".lock", -1

    def acquire(self, blocking: bool = True) -> bool:
        """Waits for the lock; without ``blocking`` False when another process has it."""
        import fcntl

        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:  # Lustre and some NFS have none
            os.close(descriptor)
            return super().acquire()
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Lets go of the lock."""
        if self._descriptor < 0:
            super().release()
            return
        os.close(self._descriptor)
        self._descriptor = -1


def open_storage(plan: Plan) -> BaseStorage:
    """The database of --storage, else the journal. Raises Refused for a database that cannot be reached."""
    if plan.storage is None:
        path = str(plan.folder / "optuna.journal")
        backend = JournalFileBackend(path, KernelLock(path) if os.name == "posix" else None)
        try:
            return JournalStorage(backend)
        except Exception as error:  # Optuna's reader: a damaged file raises nearly anything
            raise Refused(
                f"{path} is damaged ({type(error).__name__}); remove it and give the command again, it finds the runs"
            ) from error
    from sqlalchemy import NullPool
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

    url, address = plan.storage, storage_shown(plan.storage)
    if url.startswith(("postgresql://", "postgres://")):
        url = "postgresql+psycopg://" + url.partition("://")[2]  # psycopg 3, which this project locks
    for attempt in range(5):
        try:
            with _experimental():
                return RDBStorage(
                    url,
                    engine_kwargs={"poolclass": NullPool},  # epochs are long: servers close connections that idle
                    heartbeat_interval=plan.heartbeat,
                    grace_period=4 * plan.heartbeat,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
                )
        except (ArgumentError, NoSuchModuleError, OperationalError, ImportError) as error:
            reason = str(error).splitlines()[0].replace(plan.storage, address).replace(url, address)
            raise Refused(f"--storage {address} cannot be used: {reason}") from None  # its notes hold the password
        except SQLAlchemyError:  # another machine makes the same tables at this moment
            if attempt == 4:
                raise
            time.sleep(1)
    raise AssertionError


@contextlib.contextmanager
def _experimental() -> Iterator[None]:
    """Heartbeats are what Optuna has for dead workers, and it calls them experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_study(plan: Plan) -> optuna.Study:
    """The study of ``plan``, made when it is new."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the progress bar says what there is to say
    storage, name, pruner = open_storage(plan), study_name(plan), make_pruner(plan.pruner)
    with contextlib.suppress(KeyError):  # create_study would write to the journal even where there is nothing to make
        return optuna.load_study(storage=storage, study_name=name, pruner=pruner)
    return optuna.create_study(
        storage=storage, study_name=name, pruner=pruner, direction="maximize", load_if_exists=True
    )


def make_pruner(name: Pruner) -> optuna.pruners.BasePruner:
    """The pruner of that name: asha keeps the best third at epochs 1, 3, 9, ..., median all above the median."""
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return optuna.pruners.MedianPruner() if name == "median" else optuna.pruners.NopPruner()


def make_sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of that name; a grid's points are queued, so that nothing is left to draw."""
    return optuna.samplers.TPESampler(seed=seed) if name == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def fill(plan: Plan, study: optuna.Study) -> None:
    """Queues what is not there yet; the same plan twice adds nothing the second time."""
    if plan.storage is None:
        retry(study, lambda trial: trial.state == TrialState.RUNNING)  # the folder is ours: their workers are dead
    retry(study)
    wanted = plan.queue()
    drawn = bool(wanted) and not wanted[0]
    for point in wanted[len(_drawn(study)) :] if drawn else wanted:
        study.enqueue_trial(point, user_attrs={"queued": True}, skip_if_exists=bool(point))
    if drawn:
        _take_back(study, len(wanted))


def _drawn(study: optuna.Study) -> list[FrozenTrial]:
    """The trials whose points a sampler draws, in order: no second tries, none that was taken back."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if "queued" in trial.user_attrs
        and "failed_trial" not in trial.system_attrs
        and not (trial.state == TrialState.FAIL and "same_as" in trial.user_attrs)
    ]


def _take_back(study: optuna.Study, wanted: int) -> None:
    """Ends the waiting trials beyond ``wanted``: two machines that start in one moment both queue all of them."""
    for trial in _drawn(study)[wanted:]:
        if trial.state == TrialState.WAITING:
            with contextlib.suppress(RuntimeError, KeyError):  # taken or ended meanwhile
                study._storage.set_trial_user_attr(trial._trial_id, "same_as", None)
                study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def _retried(trials: Iterable[FrozenTrial]) -> set[int]:
    """The numbers of the trials that were queued again."""
    return {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}


def retry(study: optuna.Study, dead: Callable[[FrozenTrial], bool] = lambda trial: False) -> int:
    """Queues again what was interrupted: ``dead`` trials, which are failed first, and failed ones that nobody retried.

    Returns how many.
    """
    trials = study.get_trials(deepcopy=False)
    retried, count = _retried(trials), 0
    for trial in trials:
        if trial.state == TrialState.RUNNING and dead(trial):
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:  # Optuna's: told by its worker after all
                continue
        elif trial.state != TrialState.FAIL:
            continue
        if trial.number not in retried and "queued" in trial.user_attrs and "same_as" not in trial.user_attrs:
            again = copy.deepcopy(study.trials[trial.number])
            again.user_attrs.pop("worker", None)  # the parent would take the new trial for one of the dead worker's
            before = len(study.get_trials(deepcopy=False))
            if again.user_attrs.get("trained"):  # it came further: not the trial that kills its worker
                again.system_attrs.pop("retry_history", None)
            with _experimental():
                RetryHeartbeatStaleTrialCallback(MAX_RETRIES)(study, again)
            count += len(study.get_trials(deepcopy=False)) > before
    return count


def work(plan: Plan, study: optuna.Study, deadline: float, worker: int = 0, on_epoch: Any = None) -> None:
    """Trains queued trials until none is left or the time is over; in a database, dead workers' trials as well."""
    goal = Objective(base=plan.base, space=plan.space, deadline=deadline, on_epoch=on_epoch or (lambda record: None))
    while time.monotonic() < deadline:
        trials = study.get_trials(deepcopy=False)
        waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
        if waiting:
            seed = int(np.random.SeedSequence([plan.base.system.seed, waiting[0], worker]).generate_state(1)[0])
            study.sampler = make_sampler(plan.sampler, seed)  # a seed per trial: a resumed search draws new points
            study.optimize(goal, n_trials=1, catch=(NotMine, OutOfTime))
            keep_best(plan, study)
        elif plan.storage and any(trial.state == TrialState.RUNNING for trial in trials):
            time.sleep(min(1, plan.heartbeat))  # for the end of the others, or of their heartbeats
            with _experimental():
                optuna.storages.fail_stale_trials(study)
        elif not (plan.storage and retry(study)):
            break


def unfinished(study: optuna.Study) -> int:
    """Trials that wait, run, or were interrupted and not queued again."""
    trials = study.get_trials(deepcopy=False)
    again = _retried(trials)
    return sum(
        trial.state not in FINISHED
        and "queued" in trial.user_attrs
        and "same_as" not in trial.user_attrs
        and trial.number not in again
        for trial in trials
    )


def keep_best(plan: Plan, study: optuna.Study) -> None:
    """Of all finished runs only the best keeps its weights, or 72 would fill the disk; finalists all do."""
    for entry in [] if plan.only else results(plan, study)[1:]:
        if entry["run"]:
            Run(Path(entry["run"])).best.unlink(missing_ok=True)


def results(plan: Plan, study: optuna.Study) -> list[dict[str, Any]]:
    """One entry per finished point, best first; points that could not be trained stand last, with the reason."""
    entries: list[dict[str, Any]] = []
    for trial in study.get_trials(deepcopy=False, states=FINISHED):
        if "same_as" in trial.user_attrs:
            continue
        attrs, error = trial.user_attrs, trial.user_attrs.get("error")
        state = "failed" if error else "complete" if trial.state == TrialState.COMPLETE else "pruned"
        rungs = {k.removeprefix("completed_rung_"): v for k, v in trial.system_attrs.items() if "completed_rung" in k}
        entries.append(
            {
                "point": {name: trial.params[name] for name in plan.space},
                "state": state,
                **{key: attrs.get(key) for key in ("best_val_top1", "best_epoch", "epochs", "steps", "seconds")},
                "error": error,
                "trace": attrs.get("trace"),
                "rungs": rungs,
                "trial": trial.number,
                "run": str(plan.folder / attrs["run"]) if "run" in attrs else None,
            }
        )
    first = {point_label(point): i for i, point in enumerate(plan.queue())}
    entries.sort(
        key=lambda e: (
            e["error"] is not None,
            -(e["best_val_top1"] or 0),
            first.get(point_label(e["point"]), e["trial"]),
        )
    )
    return entries


def finals(plan: Plan, entries: list[dict[str, Any]], count: int, seeds: int) -> Plan:
    """The plan that trains the best ``count`` of ``entries`` with ``seeds`` seeds each, the search's own among them."""
    first = plan.base.system.seed
    best = [entry["point"] for entry in entries if entry["state"] == "complete"][:count]
    only = tuple({**point, "seed": seed} for point in best for seed in range(first, first + seeds))
    space: Space = {name: [] for name in [*plan.space, "seed"]}
    for point in only:
        for name, values in space.items():
            assert isinstance(values, list)
            if point[name] not in values:
                values.append(point[name])
    return dataclasses.replace(plan, space=space, only=only, sampler="grid", pruner="none", trials=None)


def averages(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finalists by their mean over the seeds, best first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(point_label({k: v for k, v in entry["point"].items() if k != "seed"}), []).append(entry)
    finalists = []
    for group in groups.values():
        scores = [entry["best_val_top1"] for entry in group if entry["state"] == "complete"]
        finalists.append(
            {
                "point": {k: v for k, v in group[0]["point"].items() if k != "seed"},
                "mean": float(np.mean(scores)) if scores else None,
                "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                "seeds": {str(entry["point"]["seed"]): entry["best_val_top1"] for entry in group},
                "failed": len(group) - len(scores),
                "run": next(
                    (e["run"] for e in group if e["run"] and Run(Path(e["run"])).best.is_file()), group[0]["run"]
                ),
            }
        )
    return sorted(finalists, key=lambda f: (f["failed"], -(f["mean"] or 0)))


def recipe(base: TrainConfig, point: Point) -> dict[str, Any]:
    """The settings of ``point`` as ``train --config`` reads them: all that decides the numbers, but not the seed."""
    parts = essence(change(base, point))
    parts["data"]["split"] = base.data.split  # whoever trains the winner trains it on these images
    return {
        part: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k != "seed"}
        for part, values in parts.items()
    }
