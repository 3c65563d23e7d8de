"""Batch norm and the ReLU after it as one pass over memory, for training on CPUs (batch_norm.c).

A training step of a small network waits for memory: plain PyTorch goes 13 times over every activation between two
convolutions (counted by reading it), this 8 times.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune101.fast.depthwise import Layer, Source, is_watched, kernel_gradients
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
    source: Source | None = x.__dict__.get("depthwise")
    if source and not source.is_whole(x):
        source = None
    with torch.no_grad():
        if norm.training:
            count = x.numel() // x.shape[1]
            mean, var = _moments(*(source.moments if source else _sums(x.detach())), count)
            norm.running_mean.lerp_(mean.float(), norm.momentum)
            norm.running_var.lerp_((var * (count / (count - 1))).float(), norm.momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        else:
            mean, var = norm.running_mean.double(), norm.running_var.double()
        step = Step.of(norm, mean, (var + norm.eps).rsqrt(), limits)
    if source:
        normed: Normed | None = source.x.__dict__.get("normed")
        before = normed if normed and normed.is_whole(source.x) else None
        first = (before.x, before.weight, before.bias, before.step) if before else (source.x, None, None, None)
        y: Tensor = DepthwiseNorm.apply(*first, source.weight, norm.weight, norm.bias, step, x.detach(), source.layer)
    else:
        y = BatchNorm.apply(x, norm.weight, norm.bias, step)
    hooked = norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks
    if not (source or hooked):  # after a depthwise convolution it would keep the input of that convolution
        y.normed = Normed(x, norm.weight, norm.bias, step, (x._version, y._version))  # type: ignore[attr-defined]
    return y


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """``Source.moments`` of x (N, C, H, W); any value is near, as it differs by a few standard deviations."""
    near, sums = x[0, :, 0, 0].float().contiguous(), torch.empty(2, x.shape[1], dtype=torch.float64)
    kernel("moments", x.dtype)(x.data_ptr(), *_rows(x), near.data_ptr(), sums.data_ptr())
    return near, sums


def _moments(near: Tensor, sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, float64 (C), from ``Source.moments`` of ``count`` values."""
    shift, square = sums / count
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


@dataclass(frozen=True)
class Step:
    """A use of a batch norm (Ioffe and Szegedy, 2015): clamp(a * x + b), a = weight * inverse, b = bias - mean * a."""

    a: Tensor
    b: Tensor
    limits: Limits
    mean: Tensor
    inverse: Tensor
    """1 / sqrt(var + eps)."""
    batch: bool
    """Whether mean and inverse are those of x itself."""

    @staticmethod
    def of(norm: nn.BatchNorm2d, mean: Tensor, inverse: Tensor, limits: Limits) -> Step:
        """``norm`` with these moments, float64 (C)."""
        a = norm.weight * inverse
        return Step(a.float(), (norm.bias - mean * a).float(), limits, mean, inverse, norm.training)

    def output(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) bf16 or fp32, channels_last -> the same."""
        y = torch.empty_like(x)
        kernel("apply", x.dtype)(x.data_ptr(), *_rows(x), *self._pointers(), y.data_ptr())
        return y

    def sums(self, x: Tensor, grad: Tensor) -> Tensor:
        """float64 (2, C): the sums that ``gradients`` takes."""
        sums, near = torch.empty(2, x.shape[1], dtype=torch.float64), self.mean.float()
        pointers = x.data_ptr(), grad.data_ptr(), *_rows(x), *self._pointers(), near.data_ptr(), sums.data_ptr()
        kernel("gradient_sums", x.dtype)(*pointers)
        return sums

    def gradients(self, sums: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Gradients of weight and bias; e and f of the input's gradient a * d + e * x + f. All fp32 (C)."""
        if sums is None:
            return None, None, torch.zeros_like(self.a), torch.zeros_like(self.a)
        grad_bias = sums[0]
        grad_weight = (sums[1] - (self.mean - self.mean.float()) * grad_bias) * self.inverse
        e = -self.a * self.inverse * grad_weight / count * self.batch
        f = (-self.a * grad_bias / count - e * self.mean) * self.batch
        return grad_weight.float(), grad_bias.float(), e.float(), f.float()

    def input_gradient(self, x: Tensor, grad: Tensor, e: Tensor, f: Tensor) -> Tensor:
        """(N, C, H, W), like x."""
        grad_x = torch.empty_like(x)
        pointers = x.data_ptr(), grad.data_ptr(), *_rows(x), *self._pointers(), e.data_ptr(), f.data_ptr()
        kernel("input_gradient", x.dtype)(*pointers, grad_x.data_ptr())
        return grad_x

    def _pointers(self) -> tuple[int, int, float, float]:
        return self.a.data_ptr(), self.b.data_ptr(), *self.limits


