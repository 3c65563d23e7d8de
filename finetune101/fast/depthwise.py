"""What makes a training step on the CPU fast: memory that stays with the process, and quick depthwise convolutions.

Both change speed only: parameters, checkpoints and predictions keep their names and meaning.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune101.fast.inference import timm_layer
from finetune101.fast.kernels import SUFFIXES, compiled, kernel

Pair = tuple[int, ...]  # height, width
Layer = tuple[Pair, Pair]  # stride; zero padding (top, left)

# Names and values of <malloc.h>: never give memory back to the kernel, whose pages would return one by one.
_MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 256 * 2**20)}


def tune_allocator() -> bool:
    """Keep freed memory in the process instead of returning it to the kernel, once for the whole process.

    Call it before the first large tensor. A training step gains a factor of 1.2 to 1.4, peak memory grows by about
    a seventh. Returns whether it was done: only on Linux with glibc, elsewhere nothing happens.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in _MALLOPT.values())


def fast_depthwise(model: nn.Module) -> int:
    """Make the depthwise convolutions of ``model``, in place, train fast on CPUs.

    Only the class of those layers changes: names, parameters, buffers and the state dict stay. It acts where a layer
    computes on the CPU, in bf16 or with the kernels of depthwise.c in fp32, and gradients are on; else the layer is the
    old one. Outputs and gradients differ from plain ones by rounding. Returns the number of layers changed.
    """
    faster = {nn.Conv2d: FastConv2d} | {layer: fast_same(layer) for layer in timm_layer("Conv2dSame")}
    layers = [m for m in model.modules() if type(m) in faster and _is_plain_depthwise(m)]
    for layer in layers:
        layer.__class__ = faster[type(layer)]
    return len(layers)


def _is_plain_depthwise(conv: nn.Module) -> bool:
    """One odd filter per channel, undilated, padded with zeros by at most half the filter."""
    assert isinstance(conv, nn.Conv2d)
    return (
        conv.groups == conv.in_channels == conv.out_channels > 1
        and all(d == 1 for d in conv.dilation)
        and all(k % 2 == 1 for k in conv.kernel_size)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(p <= k // 2 for p, k in zip(conv.padding, conv.kernel_size, strict=True))
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of ``x`` runs: autocast's where that is on."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def _is_slow(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the plain backward pass of ``conv`` with ``x`` will run, and is slow."""
    if x.device.type != "cpu" or x.dim() != 4 or not torch.is_grad_enabled():
        return False
    dtype = _compute_dtype(x)
    return dtype == torch.bfloat16 or (dtype == torch.float32 and suits_kernels(x, conv.weight, conv.stride))


def _depthwise(conv: nn.Conv2d, x: Tensor, before: Pair, after: Pair) -> Tensor:
    """``conv(x)`` by ``Depthwise`` with the given zero padding."""
    dtype = _compute_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (conv.weight, conv.bias))
    output: Tensor
    output, *moments = Depthwise.apply(x.to(dtype), weight, bias, conv.stride, before, after)
    hooked = conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks
    if moments and x.dtype == dtype and not hooked:
        layer, versions = (conv.stride, before), (x._version, output._version)
        output.depthwise = Source(x, conv.weight, layer, (moments[0], moments[1]), versions)  # type: ignore[attr-defined]
    return output


@dataclass(frozen=True)
class Source:
    """What a depthwise convolution without bias made its output from: the batch norm after it may do both gradients."""

    x: Tensor
    weight: Tensor
    layer: Layer
    moments: tuple[Tensor, Tensor]
    """Of the output: a value near the mean, fp32 (C), and sums of the distance to it and its square, float64 (2, C)."""
    versions: tuple[int, int]
    """Of x and the output: other numbers say that one of both was changed in place."""

    def is_whole(self, output: Tensor) -> bool:
        """Whether ``output`` is as the convolution gave it, and nobody wants to see a gradient in between."""
        return (
            self.versions == (self.x._version, output._version)
            and not is_watched(output)
            and (output.grad_fn is not None or not any(one.requires_grad for one in (self.x, self.weight)))
        )


def is_watched(tensor: Tensor) -> bool:
    """Whether a hook or ``retain_grad`` sees the gradient of ``tensor``."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


class FastConv2d(nn.Conv2d):
    """A depthwise ``nn.Conv2d`` that trains fast."""

    infers_as = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        if not _is_slow(self, x):
            return super().forward(x)
        assert not isinstance(self.padding, str)
        return _depthwise(self, x, self.padding, self.padding)


@functools.cache
def fast_same(layer: Any) -> type[nn.Module]:
    """timm's ``layer`` Conv2dSame (TensorFlow's padding: more at bottom and right) that trains fast."""
    from timm.layers.padding import pad_same_arg

    class FastConv2dSame(layer):
        infers_as = layer

        def forward(self, x: Tensor) -> Tensor:
            """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""
            if not _is_slow(self, x):
                return super().forward(x)
            left, right, top, bottom = pad_same_arg(list(x.shape[2:]), list(self.kernel_size), list(self.stride))
            return _depthwise(self, x, (top, left), (bottom, right))

    return FastConv2dSame


