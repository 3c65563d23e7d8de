"""The whole study: seeds x splits x arms x networks x training sizes, each an ordinary run; resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetune101.config import DataConfig, StudyConfig, TrainConfig, read_recipe, to_dict, validate
from finetune101.data import dataset, splits
from finetune101.errors import Refused
from finetune101.evaluation.evaluate import evaluate
from finetune101.files import claim, write_json
from finetune101.runs import Run
from finetune101.training.benchmark import seconds_per_image
from finetune101.training.loop import fit
from finetune101.training.prepare import as_started, check_same, make_manifest, prepare, sharing
from finetune101.training.recipes import named, usual_scratch
from finetune101.training.tensorboard import log

FIXED = 4.0
"""Seconds in which a run starts, is tested and written."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network, arm and number of training images per class (None: all), and the runs of it, by seed and split."""

    model: str
    arm: str
    size: int | None
    folder: str
    runs: tuple[TrainConfig, ...]


def plan(study: StudyConfig, index: dataset.Index) -> list[Cell]:
    """Every run of ``study``, checked. Raises Refused for settings that cannot work."""
    for name, value in (("--seeds", study.seeds), ("--splits", study.splits)):
        if value < 1:
            raise Refused(f"{name} is {value}; give at least 1")
    for name, values in (("--arms", study.arms), ("--models", study.models)):
        if not values:
            raise Refused(f"{name} names nothing; give at least one, or leave {name} out")
    _check_sizes(study, index)
    validate(TrainConfig(exp=study.exp))
    cells = []
    for model, size, arm in itertools.product(study.models, study.train_per_class or (None,), study.arms):
        folder = f"{model.replace(':', '_')}/{arm}/{'all' if size is None else f'{size}_per_class'}"
        draws = itertools.product(range(study.splits), range(study.seeds))
        runs = [_configure(study, index, model, arm, size, folder, split, seed) for split, seed in draws]
        for config in runs:
            validate(config)
        cells.append(Cell(model=model, arm=arm, size=size, folder=folder, runs=tuple(runs)))
    return cells


def _configure(
    study: StudyConfig, index: dataset.Index, model: str, arm: str, size: int | None, folder: str, split: int, seed: int
) -> TrainConfig:
    scratch = study.scratch_recipe or usual_scratch(model)
    recipe = {"finetune": study.finetune_recipe, "scratch": scratch, "probe": study.probe_recipe}[arm]
    split_seed = study.split_seed + split
    config = _recipe(recipe, f"{study.exp}/{folder}/split{split_seed}_seed{seed}", pretrain=arm != "scratch")
    _check_arm(arm, recipe, config)
    data = DataConfig(
        root=study.data, protocol=study.protocol, split_seed=split_seed, max_test_per_class=study.max_test_per_class
    )
    network, changes = dataclasses.replace(config.model, name=model), config.augment
    if study.size is not None:
        network = dataclasses.replace(network, size=study.size, cache_size=None)
        smaller = tuple(min(size, study.size) for size in changes.train_sizes)
        changes = dataclasses.replace(changes, train_sizes=smaller)
    if arm == "probe" and network.head == "random":
        network = dataclasses.replace(network, freeze=True)
    optim = config.optim
    if study.batch_size is not None:
        optim = dataclasses.replace(optim, batch_size=study.batch_size)
    epochs = study.scratch_epochs if arm == "scratch" and study.scratch_epochs is not None else study.epochs
    if epochs is not None and optim.epochs > 0:
        warmup = optim.warmup_epochs if optim.warmup_epochs < epochs else max(epochs - 1, 0)
        optim = dataclasses.replace(optim, epochs=epochs, warmup_epochs=warmup)
    if size is not None:
        data = dataclasses.replace(
            data, protocol="standard", split=str(split_file(Path(study.runs) / study.exp, split_seed, size))
        )
        optim = _as_many_steps(optim, len(index.classes), size, max(study.train_per_class))
        if len(network.probe_l2) > 1:  # no validation images choose one
            network = dataclasses.replace(network, probe_l2=(study.probe_l2,))
    system = dataclasses.replace(config.system, seed=seed, threads=study.threads)
    parts: dict[str, Any] = {"data": data, "augment": changes, "model": network, "optim": optim, "system": system}
    return dataclasses.replace(config, runs=study.runs, **parts)


