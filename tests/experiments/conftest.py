"""A small search that every test of searching may start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from finetune101.config import TrainConfig
from finetune101.experiments import space
from finetune101.experiments.search_plan import Plan

GRID: dict[str, Any] = {"lr": [0.01, 0.05], "gamma": [0.1]}


@pytest.fixture
def base(small: TrainConfig) -> TrainConfig:
    return dataclasses.replace(small, exp="s")


@pytest.fixture
def plan(base: TrainConfig) -> Callable[..., Plan]:
    """Makes a plan over ``base``: plan(grid, jobs=2)."""

    def make(grid: dict[str, Any] = GRID, epochs: int | None = None, **options: Any) -> Plan:
        made = Plan(**{"base": base, "space": space.make_space(grid), **options})
        if epochs is None:
            return made
        optim = dataclasses.replace(made.base.optim, epochs=epochs)
        return dataclasses.replace(made, base=dataclasses.replace(made.base, optim=optim))

    return make