class Depthwise(torch.autograd.Function):
    """A depthwise convolution by the fastest kernels; which ones depends on the shapes alone.

    Those of depthwise.c where they apply: half to a tenth of the time of what follows, weight gradients summed in fp32.
    What follows was measured on AVX-512 cores with bf16 (oneDNN, channels_last). Input gradient: the library's kernel
    takes 2 (stride 1) to 50 times (stride 2) as long as a forward pass of the flipped filter over the output gradient,
    spread over zeros. Weight gradient: the bf16 kernel takes 3 to 5 times as long as the fp32 one with 5x5 filters, but
    half with 3x3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, before: Pair, after: Pair
    ) -> tuple[Tensor, ...]:
        """x (N, C, H, W), weight (C, 1, odd, odd), bias (C); zero padding before (top, left), after (bottom, right).

        Returns the output, with ``Source.moments`` where depthwise.c computes it.
        """
        ctx.input_shape, ctx.stride, ctx.before = x.shape, stride, before
        ctx.set_materialize_grads(False)
        ctx.padding, padded = before, x
        ctx.suits_kernels = suits_kernels(x, weight, stride)
        if ctx.suits_kernels and bias is None:
            ctx.save_for_backward(x, weight)
            output, *moments = _kernel_output(x, weight, (stride, before), after)
            ctx.mark_non_differentiable(*moments)
            return output, *moments
        if before != after:
            padded, ctx.padding = F.pad(x, (before[1], after[1], before[0], after[0])), (0, 0)
        ctx.save_for_backward(x if ctx.suits_kernels else padded, weight)
        return (F.conv2d(padded, weight, bias, stride, ctx.padding, 1, x.shape[1]),)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *moments: None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias from that of the output, each only if it is asked for."""
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if grad is None:
            return (None,) * 6
        if ctx.suits_kernels:
            layer = ctx.stride, ctx.before
            grad_x, taps, _ = kernel_gradients(x, grad, weight, layer, ctx.needs_input_grad)
            grad_weight = taps if taps is None else taps.to(weight.dtype)
        else:
            if ctx.needs_input_grad[0]:
                grad_x = _input_gradient(grad, weight, ctx.input_shape, ctx.stride, ctx.before)
            if ctx.needs_input_grad[1]:
                grad_weight = _weight_gradient(grad, x, weight, ctx.stride, ctx.padding)
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


def suits_kernels(x: Tensor, weight: Tensor, stride: Pair) -> bool:
    """Whether depthwise.c has the gradients of this convolution."""
    return (
        x.dtype in SUFFIXES
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.shape[0] % 16 == 0
        and tuple(weight.shape[2:]) in ((3, 3), (5, 5))
        and stride in ((1, 1), (2, 2))
        and compiled() is not None
    )