@dataclass(frozen=True)
class Normed:
    """What a batch norm made its output from; ``versions`` of input and output: another says, changed in place."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    step: Step
    versions: tuple[int, int]

    def is_whole(self, output: Tensor) -> bool:
        """As ``Source.is_whole``."""
        return (
            self.versions == (self.x._version, output._version)
            and not is_watched(output)
            and (output.grad_fn is not None or not any(p.requires_grad for p in (self.x, self.weight, self.bias)))
        )


def _rows(x: Tensor) -> tuple[int, int]:
    """x (N, C, H, W) -> N * H * W, C."""
    return x.numel() // x.shape[1], x.shape[1]


class BatchNorm(torch.autograd.Function):
    """``Step`` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, step: Step) -> Tensor:
        """(N, C, H, W) bf16 or fp32, channels_last -> the same."""
        ctx.save_for_backward(x)
        ctx.step = step
        return step.output(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias from that of the output."""
        (x,) = ctx.saved_tensors
        step: Step = ctx.step
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        sums = step.sums(x, grad) if step.batch or any(ctx.needs_input_grad[1:3]) else None
        grad_weight, grad_bias, e, f = step.gradients(sums, _rows(x)[0])
        grad_x = step.input_gradient(x, grad, e, f) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias, None


class DepthwiseNorm(torch.autograd.Function):
    """The norm after a depthwise convolution, with the gradients of both and of a norm before them, in one function.

    Its forward pass is that of the norm alone, as the output of the convolution is given. Its gradients take three
    passes where three functions take five, and the input of the convolution need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_before: Tensor | None,
        bias_before: Tensor | None,
        before: Step | None,
        filters: Tensor,
        weight: Tensor,
        bias: Tensor,
        step: Step,
        output: Tensor,
        layer: Layer,
    ) -> Tensor:
        """x: input of the norm before, or of the convolution; ``output`` of the convolution -> the same, normed."""
        ctx.save_for_backward(x, filters, output)
        ctx.before, ctx.step, ctx.layer = before, step, layer
        return step.output(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, both norms' weights and biases, and the filters."""
        x, filters, output = ctx.saved_tensors
        step, before, needed = ctx.step, ctx.before, ctx.needs_input_grad
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        sums = step.sums(output, grad) if step.batch or any(needed[5:7]) else None
        grad_weight, grad_bias, e, f = step.gradients(sums, _rows(output)[0])
        first = (before.a, before.b, *before.limits, before.mean.float()) if before else (None, None, 0.0, 0.0, None)
        after = output, step.a, step.b, *step.limits, e, f
        grad_x, grad_filters, sums = kernel_gradients(
            x, grad, filters, ctx.layer, (any(needed[:3]), needed[4]), first, after
        )
        grad_before: tuple[Tensor | None, ...] = None, None
        if before and sums is not None and grad_x is not None:
            *grad_before, e, f = before.gradients(sums, _rows(x)[0])
            grad_x = before.input_gradient(x, grad_x, e, f) if needed[0] else None
        return grad_x, *grad_before, None, grad_filters, grad_weight, grad_bias, None, None, None
