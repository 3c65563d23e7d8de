"""The runs of ``auto``: their settings, and the copy of the best one that is ready to use."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from finetune101.config import TrainConfig, to_dict
from finetune101.experiments.outcome import Draw
from finetune101.files import write_json
from finetune101.recipes import from_recipe
from finetune101.run import WRITTEN, Run


def drawing_seconds(run: Run, draw: Draw) -> float:
    """Seconds of drawing the curves of ``run``, the second time."""
    with tempfile.TemporaryDirectory() as folder:
        draw(run.metrics(), Path(folder) / "curves.png", run.name)
        began = time.monotonic()
        draw(run.metrics(), Path(folder) / "curves.png", run.name)
        return time.monotonic() - began


def short_time(seconds: float) -> str:
    """``seconds`` in signs that every language has: "40 s", "12 min"."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def of_recipe(recipe: str, model: str, config: TrainConfig) -> TrainConfig:
    """The settings of ``recipe`` on the network ``model``, with the images and the machine of ``config``."""
    made = from_recipe(recipe, config.exp)
    name = replace(made.model, name=model)
    return replace(made, runs=config.runs, data=config.data, system=config.system, model=name)


def adopt(source: Run, target: Run, exp: str, runs: str, record: Path) -> None:
    """Puts a copy of the finished run ``source`` and the file ``record`` in the place of ``target``, as the run EXP."""
    fresh, old = (target.path.with_name(f".{target.path.name}.{end}") for end in ("new", "old"))
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file in [*{path for name in WRITTEN for path in source.path.glob(name)}, record]:
        if file.name not in ("last.pt", "error.log", "config.json"):
            shutil.copy2(file, fresh / file.name)
    write_json(fresh / "config.json", to_dict(replace(source.config(), exp=exp, runs=runs)))
    if target.path.exists():
        target.path.rename(old)
    fresh.rename(target.path)
    shutil.rmtree(old, ignore_errors=True)