def _filters(weight: Tensor) -> Tensor:
    """(C, 1, k, k) -> fp32 (k * k, C)."""
    return weight.detach().float().view(len(weight), -1).t().contiguous()


def _kernel_output(x: Tensor, weight: Tensor, layer: Layer, after: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Output and ``Source.moments`` by depthwise.c."""
    (stride, before), channels, k = layer, weight.shape[0], weight.shape[2]
    size = ((n + a + b - k) // stride[0] + 1 for n, a, b in zip(x.shape[2:], before, after, strict=True))
    output = torch.empty((len(x), channels, *size), dtype=x.dtype, memory_format=torch.channels_last)
    filters, near, sums = _filters(weight), torch.empty(channels), torch.empty(2, channels, dtype=torch.float64)
    shape = (len(x), *x.shape[2:], *output.shape[2:], channels, k, stride[0], *before)
    pointers = (tensor.data_ptr() for tensor in (output, near, sums))
    kernel("depthwise_output", x.dtype)(x.data_ptr(), filters.data_ptr(), *shape, *pointers)
    return output, near, sums


def kernel_gradients(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    layer: Layer,
    wanted: Sequence[bool],
    before: tuple[Any, ...] = (None, None, 0.0, 0.0, None),
    after: tuple[Any, ...] = (None, None, None, 0.0, 0.0, None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the input (N, C, H, W) and of the weights (C, 1, k, k) of a depthwise convolution, and sums (2, C).

    ``x``, ``grad`` (N, C, H, W); ``wanted``: which of the two gradients. With ``before`` (a, b, low, high, a value near
    the mean) the input is clamp(a * x + b), and the sums are those of ``gradient_sums`` in batch_norm.c for this norm.
    With ``after`` (output of the convolution, a, b, low, high, e, f) ``grad`` is that of its output, see ``Step``.
    """
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
    channels, k, filters = weight.shape[0], weight.shape[2], _filters(weight.to(x.dtype))
    grad_x = torch.empty_like(x) if wanted[0] else None
    taps = torch.empty(k * k, channels) if wanted[1] else None
    sums = torch.empty(2, channels, dtype=torch.float64) if wanted[0] and before[0] is not None else None
    shape = (len(x), *x.shape[2:], *grad.shape[2:], channels, k, layer[0][0], *layer[1])
    arguments = (x, after[0], grad, filters, *shape, *before, *after[1:], grad_x, taps, sums)
    pointers = (value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)
    kernel("depthwise_gradients", x.dtype)(*pointers)
    return grad_x, None if taps is None else taps.t().reshape(weight.shape), sums


def _input_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, stride: Pair, before: Pair) -> Tensor:
    """(N, C, H', W') -> (N, C, H, W): spread over zeros, then a forward pass with the flipped filter."""
    half = [k // 2 for k in weight.shape[2:]]
    if grad.shape != shape or stride != (1, 1):
        rows, columns = (
            slice(h - p, h - p + s * (n - 1) + 1, s)
            for h, p, s, n in zip(half, before, stride, grad.shape[2:], strict=True)
        )
        channels_last = grad.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        spread = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout).zero_()
        spread[:, :, rows, columns] = grad
        grad = spread
    return F.conv2d(grad, weight.flip(2, 3), None, 1, half, 1, shape[1])


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """(N, C, H', W') and x (N, C, H, W) -> (C, 1, k, k), in fp32 for filters larger than 3x3."""
    dtype = torch.promote_types(weight.dtype, torch.float32) if max(weight.shape[2:]) > 3 else weight.dtype
    grads = torch.ops.aten.convolution_backward(
        grad.to(dtype), x.to(dtype), weight.to(dtype), None, list(stride), list(padding), [1, 1], False, [0, 0],
        x.shape[1], [False, True, False],
    )  # fmt: skip
    return grads[1].to(weight.dtype)
