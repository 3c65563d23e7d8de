"""The optimizer and its schedule; rates are a pure function of the step."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from finetune101.config import OptimConfig, TrainConfig
from finetune101.models.build import parameter_groups


class Uncompiled(Optimizer):
    """The methods of a torch optimizer that mark themselves for torch.compile, without the mark.

    Setting the mark loads the compiler, which takes two seconds, and no training here is compiled.
    """

    add_param_group: Any = inspect.unwrap(Optimizer.add_param_group)
    zero_grad: Any = inspect.unwrap(Optimizer.zero_grad)
    state_dict: Any = inspect.unwrap(Optimizer.state_dict)
    load_state_dict: Any = inspect.unwrap(Optimizer.load_state_dict)


class Lbfgs(Uncompiled, LBFGS):
    """torch's L-BFGS without the compiler."""


class Sgd(Uncompiled, SGD):
    """torch's SGD without the compiler."""

    _step: Any = inspect.unwrap(SGD.step)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step by the gradients of all parameters; no gradient is computed through it."""
        with torch.no_grad():
            return self._step(closure)


class Average:
    """A moving average of the weights and batch-norm statistics of ``model``, which begins with a copy of them.

    Source: B. Polyak, A. Juditsky, SIAM J. Control and Optimization 30 (1992).
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    def set(self, model: nn.Module) -> None:
        """Begins again with the weights of ``model``."""
        self.module.load_state_dict(model.state_dict())

    def update(self, model: nn.Module, decay: float) -> None:
        """The average = decay x average + (1 - decay) x ``model``; counters are copied."""
        own, new = self.module.state_dict(), model.state_dict()
        floats = [name for name, tensor in own.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floats], [new[name] for name in floats], weight=1.0 - decay)
        for name in own.keys() - floats:
            own[name].copy_(new[name])


def optimizer(model: nn.Module, head: str | tuple[str, ...], config: TrainConfig) -> SGD:
    """SGD: the head (prefixes of names) at ``lr``, the backbone at ``lr * backbone_lr_ratio``, none that is frozen."""
    o = config.optim
    groups = parameter_groups(model, head, o.lr, config.backbone_lr_ratio(), o.norm_weight_decay)
    for group in groups:
        group["initial_lr"] = group["lr"]
    return Sgd(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov)


def factor(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The factor on both learning rates at ``step`` (0-based).

    "step" is torch's StepLR: ``gamma ** (epoch // step_size)``. "cosine" (Loshchilov & Hutter, 2017) falls to
    0 over the run after a linear warm-up (Goyal et al., 2017).
    """
    if config.schedule == "step":
        return float(config.gamma ** ((step // steps_per_epoch) // config.step_size))
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_rates(optimizer: SGD, value: float) -> None:
    """Sets every group's learning rate to its initial one times ``value``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * value
