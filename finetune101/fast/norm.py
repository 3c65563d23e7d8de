"""Batch norm and the ReLU after it as one pass over memory, for training on CPUs (batch_norm.c).

A training step of a small network waits for memory: plain PyTorch goes 13 times over every activation between two
convolutions (counted by reading it), this 8 times.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune101.fast.inference import followers, timm_layer
from finetune101.fast.kernels import SUFFIXES, compiled, kernel

Limits = tuple[float, float]
NONE: Limits = (-math.inf, math.inf)


def fast_norm(model: nn.Module) -> int:
    """Make the 2D batch norms of ``model``, in place, compute themselves and their ReLU in one pass.

    Only classes change, so names and state dict stay. It acts where activations are bf16 or fp32 in channels_last
    memory on the CPU and gradients are on; else the layers are the old ones. Outputs and gradients differ from plain
    ones by rounding. Returns the number of layers changed: 0 the second time, and where gcc is missing.
    """
    if compiled() is None:
        return 0
    for norm, act in followers(model).items():
        if type(norm) is nn.BatchNorm2d and type(act) in _DONE:
            norm.limits = _CLAMPS[type(act)]  # type: ignore[assignment]
            act.__class__ = _DONE[type(act)]
    faster = {nn.BatchNorm2d: FastBatchNorm2d} | {layer: fast_norm_act(layer) for layer in timm_layer("BatchNormAct2d")}
    layers = [m for m in model.modules() if type(m) in faster]
    for layer in layers:
        layer.__class__ = faster[type(layer)]
    return len(layers)


def _applies(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in SUFFIXES
        and torch.is_grad_enabled()
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] == norm.num_features
        and x.numel() > x.shape[1]
        and norm.weight is not None
        and norm.weight.dtype == torch.float32
        and norm.running_mean is not None
        and norm.running_mean.dtype == torch.float32
        and norm.momentum is not None
    )


def _normed(norm: nn.BatchNorm2d, x: Tensor, limits: Limits) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    if not norm.training:
        mean, var = norm.running_mean.double(), norm.running_var.double()
        return BatchNorm.apply(x, norm.weight, norm.bias, mean, (var + norm.eps).rsqrt(), limits, False)
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        mean, var = _moments(x.detach(), count)
        norm.running_mean.lerp_(mean.float(), norm.momentum)
        norm.running_var.lerp_((var * (count / (count - 1))).float(), norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    return BatchNorm.apply(x, norm.weight, norm.bias, mean, (var + norm.eps).rsqrt(), limits, True)


def _moments(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, float64 (C)."""
    out = torch.empty(2, x.shape[1], dtype=torch.float64)
    near = x[0, :, 0, 0].float().contiguous()  # any value: it differs from the mean by a few standard deviations
    kernel("moments", x.dtype)(x.data_ptr(), count, x.shape[1], near.data_ptr(), out.data_ptr())
    shift, square = out / count
    return near + shift, (square - shift * shift).clamp_min(0)


class FastBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, with the clamp of the ReLU that follows it in its ``nn.Sequential``."""

    infers_as = nn.BatchNorm2d
    limits: Limits = NONE

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if not _applies(self, x):
            return super().forward(x)
        y = _normed(self, x, NONE if self._forward_hooks else self.limits)  # a hook sees what it would without us
        if self.limits != NONE and not self._forward_hooks:
            y.clamped = True  # type: ignore[attr-defined]  # tells the ReLU that it has nothing left to do
        return y


@functools.cache
def fast_norm_act(layer: Any) -> type[nn.Module]:
    """timm's ``layer`` BatchNormAct2d (batch norm with its activation) with the clamp in the same pass."""

    class FastBatchNormAct2d(layer):
        infers_as = layer

        def forward(self, x: Tensor) -> Tensor:
            """(N, C, H, W) -> (N, C, H, W)."""
            if not _applies(self, x):
                return super().forward(x)
            limits = _CLAMPS.get(type(self.act)) if isinstance(self.drop, nn.Identity) else None
            if limits:
                return _normed(self, x, limits)
            return self.act(self.drop(_normed(self, x, NONE)))

    return FastBatchNormAct2d


class DoneReLU(nn.ReLU):
    """A ReLU after a ``FastBatchNorm2d``."""

    infers_as = nn.ReLU

    def forward(self, x: Tensor) -> Tensor:
        """Its input, where that has been clamped already."""
        return x if x.__dict__.pop("clamped", False) else super().forward(x)


class DoneReLU6(nn.ReLU6):
    """A ReLU6 after a ``FastBatchNorm2d``."""

    infers_as = nn.ReLU6

    def forward(self, x: Tensor) -> Tensor:
        """Its input, where that has been clamped already."""
        return x if x.__dict__.pop("clamped", False) else super().forward(x)


_CLAMPS: dict[type[nn.Module], Limits] = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0), nn.Identity: NONE}
_DONE: dict[type[nn.Module], type[nn.Module]] = {nn.ReLU: DoneReLU, nn.ReLU6: DoneReLU6}


class BatchNorm(torch.autograd.Function):
    """clamp((x - mean) * inverse * weight + bias), inverse = 1 / sqrt(var + eps), of Ioffe and Szegedy (2015)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, limits: Limits, batch: bool
    ) -> Tensor:
        """x (N, C, H, W) bf16 or fp32, channels_last; the rest (C); ``batch``: mean and inverse are of x itself."""
        a = (inverse * weight).float()
        b = (bias - mean * inverse * weight).float()
        y = torch.empty_like(x)
        count, channels = x.numel() // x.shape[1], x.shape[1]
        kernel("apply", x.dtype)(x.data_ptr(), count, channels, a.data_ptr(), b.data_ptr(), *limits, y.data_ptr())
        ctx.save_for_backward(x, a, b, mean, inverse)
        ctx.limits, ctx.batch = limits, batch
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias from that of the output."""
        x, a, b, mean, inverse = ctx.saved_tensors
        count, channels = x.numel() // x.shape[1], x.shape[1]
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        both = x.data_ptr(), grad.data_ptr(), count, channels, a.data_ptr(), b.data_ptr(), *ctx.limits
        e = f = torch.zeros(channels, dtype=torch.float64)
        grad_weight = grad_bias = grad_x = None
        if ctx.batch or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            sums = torch.empty(2, channels, dtype=torch.float64)
            near = mean.float()
            kernel("gradient_sums", x.dtype)(*both, near.data_ptr(), sums.data_ptr())
            grad_bias, grad_weight = sums[0], (sums[1] - (mean - near) * sums[0]) * inverse
            if ctx.batch:
                e = -a * inverse * grad_weight / count
                f = -a * grad_bias / count - e * mean
            grad_weight, grad_bias = grad_weight.float(), grad_bias.float()
        if ctx.needs_input_grad[0]:
            grad_x, e, f = torch.empty_like(x), e.float(), f.float()
            kernel("input_gradient", x.dtype)(*both, e.data_ptr(), f.data_ptr(), grad_x.data_ptr())
        return grad_x, grad_weight, grad_bias, None, None, None, None
