"""The quickest forward pass of a frozen network on CPUs: convolution, batch norm and ReLU as one operation.

oneDNN has such an operation, and PyTorch's compiler calls it; called directly it needs no compiling.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same_arg
from torch import Tensor, nn

from finetune101.training.cpu import FastConv2d, FastConv2dSame
from finetune101.training.cpu_norm import DoneReLU, DoneReLU6, FastBatchNorm2d, FastBatchNormAct2d, followers
from finetune101.world import World

_ACTS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    DoneReLU: ("relu", []),
    DoneReLU6: ("hardtanh", [0.0, 6.0]),
}
# exactly these: a subclass may compute something else with its weight
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame, FastConv2d, FastConv2dSame)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d, FastBatchNorm2d, FastBatchNormAct2d)
TOLERANCES = {torch.bfloat16: 0.1, torch.float32: 1e-3}  # of an output's norm: bf16 alone makes 0.01 to 0.05 of it


def frozen(model: nn.Module, world: World) -> Callable[[Tensor], Tensor]:
    """A forward pass of ``model`` in evaluation mode, for whoever will not train it any more.

    On a CPU a copy with fused layers, about twice as fast in bf16; ``model`` itself elsewhere, and for a network of
    which the copy, tried on the first image, computes something else. Call it under autocast, without gradients.
    """
    if world.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return model
    dtype = torch.bfloat16 if world.precision == "bf16" else torch.float32
    fused: nn.Module | None = None
    tried = False

    def quick(x: Tensor) -> Tensor:
        nonlocal fused, tried
        if not tried:
            fused, tried = _fused_copy(model, x[:1], dtype), True
        if fused is None:
            return model.eval()(x)
        with torch.autocast("cpu", enabled=False):
            return fused(x.to(dtype))

    return quick


def _fused_copy(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module | None:
    """A fused copy of ``model`` that computes what it does for ``example`` (1, 3, H, W), or None."""
    expected = model.eval()(example).float()
    try:
        with torch.autocast("cpu", enabled=False):
            fused = fuse(copy.deepcopy(model), example, dtype)
            got = fused(example.to(dtype)).float()
    except (RuntimeError, TypeError, AttributeError):  # a shape, a layer or a dtype that oneDNN does not take here
        return None
    return fused if bool((got - expected).norm() <= TOLERANCES[dtype] * expected.norm()) else None


def fuse(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """``model``, in place, in ``dtype`` with fused layers, for images of the shape of ``example`` (1, 3, H, W)."""
    pairs = fold_batch_norm(model, example)
    model.to(dtype).to(memory_format=torch.channels_last)
    acts = _activations(model, pairs)
    names = {module: name for name, module in model.named_modules()}
    for conv, shape in _shapes(model, example.to(dtype)).items():
        if type(conv) not in _CONVOLUTIONS or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            continue
        act, gone = acts.get(conv, (nn.Identity, []))
        model.set_submodule(names[conv], FusedConv2d(conv, shape, *_ACTS[act]))
        for module in gone:
            model.set_submodule(names[module], nn.Identity())
    return model


def _shapes(model: nn.Module, example: Tensor) -> dict[nn.Conv2d, torch.Size]:
    """The input shape of every convolution."""
    shapes: dict[nn.Conv2d, torch.Size] = {}
    for conv, inputs, _ in _calls(model, example, nn.Conv2d):
        shapes[conv] = inputs[0].shape
    return shapes


def _calls(model: nn.Module, example: Tensor, *kinds: type[nn.Module]) -> list[tuple[Any, tuple[Any, ...], Tensor]]:
    """(module, inputs, output) of every module of ``kinds`` in a forward pass of ``example``; in order."""
    calls: list[tuple[Any, tuple[Any, ...], Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs, output)))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def fold_batch_norm(model: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Moves every batch norm that follows a convolution into its weights, in place; returns (convolution, norm).

    In fp32, before anything is rounded. The norms stay, but change nothing. ``example``: (1, 3, H, W).
    """
    calls = _calls(model, example, nn.Conv2d, nn.BatchNorm2d)
    times = Counter(module for module, _, _ in calls)
    outputs = {id(output): conv for conv, _, output in calls if type(conv) in _CONVOLUTIONS}  # calls keeps the tensors
    pairs = []
    for norm, inputs, _ in calls:
        conv = outputs.get(id(inputs[0])) if type(norm) in _NORMS else None
        if conv is None or times[norm] > 1 or times[conv] > 1 or norm.weight is None or norm.running_var is None:
            continue
        with torch.no_grad():
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            before = 0 if conv.bias is None else conv.bias * scale
            conv.bias = nn.Parameter(before + norm.bias - norm.running_mean * scale)
            conv.weight.mul_(scale.view(-1, 1, 1, 1))
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
            norm.weight.fill_((1 + norm.eps) ** 0.5)
            norm.bias.zero_()
        pairs.append((conv, norm))
    return pairs


def _activations(
    model: nn.Module, pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]]
) -> dict[nn.Module, tuple[type[nn.Module], list[nn.Module]]]:
    """For a convolution the kind of activation that follows it, and the modules that then have nothing left to do."""
    found: dict[nn.Module, tuple[type[nn.Module], list[nn.Module]]] = {}
    after = followers(model)
    for conv, norm in pairs:
        act = after.get(norm)
        if isinstance(norm, BatchNormAct2d):
            inside = type(norm.act) if isinstance(norm.drop, nn.Identity) else type(norm)
            if inside in _ACTS:
                found[conv] = (inside, [norm])
        elif type(act) in _ACTS and act is not None:
            found[conv] = (type(act), [norm, act])
        else:
            found[conv] = (nn.Identity, [norm])
    for module, act in after.items():
        if isinstance(module, nn.Conv2d) and module not in found and type(act) in _ACTS:
            found[module] = (type(act), [act])
    return found


class FusedConv2d(nn.Module):
    """A convolution with its activation, weights in the layout that oneDNN likes best for this shape."""

    def __init__(self, conv: nn.Conv2d, shape: torch.Size, act: str, limits: list[float]) -> None:
        super().__init__()
        self.same = isinstance(conv, Conv2dSame)
        self.kernel, self.stride, self.dilation = conv.kernel_size, list(conv.stride), list(conv.dilation)
        assert not isinstance(conv.padding, str)
        self.padding, self.groups, self.act, self.limits = list(conv.padding), conv.groups, act, limits
        self.bias = None if conv.bias is None else conv.bias.detach()
        if self.same:
            self.padding = [0, 0]
            left, right, top, bottom = self._same(shape)
            shape = torch.Size([*shape[:2], shape[2] + top + bottom, shape[3] + left + right])
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
            conv.weight.detach().to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, list(shape)
        )

    def _same(self, shape: torch.Size) -> list[int]:
        return list(pad_same_arg(list(shape[2:]), list(self.kernel), self.stride, self.dilation))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        if self.same:
            x = F.pad(x, self._same(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, self.act, self.limits, ""
        )
