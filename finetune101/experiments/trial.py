"""One trial: a training run named by what it is, reported epoch by epoch, and stopped where the pruner says so."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from finetune101.config import DataConfig, TrainConfig, change, validate
from finetune101.data.images import find_data, index_images
from finetune101.data.layouts import layout_for
from finetune101.errors import Refused
from finetune101.experiments.processes import described, keep_trace
from finetune101.experiments.space import Point, Range, Space
from finetune101.files import remove_abandoned
from finetune101.run import Run
from finetune101.training.job import make_manifest, prepare
from finetune101.training.log import log_records
from finetune101.training.loop import Diverged, fit
from finetune101.training.resume import as_started, essence, is_same

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def signature(pid: int) -> str:
    """How the worker with process number ``pid`` on this machine signs the trials that it takes."""
    return f"{socket.gethostname()}:{pid}"


class NotMine(Exception):
    """The trial is another's: its point is being trained elsewhere, or nobody queued it."""


NETWORK = {"model", "size", "weights", "pretrain", "head", "freeze", "cached_features", "batch_size", "freeze_norm"}
"""Settings of which some do not go together."""


class Impossible(Exception):
    """The point's settings do not go together; the images are fine, as their split was made before."""


class OutOfTime(Exception):
    """The search's time is over; the trial goes on when the search does."""


@lru_cache
def split_hash(config: DataConfig) -> str:
    """Identifies the split that ``config`` makes of the images on this machine."""
    return make_manifest(index_images(find_data(config.root), layout_for(config.protocol)), config).hash()


def changed(config: TrainConfig) -> dict[str, Any]:
    """``essence`` without defaults: a new setting must rename no run."""
    values = essence(config)
    usual = essence(TrainConfig(exp=""))
    return {part: {k: v for k, v in own.items() if v != usual[part].get(k)} for part, own in values.items()}


