"""Which layers of a network class activation maps are made of: the table's, and how they are found in others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from finetune101.errors import Refused
from finetune101.models.table import MapLayer, lookup

FINE = 8  # the finer layer has at least an eighth of the image's side


def map_layers(name: str, model: nn.Module, size: int) -> list[tuple[MapLayer, ...]]:
    """For each part of ``model``, the network ``name``: its last such layer, and where it has one a finer layer.

    ``size`` is that of the network's input, in pixels. Raises Refused for a network without such a layer.
    """
    entry = lookup(name)
    if isinstance(entry.weights, tuple):
        return [
            tuple(dataclasses.replace(layer, name=f"parts.{i}.{layer.name}") for layer in lookup(part).map_layers)
            for i, part in enumerate(entry.weights)
        ]
    return [entry.map_layers or _of_timm(name, model, size)]


def as_maps(values: Tensor, layer: MapLayer) -> Tensor:
    """The output of ``layer``, or values of its shape -> (N, C, h, w). Raises Refused where tokens make no square."""
    if layer.layout == "channels_first":
        return values
    if layer.layout == "channels_last":
        return values.permute(0, 3, 1, 2)
    tokens = values[:, layer.extra :]
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise Refused(f"the {tokens.shape[1]} tokens of this network make no square; explain another network")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _of_timm(name: str, model: nn.Module, size: int) -> tuple[MapLayer, ...]:
    """Of a transformer the first norm of its last block, else the last layers with several places."""
    shapes, blocks = _shapes(model, size), getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(blocks[-1], "norm1"):
        norm = f"blocks.{len(blocks) - 1}.norm1"
        if len(shapes[norm]) == 3:
            return (MapLayer(norm, "tokens", int(getattr(model, "num_prefix_tokens", 0))),)
    sides = {}
    for module, shape in shapes.items():
        if len(shape) == 4 and (shape[2] == shape[3] or shape[1] == shape[2]):
            is_first = shape[2] == shape[3]
            sides[MapLayer(module, "channels_first" if is_first else "channels_last")] = shape[2]
    if not sides:
        raise Refused(f"{name} has no layer that shows where it looks; explain another network")
    last = list(sides)[-1]
    fine = [layer for layer, side in sides.items() if side >= size // FINE > sides[last]]
    return (last, *fine[-1:])


def _shapes(model: nn.Module, size: int) -> dict[str, torch.Size]:
    """Shapes of the outputs of all modules with several places, in the order in which they finish."""
    shapes: dict[str, torch.Size] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if name and isinstance(output, Tensor) and output.dim() in (3, 4) and min(output.shape[1:]) > 1:
                shapes.pop(name, None)
                shapes[name] = output.shape

        return note

    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        for one in hooks:
            one.remove()
    return shapes
