"""What makes two runs the same one: their settings and the images of their split, not their names and folders."""

from __future__ import annotations

import dataclasses
from typing import Any

from finetune101.config import TrainConfig, to_dict
from finetune101.data import splits
from finetune101.run import Run

ELSEWHERE = {"data": ("root", "cache", "download", "split"), "system": ("threads",)}
"""Settings that say where and how fast; ``split`` is a file, the hash of whose split counts."""


def essence(config: TrainConfig) -> dict[str, Any]:
    """Every setting of ``config`` that decides a run's numbers beside the split: part -> name -> JSON value."""
    parts = {part: own for part, own in to_dict(config).items() if isinstance(own, dict)}
    if parts["data"]["protocol"] == "folders":  # what the default becomes in train/, val/ and test/; the split tells
        parts["data"] = {**parts["data"], "protocol": "reference"}
    return {part: {k: v for k, v in own.items() if k not in ELSEWHERE.get(part, ())} for part, own in parts.items()}


def differences(recorded: TrainConfig, config: TrainConfig) -> list[str]:
    """The settings, as ``part.name``, by which ``config`` would give other numbers than ``recorded``."""
    old, new = essence(recorded), essence(config)
    return [f"{part}.{name}" for part in new for name in new[part] if old[part][name] != new[part][name]]


def split_of(run: Run) -> str:
    """The hash of the split of ``run``. Raises Refused when it has none or a damaged one."""
    values = run.read_json("split.json")
    return str(values["hash"]) if "hash" in values else splits.from_json(values).hash()


def is_same(run: Run, config: TrainConfig, split: str) -> bool:
    """Whether ``run``, which has begun, has the settings of ``config`` and the split with the hash ``split``."""
    return not differences(run.config(), config) and split_of(run) == split


def as_started(config: TrainConfig, run: Run) -> TrainConfig:
    """``config`` with the threads and the recipe's name of ``run``: how many runs share the cores may differ now."""
    started = run.config()
    system = dataclasses.replace(config.system, threads=started.system.threads)
    return dataclasses.replace(config, system=system, recipe=started.recipe)
