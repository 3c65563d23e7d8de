"""The optimizer and its schedule; rates are a pure function of the step."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD

from finetune101.config import OptimConfig, TrainConfig
from finetune101.models.build import parameter_groups


def optimizer(model: nn.Module, head: str, config: TrainConfig) -> SGD:
    """SGD with the head at ``lr`` and the backbone at ``lr * backbone_lr_ratio``; frozen parameters are left out."""
    o = config.optim
    groups = parameter_groups(model, head, o.lr, config.backbone_lr_ratio(), o.norm_weight_decay)
    for group in groups:
        group["initial_lr"] = group["lr"]
    return SGD(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov)


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
