"""Strong augmentation of a whole batch: one call for each operation, not for each image, so that a GPU can do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune101.config import AugmentConfig

Boxes = list[tuple[int, int, int, int]]  # top, left, height, width

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""The operations of TrivialAugment (Müller & Hutter, 2021), with torchvision's names."""
_STEPS = 30  # magnitudes from 0 to 1, besides 0


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Seeds the CPU's global generator, from which torchvision draws, and restores its state afterwards.

    ``torch.manual_seed`` would also seed the generators of every GPU, from which dropout draws.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@dataclass(frozen=True)
class Distortions:
    """How each image of a batch is changed; an empty list changes no image."""

    kinds: list[int]
    """For each image, the index of its operation in ``OPERATIONS``."""
    strengths: list[float]
    """For each image, -1 to 1 as a share of the strongest change; operations without a sign use the absolute value."""
    holes: Boxes
    """For each image, the box that is painted over; a box of height 0 is none."""

    def of(self, places: Sequence[int]) -> Distortions:
        """The distortions of the images at ``places``."""

        def at_places(values: list[Any]) -> list[Any]:
            return [values[i] for i in places] if values else []

        return Distortions(at_places(self.kinds), at_places(self.strengths), at_places(self.holes))


def draw_distortions(count: int, size: int, config: AugmentConfig, generator: torch.Generator) -> Distortions:
    """For ``count`` images of ``size`` x ``size`` pixels: random operations (TrivialAugment) and boxes.

    Boxes as in random erasing (Zhong et al., 2020): area from .02 to .33, aspect from 1/3.3 to 3.3.
    """
    kinds, strengths, holes = [], [], []
    if config.policy == "trivial":
        kinds = torch.randint(len(OPERATIONS), (count,), generator=generator).tolist()
        steps = torch.randint(_STEPS + 1, (count,), generator=generator) / _STEPS
        strengths = (steps * (1 - 2 * torch.randint(2, (count,), generator=generator))).tolist()
    if config.erasing > 0:
        erased = (torch.rand(count, generator=generator) < config.erasing).tolist()
        from torchvision.transforms.v2 import RandomErasing  # here: it loads PyTorch's compiler

        with drawing(int(torch.randint(2**62, (1,), generator=generator))):
            make, image = RandomErasing(1.0).make_params, torch.empty(3, size, size)
            boxes: list[dict[str, Any]] = [make([image]) if erase else {"v": None} for erase in erased]
        # without a value to paint with, torchvision found no box that fits
        holes = [(0, 0, 0, 0) if box["v"] is None else (box["i"], box["j"], box["h"], box["w"]) for box in boxes]
    return Distortions(kinds, strengths, holes)


def distort(pixels: Tensor, drawn: Distortions, fill: Sequence[int]) -> Tensor:
    """uint8 (N, 3, size, size): each image changed and painted over; ``fill`` (RGB, 0 to 255) fills empty places."""
    if drawn.kinds:
        kinds = torch.tensor(drawn.kinds)
        order = kinds.argsort(stable=True)
        amounts = torch.tensor(drawn.strengths)[order].to(pixels.device).view(-1, 1, 1, 1)
        parts = pixels[order.to(pixels.device)].split(kinds.bincount(minlength=len(OPERATIONS)).tolist())
        changed, start = [], 0
        for name, part in zip(OPERATIONS, parts, strict=True):
            if len(part):
                changed.append(_CHANGES[name](part, amounts[start : start + len(part)], fill))
            start += len(part)
        pixels = torch.cat(changed)[order.argsort().to(pixels.device)]
    if any(height for _, _, height, _ in drawn.holes):
        colour = torch.tensor(fill, dtype=torch.uint8, device=pixels.device).view(3, 1, 1)
        pixels = pixels.clone()
        for image, (top, left, height, width) in zip(pixels, drawn.holes, strict=True):
            if height:
                image[:, top : top + height, left : left + width] = colour
    return pixels


Change = Callable[[Tensor, Tensor, Sequence[int]], Tensor]  # uint8 (N, 3, size, size), (N, 1, 1, 1), fill -> uint8


