"""The only forward pass outside of the training step: evaluation, validation, predictions, features, teachers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from finetune101.fast import fused_copy
from finetune101.machine import World

CHUNK = {"cpu": 16}  # images per pass, whatever the batch: sums are rounded in another order for another number
OTHER_CHUNK = 32


class Forward:
    """The output of a network in evaluation mode. It is the same for an image whatever other images are in the batch.

    Computed in the number format of ``world``, ``CHUNK`` images at a time; the last chunk is filled up. ``fast`` allows
    fused layers (``fast.fused_copy``) on a CPU. ``mirror`` takes the mean output of an image and of its mirror image
    (Krizhevsky et al., 2012).
    """

    def __init__(self, model: nn.Module, world: World, *, fast: bool = True, mirror: bool = False) -> None:
        self.model: nn.Module = model.to(world.device, memory_format=world.memory_format)  # type: ignore[call-overload]
        self.world, self.mirror, self.fast = world, mirror, fast and world.device.type == "cpu"
        self.chunk = CHUNK.get(world.device.type, OTHER_CHUNK)
        self.dtype = torch.bfloat16 if world.precision == "bf16" else torch.float32
        self._fused: dict[torch.Size, nn.Module | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), or features (N, D), on the world's device -> float32 (N, classes) there."""
        self.model.eval()
        with torch.no_grad():
            return torch.cat([self._both(part) for part in x.split(self.chunk)])

    def _both(self, x: Tensor) -> Tensor:
        if self.mirror:
            return (self._whole(x) + self._whole(x.flip(3))) / 2
        return self._whole(x)

    def _whole(self, x: Tensor) -> Tensor:
        """``x`` filled up to whole chunks by zeros; the outputs of those are left out."""
        count = len(x)
        if count < self.chunk:
            x = torch.cat([x, x.new_zeros(self.chunk - count, *x.shape[1:])])
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.world.memory_format)
        return self._once(x)[:count]

    def _once(self, x: Tensor) -> Tensor:
        if self.fast and x.dim() == 4:
            shape = x.shape[1:]
            if shape not in self._fused:
                self._fused[shape] = fused_copy(self.model, shape, self.dtype)
            if fused := self._fused[shape]:
                with torch.autocast("cpu", enabled=False):
                    return fused(x.to(self.dtype)).float()
        with self.world.autocast():
            output: Tensor = self.model(x)
        return output.float()


def logits(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    *,
    fast: bool = True,
    mirror: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output of ``Forward`` for every image: float32 logits (N, classes) and int64 labels (N,), both on the CPU."""
    forward, outputs, labels = Forward(model, world, fast=fast, mirror=mirror), [], []
    for x, y in batches:
        outputs.append(forward(x).cpu())
        labels.append(y.cpu())
    return torch.cat(outputs), torch.cat(labels)
