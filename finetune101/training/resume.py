"""What makes two runs the same one, and so what a resumed run may change: names, folders and threads, but no number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune101.config import TrainConfig, to_dict
from finetune101.data import splits
from finetune101.errors import Refused
from finetune101.models.build import build_network
from finetune101.run import Run
from finetune101.training.distill import teacher_hashes

ELSEWHERE = {"data": ("root", "cache", "download", "split"), "system": ("threads",)}
"""Settings that say where and how fast; ``split`` is a file, the hash of whose split counts."""


def essence(config: TrainConfig) -> dict[str, Any]:
    """Every setting of ``config`` that decides a run's numbers beside the split: part -> name -> JSON value."""
    parts = {part: values for part, values in to_dict(config).items() if isinstance(values, dict)}
    if parts["data"]["protocol"] == "folders":  # what the default becomes in train/, val/ and test/; the split tells
        parts["data"] = {**parts["data"], "protocol": "reference"}
    return {
        part: {name: value for name, value in values.items() if name not in ELSEWHERE.get(part, ())}
        for part, values in parts.items()
    }


def differences(recorded: TrainConfig, config: TrainConfig) -> list[str]:
    """The settings, as ``part.name``, in which the two differ; settings that change no number are left out."""
    old, new = essence(recorded), essence(config)
    return [f"{part}.{name}" for part in new for name in new[part] if old[part][name] != new[part][name]]


def changed_settings(run: Run, config: TrainConfig) -> list[str]:
    """The settings, as ``part.name``, by which ``config`` would give other numbers than ``run``, which has begun.

    Files count by their content and not by their path: the ImageNet weights, the teachers, the file of a split. Raises
    Refused where one of them cannot be read.
    """
    recorded = run.config()
    changed = differences(recorded, config)
    for name, is_unchanged in (("model.weights", _starts_alike), ("optim.teacher", _has_same_teachers)):
        if name in changed and is_unchanged(run, config):
            changed.remove(name)
    if config.data.split and config.data.split != recorded.data.split:  # another file may hold the same split
        changed += ["data.split"] if splits.read_split(Path(config.data.split)).hash() != split_of(run) else []
    return changed


def _starts_alike(run: Run, config: TrainConfig) -> bool:
    """Whether the network of ``config`` has, before its first step, the parameters that ``run`` began with."""
    classes = len(run.read_json("split.json")["classes"])
    start = build_network(config.model, classes, config.system.seed)
    return bool(start.init_hash == run.read_json("env.json")["model"]["init_hash"])


def _has_same_teachers(run: Run, config: TrainConfig) -> bool:
    """Whether the teachers of ``config`` have the weights that ``run`` began with; no for runs that recorded none."""
    recorded = run.read_json("env.json").get("teachers")
    return recorded is not None and recorded == list(teacher_hashes(config))


def check_teachers_unchanged(run: Run, hashes: Sequence[str]) -> None:
    """Raises Refused where the opened teachers, of these ``hashes``, are not those that ``run`` began with."""
    if run.read_json("env.json").get("teachers", list(hashes)) != list(hashes):
        raise Refused(
            f"the weights of a teacher of {run.path} have changed since the run began; put the earlier ones back,"
            " or start the run anew with --overwrite"
        )


def check_same(run: Run, config: TrainConfig) -> None:
    """Raises Refused naming the settings of ``config`` that would change the numbers of ``run``; names are none."""
    if changed := changed_settings(run, config):
        raise Refused(
            f"--resume cannot change {', '.join(changed)} of {config.exp}; "
            "leave these flags out, or train under another --exp"
        )


def split_of(run: Run) -> str:
    """The hash of the split of ``run``. Raises Refused when it has none or a damaged one."""
    values = run.read_json("split.json")
    return str(values["hash"]) if "hash" in values else splits.from_json(values).hash()


def is_same(run: Run, config: TrainConfig, split: str) -> bool:
    """Whether ``run``, which has begun, has the settings of ``config`` and the split with the hash ``split``."""
    return split_of(run) == split and not changed_settings(run, config)


def as_started(config: TrainConfig, run: Run) -> TrainConfig:
    """``config`` with the threads and the recipe's name of ``run``: how many runs share the cores may differ now."""
    started = run.config()
    system = dataclasses.replace(config.system, threads=started.system.threads)
    return dataclasses.replace(config, system=system, recipe=started.recipe)
