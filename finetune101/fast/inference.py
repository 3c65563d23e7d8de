"""The quickest forward pass of a network that is not trained, on CPUs: convolution, batch norm, ReLU as one operation.

oneDNN has such an operation, and PyTorch's compiler calls it; called directly it needs no compiling.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
}
_TRIED = 4  # drawn images that a fused copy is compared on
_SLACK = {torch.bfloat16: 0.01, torch.float32: 1e-4}  # of an output's norm, beside twice what the number format costs


def timm_layer(name: str) -> tuple[Any, ...]:
    """The class ``name`` of timm.layers, alone; () where timm is not loaded: no network has such a layer then.

    Loading timm takes longer than anything else that a network of torchvision needs.
    """
    layers = sys.modules.get("timm.layers")
    return (getattr(layers, name),) if layers else ()


# exactly these: a subclass may compute something else with its weight
def _convolutions() -> tuple[type[nn.Module], ...]:
    return (nn.Conv2d, *timm_layer("Conv2dSame"))


def _norms() -> tuple[type[nn.Module], ...]:
    return (nn.BatchNorm2d, *timm_layer("BatchNormAct2d"))


def _kind(module: nn.Module | None) -> type[nn.Module] | None:
    """The class of ``module``, or the one whose output it computes where it says so by ``infers_as``."""
    return None if module is None else vars(type(module)).get("infers_as", type(module))


def fused_copy(model: nn.Module, shape: torch.Size, dtype: torch.dtype) -> nn.Module | None:
    """A copy of ``model`` with fused layers, in ``dtype``, for images of ``shape`` (3, H, W); None where that fails.

    It must compute what ``model`` does for drawn images, always the same ones, so that which of the two answers is a
    property of the network and not of the images that it is asked about first.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    examples = _drawn(shape)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            fused = fuse(copy.deepcopy(model).requires_grad_(False), examples[:1], dtype)
            quick = fused(examples.to(dtype)).float()
    except (RuntimeError, TypeError, AttributeError):  # a shape, a layer or a dtype that oneDNN does not take here
        return None
    return fused if _agrees(model, examples, quick, dtype) else None


def _drawn(shape: torch.Size) -> Tensor:
    """Standardised images of ``shape``, smooth like photos with some noise; the same every time."""
    generator = torch.Generator().manual_seed(101)
    smooth = F.interpolate(
        torch.randn(_TRIED, shape[0], 8, 8, generator=generator), shape[1:], mode="bilinear", align_corners=False
    )
    noise = torch.randn(_TRIED, *shape, generator=generator)
    return (smooth + 0.3 * noise).contiguous(memory_format=torch.channels_last)


def _agrees(model: nn.Module, examples: Tensor, quick: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``quick``, the fused output for ``examples``, is as near to the exact one as the plain output is.

    For every image, and with the same class wherever rounding cannot change it.
    """
    with torch.no_grad():
        with torch.autocast("cpu", enabled=False):
            exact = model(examples).float()
        plain = exact
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", torch.bfloat16):
                plain = model(examples).float()
    rounding = (plain - exact).norm(dim=1).max()
    allowed = 2 * rounding + _SLACK[dtype] * exact.norm(dim=1)
    near = bool(((quick - exact).norm(dim=1) <= allowed).all())  # false for what is not finite
    if exact.shape[1] < 2:
        return near
    first, second = exact.topk(2).values.unbind(1)
    sure = first - second > 2 * allowed
    return near and torch.equal(quick.argmax(1)[sure], exact.argmax(1)[sure])


def fuse(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """``model``, in place, in ``dtype`` with fused layers, for images of the shape of ``example`` (1, 3, H, W)."""
    pairs = fold_batch_norm(model, example)
    model.to(dtype).to(memory_format=torch.channels_last)
    acts = _activations(model, pairs)
    names = {module: name for name, module in model.named_modules()}
    for conv, shape in _shapes(model, example.to(dtype)).items():
        if _kind(conv) not in _convolutions() or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
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
    outputs = {
        id(output): conv for conv, _, output in calls if _kind(conv) in _convolutions()
    }  # calls keeps the tensors
    pairs = []
    for norm, inputs, _ in calls:
        conv = outputs.get(id(inputs[0])) if _kind(norm) in _norms() else None
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
    activations: dict[nn.Module, tuple[type[nn.Module], list[nn.Module]]] = {}
    after = followers(model)
    for conv, norm in pairs:
        act = after.get(norm)
        if isinstance(norm, timm_layer("BatchNormAct2d")):
            inside = _kind(norm.get_submodule("act")) if isinstance(norm.drop, nn.Identity) else None
            if inside in _ACTS:
                activations[conv] = (inside, [norm])
        elif (kind := _kind(act)) in _ACTS and act is not None:
            activations[conv] = (kind, [norm, act])
        else:
            activations[conv] = (nn.Identity, [norm])
    for module, act in after.items():
        if isinstance(module, nn.Conv2d) and module not in activations and (kind := _kind(act)) in _ACTS:
            activations[module] = (kind, [act])
    return activations


def followers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For a module of an ``nn.Sequential`` the next one, which alone sees its output; both are used nowhere else."""
    owners = Counter(child for parent in model.modules() for child in parent.children())
    chains = [m for m in model.modules() if isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward]
    return {a: b for chain in chains for a, b in pairwise(chain) if owners[a] == owners[b] == 1}


class FusedConv2d(nn.Module):
    """A convolution with its activation, weights in the layout that oneDNN likes best for this shape."""

    def __init__(self, conv: nn.Conv2d, shape: torch.Size, act: str, limits: list[float]) -> None:
        super().__init__()
        self.same = isinstance(conv, timm_layer("Conv2dSame"))
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
        from timm.layers.padding import pad_same_arg  # loaded, as the layer is timm's

        return list(pad_same_arg(list(shape[2:]), list(self.kernel), self.stride, self.dilation))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        if self.same:
            x = F.pad(x, self._same(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, self.act, self.limits, ""
        )
