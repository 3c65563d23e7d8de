"""The learning-rate range test (Smith, 2017, https://arxiv.org/abs/1506.01186)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from finetune101.errors import Refused
from finetune101.training.job import Job
from finetune101.training.loop import Trainer
from finetune101.training.optim import set_rates

SMOOTHING = 0.9  # of the loss that is judged: about the last ten steps
FLAT = 0.05  # a fall by less than this share is what batches differ by
TOO_HIGH = 4.0  # the test ends where the smoothed loss is this many times its lowest


@dataclass(frozen=True)
class RangeTest:
    """Rates of the output layer, smoothed training losses at them, and what follows."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float
    lowest: float
    """The rate at which the loss was lowest."""
    reason: str


def range_test(job: Job, low: float = 1e-5, high: float = 10.0, steps: int = 100) -> RangeTest:
    """Trains ``job`` for ``steps`` steps while its rates grow from ``low`` to ``high`` (output layer), others in ratio.

    Suggests a tenth of the rate at which the smoothed loss was lowest: there it still falls quickly. The output layer
    is random, also where the training's would be the best linear one: that one leaves hardly a loss to fall. Nothing is
    saved. Raises Refused for a range or a number of steps that cannot work, and where there is nothing to find.
    """
    if not (0 < low < high and math.isfinite(high)):
        raise Refused(f"the range {low} to {high} is none; give a --low above 0 and below --high")
    if steps < 10:
        raise Refused(f"--steps is {steps}; give at least 10")
    o = job.config.optim
    if o.epochs < 1:
        raise Refused(f"recipe {job.config.recipe} has no epoch to find a rate for; take another, or --epochs 1")
    with job.lock:
        rates, losses = _curve(job, low, high, steps)
    result = judge(rates, losses, stopped=len(rates) < steps)
    if job.config.model.head == "probe":
        note = "; found from a random output layer, as the probe's leaves no loss to fall"
        result = dataclasses.replace(result, reason=result.reason + note)
    return result


def _curve(job: Job, low: float, high: float, steps: int) -> tuple[list[float], list[float]]:
    """Rates of the output layer and smoothed losses at them, up to where the loss explodes."""
    o = job.config.optim
    trainer = Trainer(job)
    trainer.wrap()
    torch.manual_seed(job.config.system.seed)  # dropout
    trainer.train_mode()
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    batches = trainer.source.train(1 + n % o.epochs for n in itertools.count())
    for step, (x, y, _) in enumerate(tqdm(itertools.islice(batches, steps), total=steps, unit="step", desc="lr-find")):
        rate = low * (high / low) ** (step / (steps - 1))
        set_rates(trainer.optimizer, rate / o.lr)
        _, loss = trainer.step(*trainer.mixed(x, y, step))
        mean = SMOOTHING * mean + (1 - SMOOTHING) * float(loss)
        smoothed = mean / (1 - SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed) or smoothed > TOO_HIGH * min([*losses, smoothed]):
            break
        rates.append(rate)
        losses.append(smoothed)
    return rates, losses


def judge(rates: list[float], losses: list[float], *, stopped: bool) -> RangeTest:
    """What a range test's curve says. Raises Refused when the loss never fell, or by less than ``FLAT`` of it."""
    best = min(range(len(losses)), key=losses.__getitem__) if losses else 0
    if best < 3:
        raise Refused("the loss never fell, so there is no rate to find; start from a smaller --low")
    start = max(losses[: best + 1])
    if losses[best] > (1 - FLAT) * start:
        raise Refused(
            f"the loss hardly falls ({start:.3g} to {losses[best]:.3g}), so there is no rate to find; give more --steps"
            " or a larger --high"
        )
    lowest = rates[best]
    after = "from there it grows" if stopped or best < len(rates) - 1 else "--high is too low to see it grow"
    reason = (
        f"the training loss is lowest, {losses[best]:.2f}, at a learning rate of {lowest:.2g}, and {after};"
        f" a tenth of it, {lowest / 10:.2g}, is where it still falls quickly"
    )
    return RangeTest(tuple(rates), tuple(losses), lowest / 10, lowest, reason)
