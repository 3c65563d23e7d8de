"""A plain, resumable grid: every combination is a run below RUNS/EXP, ranked by its best validation accuracy."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune101.config import OptimConfig, TrainConfig, to_dict
from finetune101.runs import Run, write_json
from finetune101.training.loop import fit
from finetune101.training.prepare import check_same, prepare
from finetune101.training.tensorboard import log

Point = dict[str, Any]


def points(space: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of ``space`` (name of an optimizer setting -> values). Raises ValueError for unknown names."""
    known = {field.name for field in dataclasses.fields(OptimConfig)}
    for name, values in space.items():
        if name not in known:
            raise ValueError(f"{name} is not a setting to search; choose from {', '.join(sorted(known))}")
        if not values:
            raise ValueError(f"{name} has no values to search; give at least one")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def configure(base: TrainConfig, point: Point) -> TrainConfig:
    """``base`` with the settings of ``point``, as the run EXP/<name=value,...>."""
    name = ",".join(f"{key}={value}" for key, value in point.items())
    return dataclasses.replace(base, exp=f"{base.exp}/{name}", optim=dataclasses.replace(base.optim, **point))


def grid(base: TrainConfig, space: Mapping[str, Sequence[Any]], results: Path) -> Iterator[list[dict[str, Any]]]:
    """Trains every point of ``space`` that is not finished yet; after each, writes and yields the results so far.

    ``results`` (JSON) holds the base configuration, the space and one entry per point, best first. A point that was
    interrupted goes on where it stopped; a point whose training failed stands there with the reason.
    """
    todo = points(space)
    entries: list[dict[str, Any]] = []
    for number, point in enumerate(todo, 1):
        config = configure(base, point)
        print(f"[{number}/{len(todo)}] {config.exp}")
        entries.append({**point, **_train(config)})
        entries.sort(key=lambda entry: -(entry["best_val_top1"] or 0))
        _keep_only_the_best(base, space, entries)
        write_json(results, {"base": to_dict(base), "space": dict(space), "points": len(todo), "results": entries})
        yield entries


def _train(config: TrainConfig) -> dict[str, Any]:
    run = Run(Path(config.runs) / config.exp)
    entry: dict[str, Any] = {"run": str(run.path), "best_val_top1": None, "best_epoch": None, "error": None}
    records, resume = run.metrics(), run.has("config.json")
    if resume:
        try:
            check_same(run.config(), config)  # also when it is finished: its score would be another search's
        except ValueError as error:
            raise ValueError(f"{error}; or give the search another --exp") from error
    if len(records) < config.optim.epochs:
        job = prepare(config, resume=resume)
        try:
            for _ in log(job.run, fit(job)):
                pass
        except ValueError as error:  # such as a loss that is not finite: the other points go on
            entry["error"] = str(error)
        records = run.metrics()
    if records:
        best = max(records, key=lambda record: record["val_top1"] or 0)
        entry |= {"best_val_top1": best["val_top1"], "best_epoch": best["epoch"], "epochs": len(records)}
    return entry


def _keep_only_the_best(base: TrainConfig, space: Mapping[str, Sequence[Any]], entries: list[dict[str, Any]]) -> None:
    """Finished points keep their metrics; only the best keeps its weights, or 72 points would fill the disk."""
    for rank, entry in enumerate(entries):
        run = Run(Path(entry["run"]))
        if entry["error"] is None:
            run.last.unlink(missing_ok=True)
        if rank > 0:
            run.best.unlink(missing_ok=True)
