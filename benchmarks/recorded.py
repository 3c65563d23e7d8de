"""What benchmarks share: how they keep their numbers, and the small runs that they train many of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from finetune101.config import SystemConfig, TrainConfig
from finetune101.experiments.runner import Task
from finetune101.run import Run

COMPARED = ("epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1")


def record(values: dict[str, Any], out: Path | None) -> None:
    """Writes ``values`` as the JSON file ``out``, if one is asked for."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def learned(run: Path) -> list[list[Any]]:
    """What the run in a folder learned, epoch by epoch."""
    return [[record[key] for key in COMPARED] for record in Run(run).metrics()]


def seeds_of(config: TrainConfig, count: int) -> list[Task]:
    """``count`` runs of ``config``, each with a seed of its own and one thread."""
    systems = [SystemConfig(threads=1, seed=seed) for seed in range(count)]
    return [Task(dataclasses.replace(config, exp=f"r{system.seed}", system=system)) for system in systems]