def _check_sizes(study: StudyConfig, index: dataset.Index) -> None:
    """Raises Refused for a number of training images per class that cannot be."""
    if any(size < 1 for size in study.train_per_class):
        raise Refused(f"--train-per-class is {min(study.train_per_class)}; give at least 1")
    images = Counter(map(dataset.class_of, index.paths))
    smallest, largest = min(images, key=lambda name: images[name]), max(study.train_per_class, default=0)
    if images[smallest] <= largest:
        raise Refused(
            f"class {smallest} has {images[smallest]} images, --train-per-class {largest} leaves none to test"
        )


def _check_arm(arm: str, recipe: str, config: TrainConfig) -> None:
    """Raises Refused for a recipe that makes another arm than the one it is given to."""
    linear = config.model.freeze or config.optim.epochs == 0
    if arm != "probe" and linear:
        raise Refused(f"--{arm}-recipe {recipe} trains the output layer only; give one that trains every layer")
    if arm == "probe" and config.model.head == "probe" and not linear:
        raise Refused(f"--probe-recipe {recipe} trains every layer; give one that trains the output layer only")


def _recipe(recipe: str, exp: str, pretrain: bool) -> TrainConfig:
    """The configuration of a named recipe, or of a recipe file such as a search's winner.yaml."""
    if not Path(recipe).suffix:
        return named(recipe)(exp, pretrain=pretrain)
    config = read_recipe(recipe, exp)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrain=pretrain))


