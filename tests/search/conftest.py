"""A small search that every test of searching may start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune101.config import DataConfig, ModelConfig, OptimConfig, SystemConfig, TrainConfig
from finetune101.search import space
from finetune101.search.study import Plan

GRID: dict[str, Any] = {"lr": [0.01, 0.05], "gamma": [0.1]}


@pytest.fixture
def base(tiny_data: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        exp="s",
        runs=str(tmp_path / "runs"),
        data=DataConfig(root=str(tiny_data)),
        model=ModelConfig(name="squeezenet1_1", pretrain=False, size=32),
        optim=OptimConfig(epochs=2, batch_size=8),
        system=SystemConfig(threads=1),
    )


@pytest.fixture
def plan(base: TrainConfig) -> Callable[..., Plan]:
    """Makes a plan over ``base``: plan(grid, jobs=2)."""

    def make(grid: dict[str, Any] = GRID, **options: Any) -> Plan:
        return Plan(**{"base": base, "space": space.make(grid), **options})

    return make
