"""Which runs a study has: seeds x splits x arms x networks x training sizes, each checked before any is trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune101.config import DataConfig, OptimConfig, TrainConfig, change, check_bounds, check_name, validate
from finetune101.data import splits
from finetune101.data.images import Index, class_of, content_hash
from finetune101.errors import Refused
from finetune101.experiments.folders import check_kind
from finetune101.experiments.settings import StudyConfig
from finetune101.files import write_json
from finetune101.recipes import fitted, from_recipe, rescheduled, usual_finetune, usual_scratch
from finetune101.run import Run
from finetune101.training.job import make_manifest


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network, arm and number of training images per class (None: all), and the runs of it, by seed and split."""

    model: str
    arm: str
    size: int | None
    folder: str
    runs: tuple[TrainConfig, ...]


def plan_study(study: StudyConfig, index: Index) -> list[Cell]:
    """Every run of ``study``, checked. Raises Refused for settings that cannot work."""
    check_bounds(study)
    check_name(study.exp)
    check_kind(Path(study.runs) / study.exp, "study")
    once = {name: tuple(dict.fromkeys(getattr(study, name))) for name in ("arms", "models", "train_per_class")}
    study = dataclasses.replace(study, **once)  # type: ignore[arg-type]
    for name, values in (("--arms", study.arms), ("--models", study.models)):
        if not values:
            raise Refused(f"{name} names nothing; give at least one, or leave {name} out")
    _check_sizes(study, index)
    if index.subsets and "test" not in index.subsets:
        raise Refused(f"{index.root} has no test images, by which a study compares; add a folder test/ beside train/")
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
    study: StudyConfig, index: Index, model: str, arm: str, size: int | None, folder: str, split: int, seed: int
) -> TrainConfig:
    recipe = {
        "finetune": study.finetune_recipe or usual_finetune(model),
        "scratch": study.scratch_recipe or usual_scratch(model),
        "probe": study.probe_recipe,
    }[arm]
    split_seed = study.split_seed + split
    config = from_recipe(recipe, f"{study.exp}/{folder}/split{split_seed}_seed{seed}", pretrain=arm != "scratch")
    _check_arm(arm, recipe, config)
    data = DataConfig(
        root=study.data, protocol=study.protocol, split_seed=split_seed, max_test_per_class=study.max_test_per_class
    )
    changes: dict[str, Any] = {"runs": study.runs, "model": model, "seed": seed, "threads": study.threads}
    if study.size is not None:
        changes |= {"size": study.size, "cache_size": None}
    if arm == "probe" and config.model.head == "random":
        changes["freeze"] = True
    if study.batch_size is not None:
        changes["batch_size"] = study.batch_size
    epochs = study.scratch_epochs if arm == "scratch" and study.scratch_epochs is not None else study.epochs
    if epochs is not None and config.optim.epochs > 0:
        changes["epochs"] = epochs
    config = fitted(change(dataclasses.replace(config, data=data), changes), changes)
    if size is None:
        return config
    manifest = split_file(Path(study.runs) / study.exp, split_seed, size)
    config = change(config, {"protocol": "standard", "split": manifest})
    if len(config.model.probe_l2) > 1:  # no validation images choose one
        config = change(config, {"probe_l2": (study.probe_l2,)})
    optim = _as_many_steps(config.optim, len(index.classes), size, max(study.train_per_class))
    return dataclasses.replace(config, optim=optim)


def scratch_recipe(study: StudyConfig, folder: Path) -> str | None:
    """The recipe of the arm scratch: the one given, the one that the study began with, or what suits the machine."""
    if study.scratch_recipe or "scratch" not in study.arms:
        return study.scratch_recipe
    begun = Run(folder).read_json("study.json")["settings"] if (folder / "study.json").is_file() else {}
    names = {usual_scratch(model) for model in study.models}
    return begun.get("scratch_recipe") or (names.pop() if len(names) == 1 else None)


def _check_sizes(study: StudyConfig, index: Index) -> None:
    """Raises Refused for a number of training images per class that cannot be."""
    splits.check_train_per_class(Counter(map(class_of, index.paths)), max(study.train_per_class, default=0))


def _check_arm(arm: str, recipe: str, config: TrainConfig) -> None:
    """Raises Refused for a recipe that makes another arm than the one it is given to."""
    linear = config.model.freeze or config.optim.epochs == 0
    if arm != "probe" and linear:
        raise Refused(f"--{arm}-recipe {recipe} trains the output layer only; give one that trains every layer")
    if arm == "probe" and config.model.head == "probe" and not linear:
        raise Refused(f"--probe-recipe {recipe} trains every layer; give one that trains the output layer only")


def _as_many_steps(optim: OptimConfig, classes: int, size: int, largest: int) -> OptimConfig:
    """``optim`` with the epochs that make, on ``size`` images per class, the steps that it makes on ``largest``."""
    per_epoch, full = (-(-classes * n // optim.batch_size) for n in (size, largest))
    return rescheduled(optim, max(1, round(optim.epochs * full / per_epoch)) if optim.epochs else 0)


def split_file(folder: Path, split_seed: int, size: int) -> Path:
    """Where the study in ``folder`` keeps the split with ``size`` training images per class."""
    return folder / "splits" / f"split{split_seed}_{size}_per_class.json"


def write_splits(study: StudyConfig, index: Index) -> None:
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


def subsample(whole: splits.Manifest, index: Index, size: int) -> splits.Manifest:
    """``whole`` with ``size`` training images per class, drawn from those for training and validation."""
    order = np.random.RandomState(whole.seed)
    train: list[str] = []
    for name in whole.classes:
        pool = sorted(p for part in ("train", "val") for p in whole.subsets[part] if class_of(p) == name)
        train += [pool[i] for i in order.permutation(len(pool))[:size]]
    subsets = {"train": tuple(sorted(train)), "val": (), "test": whole.subsets["test"]}
    used = [path for paths in subsets.values() for path in paths]
    options = {**whole.options, "train_per_class": size, "val_per_class": 0}
    content = content_hash(index.digests, used)
    return dataclasses.replace(whole, options=options, content_hash=content, subsets=subsets)
