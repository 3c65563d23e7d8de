"""Named recipes: functions that return a configuration; the docstring holds the command and the result to expect."""

from __future__ import annotations

from collections.abc import Callable

from finetune101.config import ModelConfig, OptimConfig, TrainConfig


def original(exp: str, *, pretrain: bool = True) -> TrainConfig:
    """What the original project's published weights were trained with.

    ``finetune101 train --exp NAME --recipe original [--no-pretrain]``: whole images at 224 px, flips, SGD with momentum
    .9, the head at .01; fine-tuned 20 epochs with the backbone at .001; from scratch 30 epochs, halved every 10, weight
    decay 1e-5.
    """
    if pretrain:
        optim = OptimConfig(epochs=20, batch_size=64, lr=0.01, step_size=30, gamma=0.1, weight_decay=0.0)
    else:
        optim = OptimConfig(epochs=30, batch_size=64, lr=0.01, step_size=10, gamma=0.5, weight_decay=1e-5)
    return TrainConfig(exp=exp, recipe="original", model=ModelConfig(pretrain=pretrain), optim=optim)


RECIPES: dict[str, Callable[..., TrainConfig]] = {"original": original}


def named(name: str) -> Callable[..., TrainConfig]:
    """The recipe ``name``. Raises ValueError naming those that exist."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name}; choose from {', '.join(RECIPES)}")
    return RECIPES[name]
