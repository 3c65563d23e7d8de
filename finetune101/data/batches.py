"""Batches on the device: order, augmentation and preprocessing, all fixed by one seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from finetune101.config import AugmentConfig, Preprocessing
from finetune101.data.cache import Images
from finetune101.world import World


def to_input(pixels: Tensor, preprocessing: Preprocessing, world: World) -> Tensor:
    """uint8 (N, 3, h, w) -> standardised float32 (N, 3, size, size) on the device, in the world's memory format."""
    x = pixels.to(world.device, non_blocking=True).to(torch.float32, memory_format=world.memory_format)
    if x.shape[-1] != preprocessing.size:
        x = F.interpolate(x, preprocessing.size, mode="bilinear", antialias=True).round_()
    mean = torch.tensor(preprocessing.mean, device=x.device).view(3, 1, 1) * 255
    std = torch.tensor(preprocessing.std, device=x.device).view(3, 1, 1) * 255
    return x.sub_(mean).div_(std).contiguous(memory_format=world.memory_format)


def augment(pixels: Tensor, config: AugmentConfig, size: int, generator: torch.Generator) -> Tensor:
    """Random resized crops and flips of uint8 (N, 3, h, w); crops come out as (N, 3, size, size)."""
    if config.crop_scale < 1:
        # torchvision draws from the global generator; borrow it, seeded from ours
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            crop = RandomResizedCrop(size, scale=(config.crop_scale, 1.0), antialias=True)
            pixels = torch.stack([crop(image) for image in pixels])
    if config.flip:
        flipped = torch.rand(len(pixels), generator=generator) < 0.5
        pixels = torch.where(flipped.view(-1, 1, 1, 1), TF.horizontal_flip(pixels), pixels)
    return pixels


def read(images: Images, paths: Sequence[str]) -> Tensor:
    """uint8 (N, 3, h, w), a channels_last view of the decoded pixels."""
    return torch.from_numpy(images.read(paths)).permute(0, 3, 1, 2)


def train_batches(
    images: Images,
    paths: Sequence[str],
    labels: Sequence[int],
    *,
    batch_size: int,
    config: AugmentConfig,
    world: World,
    seed: int,
    epoch: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order: (float (N, 3, size, size), int64 (N,)); (seed, epoch) fixes order and augmentation."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(paths), generator=generator).tolist()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        pixels = augment(read(images, [paths[i] for i in chosen]), config, images.preprocessing.size, generator)
        y = torch.tensor([labels[i] for i in chosen]).to(world.device)
        yield to_input(pixels, images.preprocessing, world), y


def eval_batches(
    images: Images, paths: Sequence[str], labels: Sequence[int], *, batch_size: int, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in order, without augmentation: (float (N, 3, size, size), int64 (N,))."""
    for start in range(0, len(paths), batch_size):
        part = slice(start, start + batch_size)
        yield to_input(read(images, paths[part]), images.preprocessing, world), torch.tensor(labels[part])
