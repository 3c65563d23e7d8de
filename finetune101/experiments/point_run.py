"""The run of a point of a search: named by what it is, so that every search in the folder finds it again."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune101.config import DataConfig, TrainConfig, change
from finetune101.data.images import find_data, index_images
from finetune101.data.layouts import layout_for
from finetune101.errors import Refused
from finetune101.experiments.space import Point
from finetune101.run import Run
from finetune101.training.job import make_manifest
from finetune101.training.resume import essence, is_same


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


def recipe_of(base: TrainConfig, point: Point) -> dict[str, Any]:
    """The settings of ``point`` as ``train --config`` reads them: all that decides the numbers, but not the seed."""
    parts = essence(change(base, point))
    parts["data"]["split"] = base.data.split  # whoever trains the winner trains it on these images
    return {
        part: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k != "seed"}
        for part, values in parts.items()
    }


def write_hparams(run: Run, point: Point, best: float) -> None:
    """The point and its score for TensorBoard's HParams page, in the run's own folder: no second run appears there."""
    from torch.utils.tensorboard import SummaryWriter  # here: loading it takes half a second before the first step
    from torch.utils.tensorboard.summary import hparams

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
