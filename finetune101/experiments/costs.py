"""What trainings took, without those whose first pass was read from a cache: their seconds are not what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from finetune101.config import TrainConfig
from finetune101.evaluation.tested import read_manifest
from finetune101.files import read_json
from finetune101.run import Run

MUCH_FASTER = 3.0
"""Times faster than the slowest run on as many images, or MUCH_FASTER + 1 times an image of its own validation:
no network computes its features so much faster, so they were read."""


class FirstPass(NamedTuple):
    """The pass over the training and validation images before the first epoch, in which an output layer is solved."""

    path: Path
    kind: tuple[Any, ...]
    seconds: float
    per_image: float
    per_validated: float | None
    """Seconds per image in the validation of the same weights; None where none was timed."""


def first_pass(run: Run, config: TrainConfig, env: Any, images: dict[str, int]) -> FirstPass | None:
    """That of ``run``; ``images`` counts those of its subsets. None for a run whose recorded time is right anyway.

    That is one which began with its first epoch, and one that adds the seconds of cached features to its own: its
    files have a format.
    """
    if "format" in read_json(run.path / "env.json", remedy="train the run again"):
        return None
    records = run.metrics()
    total, validated = images["train"] + images["val"], images["val"]
    if not records or records[0]["epoch"] != 0 or not total:
        return None
    model, world = config.model, env["world"]
    kind = (model.name, model.size, model.cache_size, world["device"], world["precision"], total)
    checked = records[0].get("val_seconds", 0.0)
    return FirstPass(
        run.path.resolve(),
        kind,
        records[0]["seconds"],
        records[0]["seconds"] / total,
        checked / validated if checked and validated else None,
    )


def read_from_cache(passes: Iterable[FirstPass | None]) -> frozenset[Path]:
    """The runs whose features were read from the cache of an earlier run, judged by the seconds that they recorded.

    Only runs of the first version are judged: later ones add the seconds of the cached features to their own.
    """
    timed = [one for one in passes if one]
    slowest: dict[Any, float] = {}
    for one in timed:
        slowest[one.kind] = max(one.seconds, slowest.get(one.kind, 0.0))
    return frozenset(
        one.path
        for one in timed
        if MUCH_FASTER * one.seconds < slowest[one.kind]
        or (one.per_validated is not None and (MUCH_FASTER + 1) * one.per_image < one.per_validated)
    )


def features_cached(runs: Iterable[Run]) -> frozenset[Path]:
    """The folders of ``runs`` whose features were read from the cache of an earlier one."""
    passes = []
    for run in runs:
        if not (records := run.metrics()) or records[0]["epoch"] != 0:
            continue  # it computed no features before its first epoch
        images = {name: len(paths) for name, paths in read_manifest(run).subsets.items()}
        passes.append(first_pass(run, run.config(), run.read_json("env.json"), images))
    return read_from_cache(passes)


def mean_seconds(runs: Iterable[Run], cached: frozenset[Path]) -> float | None:
    """Mean time of a training over ``runs`` without those in ``cached``; None where no other is left."""
    seconds = [run.seconds() for run in runs if run.path.resolve() not in cached]
    return fmean(seconds) if seconds else None