def _as_many_steps(optim: Any, classes: int, size: int, largest: int) -> Any:
    """``optim`` with the epochs that make, on ``size`` images per class, the steps that it makes on ``largest``."""
    per_epoch, full = (-(-classes * n // optim.batch_size) for n in (size, largest))
    epochs = max(1, round(optim.epochs * full / per_epoch)) if optim.epochs else 0
    longer = epochs / optim.epochs if optim.epochs else 1
    step_size = max(1, round(optim.step_size * longer))
    return dataclasses.replace(
        optim, epochs=epochs, step_size=step_size, warmup_epochs=min(optim.warmup_epochs * longer, max(epochs - 1, 0))
    )


def split_file(folder: Path, split_seed: int, size: int) -> Path:
    """Where the study in ``folder`` keeps the split with ``size`` training images per class."""
    return folder / "splits" / f"split{split_seed}_{size}_per_class.json"


def write_splits(study: StudyConfig, index: dataset.Index) -> None:
    """Writes the splits of every size that are not there yet: small ones are parts of the larger, all test the same.

    All of a size's images train; none validates, so recipe and number of steps have to be fixed beforehand.
    """
    for split_seed in range(study.split_seed, study.split_seed + study.splits):
        files = {size: split_file(Path(study.runs) / study.exp, split_seed, size) for size in study.train_per_class}
        if all(file.is_file() for file in files.values()):
            continue
        data = DataConfig(
            root=study.data, protocol="standard", train_per_class=max(files), split_seed=split_seed,
            max_test_per_class=study.max_test_per_class,
        )  # fmt: skip
        whole = make_manifest(index, data)
        made = {file: subsample(whole, index, size).to_json() for size, file in files.items()}
        for file, split in made.items():
            if file.is_file() and Run(file.parent).read_json(file.name) != split:
                raise Refused(f"{file} is another split than these sizes need; give the study another --exp")
        for file, split in made.items():
            write_json(file, split)


def subsample(whole: splits.Manifest, index: dataset.Index, size: int) -> splits.Manifest:
    """``whole`` with ``size`` training images per class, drawn from those for training and validation."""
    order = np.random.RandomState(whole.seed)
    train: list[str] = []
    for name in whole.classes:
        pool = sorted(p for part in ("train", "val") for p in whole.subsets[part] if dataset.class_of(p) == name)
        train += [pool[i] for i in order.permutation(len(pool))[:size]]
    subsets = {"train": tuple(sorted(train)), "val": (), "test": whole.subsets["test"]}
    used = [path for paths in subsets.values() for path in paths]
    options = {**whole.options, "train_per_class": size, "val_per_class": 0}
    content = dataset.content_hash(index.digests, used)
    return dataclasses.replace(whole, options=options, content_hash=content, subsets=subsets)


def run(study: StudyConfig, index: dataset.Index, cells: Sequence[Cell], jobs: int = 1) -> dict[str, Any]:
    """Trains and tests what is not done yet, seed by seed; writes study.json after every run and returns it.

    ``jobs`` runs at a time; the same command on other machines with the same folder shares the runs. A run whose
    training fails stands in study.json with the reason, and the others go on.
    """
    if study.train_per_class:
        write_splits(study, index)
    folder = Path(study.runs) / study.exp
    errors: dict[str, str] = {}
    order = [config for runs in zip(*(cell.runs for cell in cells), strict=True) for config in runs]
    left = [config for config in order if not is_done(config)]
    done = len(order) - len(left)
    with tqdm(total=len(order), initial=done, desc=study.exp, unit="run", dynamic_ncols=True) as bar:
        for config, result in _train_all(left, jobs, folder / "claims"):
            if "error" in result:
                if not Run(Path(config.runs) / config.exp).has("config.json"):
                    raise Refused(result["error"])  # nothing was trained: settings, images or weights are wrong
                errors[config.exp] = result["error"]
            tqdm.write(f"{config.exp}: {_told(result)}", file=sys.stdout)
            bar.update()
            write_json(folder / "study.json", summarise(study, cells, errors))
    summary = summarise(study, cells, errors)
    write_json(folder / "study.json", summary)
    return summary


def _told(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    return f"{result['top1']:.2f} % of {result['n']} test images" if result else "is being trained elsewhere"


def _train_all(configs: Sequence[TrainConfig], jobs: int, claims: Path) -> Iterator[tuple[TrainConfig, dict[str, Any]]]:
    """Each run with its test.json, {} for those that another process trains, or its error; in the order they end."""
    if jobs == 1:
        for config in configs:
            yield config, _train(config, claims, quiet=not sys.stderr.isatty())  # one bar is enough in a log file
        return
    shared = [sharing(config, jobs) for config in configs]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_train, s, claims, True): c for s, c in zip(shared, configs, strict=True)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise Refused("a worker was killed; the same command goes on from the last epochs") from error
        finally:
            pool.shutdown(cancel_futures=True)


def is_done(config: TrainConfig) -> bool:
    """Whether the run of ``config`` is trained and tested. Raises Refused when it had other settings."""
    run = Run(Path(config.runs) / config.exp)
    if run.has("config.json"):
        try:
            check_same(run.config(), as_started(config, run))
        except Refused as error:
            raise Refused(f"{error}; or give the study another --exp") from error
    return _ended(run)


def _ended(run: Run) -> bool:
    """Whether ``run`` is trained to its last epoch and tested."""
    return run.has("test.json") and run.epochs_left() <= 0


def _train(config: TrainConfig, claims: Path, quiet: bool) -> dict[str, Any]:
    run = Run(Path(config.runs) / config.exp)
    lock = claims / (hashlib.sha256(config.exp.encode()).hexdigest()[:16] + ".lock")
    with claim(lock) as mine:
        if not mine:
            return {}
        if _ended(run):  # meanwhile, elsewhere
            return run.read_json("test.json")
        try:
            resume = run.has("config.json")
            job = prepare(as_started(config, run) if resume else config, resume=resume)
            for _ in log(job.run, fit(job, quiet=quiet)):
                pass
            result = evaluate(job.run)
        except Refused as error:
            return {"error": str(error)}
        job.run.last.unlink(missing_ok=True)  # a tested run is not continued, and a study has many
        return result


def summarise(study: StudyConfig, cells: Sequence[Cell], errors: dict[str, str]) -> dict[str, Any]:
    """What study.json holds: the settings and, for each cell, means and standard deviations over its finished runs."""
    rows = []
    for cell in cells:
        runs = [Run(Path(c.runs) / c.exp) for c in cell.runs]
        done = [run for run in runs if _ended(run)]
        row: dict[str, Any] = {"model": cell.model, "arm": cell.arm, "size": cell.size, "folder": cell.folder}
        row |= {"n": len(done), "planned": len(runs), "seconds": None}
        for key in ("top1", "mean_per_class"):
            values = [run.read_json("test.json")[key] for run in done]
            row[key] = statistics.mean(values) if values else None
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        if done:
            row["seconds"] = statistics.mean(run.seconds() for run in done)
        rows.append(row | {"errors": [errors[c.exp] for c in cell.runs if c.exp in errors]})
    return {"settings": to_dict(study), "cells": rows}


def estimate(study: StudyConfig, index: dataset.Index, cells: Sequence[Cell], measured: bool = False) -> str:
    """How long the runs not done take one by one, from the runs below RUNS with the same network, size and kind.

    Where there is none, it takes a few steps to know, if ``measured``.
    """
    rates: dict[tuple[Any, ...], list[float]] = {}
    for file in Path(study.runs).glob("**/config.json"):
        run = Run(file.parent)
        try:
            records, config = run.metrics(), run.config()
        except Refused:  # another program's, or another version's
            continue
        if records and run.has("split.json"):
            images = len(run.read_json("split.json")["subsets"]["train"]) * len(records)
            rates.setdefault(_kind(config), []).append(run.seconds() / images)
    seconds, unknown = 0.0, set()
    for cell in cells:
        per_class = cell.size or _usual_size(study, index)
        for config in cell.runs:
            if not is_done(config):
                passes = config.optim.epochs + (config.model.head == "probe")  # as many as records
                if measured and _kind(config) not in rates:
                    print(f"measuring the speed of {cell.arm} with {cell.model} ...", file=sys.stderr)
                    part = 1 if config.optim.epochs else 1 / 3  # a linear layer needs the forward pass only
                    rates[_kind(config)] = [part * seconds_per_image(config, len(index.classes))]
                rate = statistics.median(rates.get(_kind(config), [math.nan]))
                unknown |= {f"{cell.arm} with {cell.model}"} if math.isnan(rate) else set()
                seconds += 0 if math.isnan(rate) else FIXED + rate * passes * per_class * len(index.classes)
    if not seconds and unknown:
        return "how long they take is not known before one of each arm is done (--dry-run measures it)"
    minutes = f"about {seconds / 60:.0f} minutes" if seconds >= 60 else "less than a minute"
    hours = f"about {seconds / 3600:.1f} hours" if seconds >= 5400 else minutes
    without = f", without {', '.join(sorted(unknown))}, of which no run is recorded" if unknown else ""
    return f"{hours}, one run at a time{without}"


def _kind(config: TrainConfig) -> tuple[Any, ...]:
    """What decides the time that an image takes."""
    sizes = config.model.size, config.augment.train_sizes
    return config.model.name, sizes, config.model.freeze, config.optim.epochs == 0


def _usual_size(study: StudyConfig, index: dataset.Index) -> float:
    """Training images per class of a protocol that says no number."""
    return 25 if study.protocol == "standard" else 0.7 * len(index.paths) / len(index.classes)


def text(summary: dict[str, Any]) -> str:
    """The cells as lines for a terminal."""
    lines = [f"{'network':22}{'arm':10}{'per class':>10}  {'top-1':17}{'mean per class':17}runs"]
    for c in summary["cells"]:
        shown = [
            "–"
            if c[key] is None
            else f"{c[key]:.2f}" + (f" ± {c[f'{key}_sd']:.2f}" if c[f"{key}_sd"] is not None else "")
            for key in ("top1", "mean_per_class")
        ]
        size = "all" if c["size"] is None else str(c["size"])
        lines.append(f"{c['model']:22}{c['arm']:10}{size:>10}  {shown[0]:17}{shown[1]:17}{c['n']} of {c['planned']}")
    return "\n".join(lines + [f"failed: {error}" for c in summary["cells"] for error in c["errors"]])