def identity(config: TrainConfig) -> str:
    """The name of the run of ``config``: a hash of the configuration and of the split."""
    text = json.dumps([changed(config), split_hash(config.data)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_of(folder: Path, config: TrainConfig) -> Run:
    """The run of ``config`` in ``folder``, begun or not: named by ``identity``.

    Where a run of that name has other settings, as one of a version with other defaults, all settings make the name.
    Raises Refused where a run is damaged, or both names are taken by other settings.
    """
    split = split_hash(config.data)
    whole = hashlib.sha256(json.dumps([essence(config), split], sort_keys=True).encode()).hexdigest()[:16]
    for name in (identity(config), whole):
        run = Run(folder / name)
        try:
            if not run.has("config.json") or is_same(run, config, split):
                return run
        except Refused as error:
            raise Refused(f"{error}: remove the folder {run.path} and give the search's command again") from error
    raise Refused(f"{folder / whole} holds a run with other settings; give the search another --exp")


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """The trial's point: what was queued for it, else what the sampler draws."""
    point: Point = {}
    for name, values in space.items():
        if not isinstance(values, Range):
            point[name] = trial.suggest_categorical(name, values)
        elif isinstance(values.low, int) and isinstance(values.high, int):
            point[name] = trial.suggest_int(name, values.low, values.high, log=values.log)
        else:
            point[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What ``study.optimize`` calls: trains the trial's point and returns its best validation accuracy in percent."""

    base: TrainConfig
    space: Space
    deadline: float  # of time.monotonic
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None

    def __call__(self, trial: optuna.Trial) -> float:
        trial.set_user_attr("worker", signature(os.getpid()))
        if "queued" not in trial.user_attrs:  # two workers saw one trial waiting, the other one took it
            trial.set_user_attr("same_as", None)
            raise NotMine
        point = suggest(trial, self.space)
        config = change(self.base, point)
        try:
            validate(config)
        except Refused as error:  # such as more warm-up than epochs: only the combination is wrong
            raise _failed(trial, str(error)) from error
        key = run_of(Path(self.base.runs) / self.base.exp, config).name
        trial.set_user_attr("run", key)
        if twin := _twin(trial, key):
            trial.set_user_attr("same_as", twin.number)
            if twin.state == TrialState.COMPLETE and twin.value is not None:
                return twin.value
            raise optuna.TrialPruned if twin.state == TrialState.PRUNED else NotMine
        return self._train(trial, dataclasses.replace(config, exp=f"{self.base.exp}/{key}"), point)

    def _train(self, trial: optuna.Trial, config: TrainConfig, point: Point) -> float:
        run = Run(Path(config.runs) / config.exp)
        remove_abandoned(run.path)  # of a killed worker
        finished = is_finished(run, config)
        records = run.metrics() if finished or run.last.is_file() else []
        before, pruned = len(records), False
        for record in records:
            pruned = _report(trial, record) and not finished  # asked for each, so that the pruner records its rungs
        try:
            if not finished and not pruned:
                for record in self._epochs(run, config):
                    records.append(record)
                    self.on_epoch(record)
                    if pruned := _report(trial, record) and record["epoch"] < config.optim.epochs:
                        break
        except (Diverged, Impossible) as error:  # the point's fault: the others go on
            raise _failed(trial, str(error)) from error
        except (Refused, optuna.TrialPruned, NotMine, OutOfTime):
            raise
        except Exception as error:  # out of memory, or a fault of ours: recorded, and the others go on
            trial.set_user_attr("trace", keep_trace(run.path, error))
            raise _failed(trial, described(error)) from error
        finally:
            _describe(trial, records, before)
        best = max(record["val_top1"] for record in records)
        if len(records) > before or not any(run.path.glob("*.hparams")):
            write_hparams(run, point, best)
        run.last.unlink(missing_ok=True)
        if pruned:
            run.best.unlink(missing_ok=True)
            raise optuna.TrialPruned
        return float(best)

    def _epochs(self, run: Run, config: TrainConfig) -> Any:
        """The epochs that the run still lacks; raises OutOfTime between two of them."""
        resume = run.has("config.json")
        try:
            job = prepare(as_started(config, run) if resume else config, resume=resume)
        except Refused as error:
            if NETWORK & set(self.space):  # such as a network that cannot take this size
                raise Impossible(str(error)) from error
            raise
        with contextlib.ExitStack() as stack:
            epochs: Any = fit(job, quiet=True)
            logged: Any = log_records(job.run, epochs)
            for generator in (epochs, logged):  # a search stops in the middle of them
                stack.callback(generator.close)
            for record in logged:
                if record["val_top1"] is None:
                    raise Refused("a search needs validation images; use --fit-on train and a --val-size above 0")
                yield record
                if time.monotonic() > self.deadline and record["epoch"] < config.optim.epochs:
                    raise OutOfTime


def is_finished(run: Run, config: TrainConfig) -> bool:
    """Whether the run of ``config`` has all its epochs."""
    records = run.metrics()
    return bool(records) and records[-1]["epoch"] >= config.optim.epochs


def _twin(trial: optuna.Trial, key: str) -> FrozenTrial | None:
    """The other trial of the same point that goes first: a finished one, else one queued earlier; lost ones do not."""
    others = [
        other
        for other in trial.study.get_trials(deepcopy=False)
        if other.user_attrs.get("run") == key and "same_as" not in other.user_attrs and other.number != trial.number
    ]
    done = [other for other in others if other.state in FINISHED]
    earlier = [other for other in others if other.state != TrialState.FAIL and other.number < trial.number]
    return next(iter(done + earlier), None)


def _report(trial: optuna.Trial, record: dict[str, Any]) -> bool:
    """Tells the study of an epoch; whether the pruner would stop here."""
    trial.report(record["val_top1"], record["epoch"])
    return trial.should_prune()


def _failed(trial: optuna.Trial, reason: str) -> optuna.TrialPruned:
    """How a point that cannot be trained ends: finished and last, so that the sampler learns to avoid it."""
    trial.set_user_attr("error", reason.splitlines()[0])
    return optuna.TrialPruned()


def _describe(trial: optuna.Trial, records: list[dict[str, Any]], before: int) -> None:
    if records:
        best = max(records, key=lambda record: (record["val_top1"] or 0, -(record["val_loss"] or 0)))  # as training
        trial.set_user_attr("best_val_top1", best["val_top1"])
        trial.set_user_attr("best_epoch", best["epoch"])
        trial.set_user_attr("epochs", records[-1]["epoch"])
        trial.set_user_attr("steps", records[-1]["step"])
    trial.set_user_attr("trained", len(records) - before)
    trial.set_user_attr("seconds", round(sum(r["seconds"] + r["val_seconds"] for r in records[before:]), 3))


def write_hparams(run: Run, point: Point, best: float) -> None:
    """The point and its score for TensorBoard's HParams page, in the run's own folder: no second run appears there."""
    values = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in point.items()
    }
    writer = SummaryWriter(str(run.path), filename_suffix=".hparams")
    try:
        file: Any = writer.file_writer
        for summary in hparams(values, {"accuracy/best_val": best}):
            file.add_summary(summary)
        writer.add_scalar("accuracy/best_val", best)
    finally:
        writer.close()
