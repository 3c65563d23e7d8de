"""How long the rest of a training will take, forecast from its first steps."""

from __future__ import annotations

import statistics
import time
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from finetune101.training.job import Job

STEPS = 20  # after which the forecast is printed, or after all steps where there are fewer
WRITTEN = 3e8  # bytes per second of checkpoints, safely on a disk


class TrainingState(Protocol):
    """What a forecast asks of a training; ``loop.Trainer`` is one."""

    job: Job
    model: nn.Module
    average: Any
    steps_per_epoch: int

    def train_mode(self) -> None:
        """Puts the network back into training."""


class Forecast:
    """Says once, within the first 20 steps of this process, how long the rest takes."""

    def __init__(self) -> None:
        self.took: list[float] = []  # seconds of each step
        self.last = 0.0

    def after_step(self, trainer: TrainingState, epoch: int, step: int, started: float, bar: tqdm[Any]) -> None:
        """To be called after ``step`` (from 1) of ``epoch``, which began at ``started`` (of time.perf_counter)."""
        steps = trainer.steps_per_epoch
        left = (trainer.job.config.optim.epochs - epoch) * steps + steps - step
        if bar.disable or len(self.took) >= STEPS:
            return
        if trainer.job.world.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.took.append(now - (started if step == 1 else self.last))
        self.last = now
        if left and len(self.took) == min(STEPS, max(steps, 2)):
            bar.write(f"About {in_words(self.seconds(trainer, epoch, step))} to go, by the first steps")
            self.took += [0.0] * STEPS  # so that it is printed once

    def seconds(self, trainer: TrainingState, epoch: int, step: int) -> float:
        """Seconds that are left after ``step`` of ``epoch``."""
        job, o = trainer.job, trainer.job.config.optim
        per_epoch = statistics.mean(self.took[len(self.took) // 2 :]) * trainer.steps_per_epoch
        own = job.built.preprocessing.size
        sizes = [job.config.augment.size_at(e, o.epochs) or own for e in range(epoch, o.epochs + 1)]
        forward = self._forward(trainer, {*sizes, own})
        passes = sum(forward[size] / forward[sizes[0]] for size in sizes) - step / trainer.steps_per_epoch
        due = range(epoch, o.epochs + 1) if job.validates else ()
        validations = sum(e % o.val_every == 0 or e == o.epochs for e in due)
        images = len(job.manifest.subsets["val"])
        weights = sum(t.numel() * t.element_size() for t in trainer.model.state_dict().values())
        copies = 3 + bool(trainer.average)  # of the weights in the two checkpoints
        return per_epoch * passes + validations * images * forward[own] + len(sizes) * copies * weights / WRITTEN

    def _forward(self, trainer: TrainingState, sizes: set[int]) -> dict[int, float]:
        """Seconds of the forward pass per image, by size; the training is not changed."""
        job = trainer.job
        if job.config.model.cached_features:  # a step sees features, and sizes change nothing
            return dict.fromkeys(sizes, 1e-6)
        seconds, n = {}, min(job.config.optim.batch_size, 32)
        trainer.model.eval()
        with torch.no_grad(), job.world.autocast():
            for size in sizes:
                x = torch.zeros(n, 3, size, size, device=job.world.device)
                x = x.contiguous(memory_format=job.world.memory_format)
                for _ in range(2):  # the first one prepares what the size needs
                    started = time.perf_counter()
                    trainer.model(x).sum().item()
                    seconds[size] = (time.perf_counter() - started) / n
        trainer.train_mode()
        return seconds


def in_words(seconds: float) -> str:
    """``seconds`` as people say them: "40 seconds", "12 minutes", "16.5 hours", "4 days"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} second{'s' * (round(seconds) > 1)}"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