def _moved(places: Sequence[tuple[int, int]], values: Callable[[Tensor, int], Sequence[Tensor]]) -> Change:
    """An affine map; its 2 x 3 matrix is the identity, except for ``values(strengths, size)`` at ``places``.

    The map leads from output to input coordinates; both are -1 and 1 at the images' borders.
    """

    def change(pixels: Tensor, amounts: Tensor, fill: Sequence[int]) -> Tensor:
        theta = torch.eye(2, 3, device=pixels.device).repeat(len(pixels), 1, 1)
        for (row, column), value in zip(places, values(amounts.flatten(), pixels.shape[-1]), strict=True):
            theta[:, row, column] = value
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        colour = torch.tensor(fill, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
        # grid_sample pads with 0: subtract the fill colour before and add it after
        moved = F.grid_sample(pixels.float() - colour, grid, align_corners=False) + colour
        return moved.round_().clamp_(0, 255).to(torch.uint8)

    return change


def _turned(amounts: Tensor, _: int) -> Sequence[Tensor]:
    angle = torch.deg2rad(135 * amounts)
    return angle.cos(), -angle.sin(), angle.sin(), angle.cos()


def _shift(amounts: Tensor, size: int) -> Tensor:
    return -(32 * amounts).trunc() * 2 / size


def _blended(other: Callable[[Tensor], Tensor]) -> Change:
    """Away from ``other(images)``, or towards it, by up to .99 of the way."""

    def change(pixels: Tensor, amounts: Tensor, _: Sequence[int]) -> Tensor:
        base = other(pixels).float()
        return torch.lerp(base, pixels.float(), 1 + 0.99 * amounts).clamp_(0, 255).to(torch.uint8)

    return change


def _by_torchvision(name: str) -> Callable[[Tensor], Tensor]:
    """The function ``name`` of torchvision.transforms.v2, which is imported at its first call."""

    def change(pixels: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional

        result: Tensor = getattr(functional, name)(pixels)
        return result

    return change


_grey = _by_torchvision("rgb_to_grayscale")
_autocontrast, _equalize = _by_torchvision("autocontrast"), _by_torchvision("equalize")


def _mean_grey(pixels: Tensor) -> Tensor:
    return _grey(pixels).float().mean((1, 2, 3), keepdim=True)


def _smooth(pixels: Tensor) -> Tensor:
    """Averages over 3 x 3 pixels, in which the middle pixel has weight 5 of 13; the border stays."""
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    result = pixels.float()
    result[..., 1:-1, 1:-1] = F.conv2d(pixels.float(), kernel / 13, groups=3).round_()
    return result


def _posterized(pixels: Tensor, amounts: Tensor, _: Sequence[int]) -> Tensor:
    dropped = (6 * amounts.abs()).round()  # bits
    return pixels & (256 - 2**dropped).to(torch.uint8)


def _solarized(pixels: Tensor, amounts: Tensor, _: Sequence[int]) -> Tensor:
    return torch.where(pixels >= 255 * (1 - amounts.abs()), 255 - pixels, pixels)


_CHANGES: dict[str, Change] = {
    "Identity": lambda pixels, amounts, fill: pixels,
    "ShearX": _moved([(0, 1), (0, 2)], lambda amounts, size: (0.99 * amounts, 0.99 * amounts)),
    "ShearY": _moved([(1, 0), (1, 2)], lambda amounts, size: (0.99 * amounts, 0.99 * amounts)),
    "TranslateX": _moved([(0, 2)], lambda amounts, size: (_shift(amounts, size),)),
    "TranslateY": _moved([(1, 2)], lambda amounts, size: (_shift(amounts, size),)),
    "Rotate": _moved([(0, 0), (0, 1), (1, 0), (1, 1)], _turned),
    "Brightness": _blended(torch.zeros_like),
    "Color": _blended(_grey),
    "Contrast": _blended(_mean_grey),
    "Sharpness": _blended(_smooth),
    "Posterize": _posterized,
    "Solarize": _solarized,
    "AutoContrast": lambda pixels, amounts, fill: _autocontrast(pixels),
    "Equalize": lambda pixels, amounts, fill: _equalize(pixels),
}
