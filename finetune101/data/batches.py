"""Batches on the device: order, augmentation and preprocessing, all fixed by one seed."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from finetune101.config import AugmentConfig, Preprocessing
from finetune101.data.augment import Boxes, Distortions, distort, draw_distortions, drawing
from finetune101.data.cache import Images
from finetune101.machine import World

ARM = ("aarch64", "arm64")


def to_input(pixels: Tensor, preprocessing: Preprocessing, world: World) -> Tensor:
    """uint8 (N, 3, h, w) -> standardised float32 (N, 3, size, size) on the device, in the world's memory format."""
    pixels = resized(pixels.to(world.device, non_blocking=True), preprocessing)
    x = pixels.to(torch.float32, memory_format=world.memory_format)
    mean = torch.tensor(preprocessing.mean, device=x.device) * 255
    std = torch.tensor(preprocessing.std, device=x.device) * 255
    if x.is_contiguous(memory_format=torch.channels_last):  # whole rows at a time: three times as fast as by channel
        height, width = x.shape[2:]
        x.permute(0, 2, 3, 1).view(-1, height, 3 * width).sub_(mean.repeat(width)).div_(std.repeat(width))
        return x.contiguous(memory_format=world.memory_format)
    return x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1)).contiguous(memory_format=world.memory_format)


def resized(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (N, 3, h, w) -> (N, 3, size, size), by the preprocessing's filter."""
    if pixels.shape[-1] == preprocessing.size:
        return pixels
    return _resize(pixels, preprocessing.size, preprocessing.interpolation)


def _resize(pixels: Tensor, size: int, interpolation: str) -> Tensor:
    """uint8 (N, 3, h, w) -> (N, 3, size, size): what ``resize`` of torchvision.transforms.v2 computes.

    Importing that loads PyTorch's compiler, which takes two seconds.
    """
    if pixels.shape[2:] == (size, size):
        return pixels
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ARM
    takes_bytes = pixels.device.type == "cpu" and (interpolation == "bicubic" or vectors)
    values = pixels if takes_bytes else pixels.float()
    result = F.interpolate(values, [size, size], mode=interpolation, align_corners=False, antialias=True)
    return result if takes_bytes else result.clamp_(0, 255).round_().to(torch.uint8)


def draw_boxes(count: int, side: int, config: AugmentConfig, generator: torch.Generator) -> tuple[Boxes, Tensor]:
    """For ``count`` images of ``side`` x ``side`` pixels: the box of each that is kept, and whether it is mirrored.

    Boxes as in random resized crops (Szegedy et al., 2015): area from ``crop_scale`` to 1, aspect from 3/4 to 4/3.
    """
    boxes: Boxes = [(0, 0, side, side)] * count
    if config.crop_scale < 1:
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        boxes = [_draw_box(side, config.crop_scale, own) for _ in range(count)]
    mirrored = torch.rand(count, generator=generator) < 0.5 if config.flip else torch.zeros(count, dtype=torch.bool)
    return boxes, mirrored


def _draw_box(side: int, smallest: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """A box of ``side`` x ``side`` pixels with at least the share ``smallest`` of them.

    The same numbers as ``RandomResizedCrop`` of torchvision.transforms.v2 draws.
    """
    low, high = torch.log(torch.tensor([3 / 4, 4 / 3])).tolist()
    for _ in range(10):
        area = side * side * torch.empty(1).uniform_(smallest, 1.0, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= side and 0 < height <= side:
            top, left = (int(torch.randint(side - n + 1, (1,), generator=generator)) for n in (height, width))
            return top, left, height, width
    return 0, 0, side, side


def augment(pixels: Tensor, boxes: Boxes, mirrored: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """uint8 (N, 3, side, side): each image's box as (N, 3, size, size), mirrored where it should be.

    Where every box is the whole image, its size stays.
    """
    side = pixels.shape[-1]
    if any(box != (0, 0, side, side) for box in boxes):
        parts = zip(pixels.split(1), boxes, strict=True)
        pixels = torch.cat(
            [
                _resize(one[:, :, y : y + height, x : x + width], size, interpolation)
                for one, (y, x, height, width) in parts
            ]
        )
    if not mirrored.any():
        return pixels
    rows = pixels.permute(0, 2, 3, 1)  # as they lie in memory
    result = torch.empty_like(rows)
    for out, image, turn in zip(result, rows, mirrored.tolist(), strict=True):
        out.copy_(image.flip(1) if turn else image)
    return result.permute(0, 3, 1, 2)


def mix(
    x: Tensor, y: Tensor, classes: int, share: float, seed: int, mixup_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """(N, 3, h, w), int64 (N,) -> images mixed in pairs and their shares of ``classes`` (N, classes), or unchanged.

    One batch in ``share``, half by MixUp (alpha .2, Zhang et al., 2018), half by CutMix (Yun et al., 2019); all by
    MixUp with ``mixup_alpha``. ``seed`` decides everything, in all processes alike; images are mixed with images of
    the same process.
    """
    from torchvision.transforms.v2 import CutMix, MixUp  # here: it loads PyTorch's compiler

    if len(x) < 2:
        return x, y
    with drawing(seed):
        mixes, by_adding = (torch.rand(2) < torch.tensor([share, 0.5])).tolist()
        if not mixes:
            return x, y
        if by_adding or mixup_alpha:
            mixed, shares = MixUp(alpha=mixup_alpha or 0.2, num_classes=classes)(x, y)
        else:
            mixed, shares = CutMix(num_classes=classes)(x, y)
    return mixed.contiguous(memory_format=_layout(x)), shares


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def read_pixels(images: Images, paths: Sequence[str]) -> Tensor:
    """uint8 (N, 3, h, w), a channels_last view of the decoded pixels."""
    return torch.from_numpy(images.read(paths)).permute(0, 3, 1, 2)


def epoch_order(count: int, seed: int, epoch: int) -> tuple[Tensor, torch.Generator]:
    """Random order of ``count`` images, int64 (count,), and the generator for everything else random in the epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator), generator


def batches_of(order: Tensor, batch_size: int) -> list[Tensor]:
    """``order`` in batches of ``batch_size``. One image that is left over joins the batch before it.

    A single image has no variance for a batch norm, and its gradient would weigh as much as that of a whole batch.
    """
    parts = list(order.split(batch_size))
    if batch_size > 1 and len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def step_count(images: int, batch_size: int) -> int:
    """Batches of an epoch of ``images``, as ``batches_of`` makes them."""
    alone = batch_size > 1 and images > batch_size and images % batch_size == 1
    return -(-images // batch_size) - alone


def share_of(count: int, world: World) -> list[int]:
    """Places of the process's images in a batch of ``count``: its own, then more where it has fewer than two.

    Those fill up what a batch norm needs, and are not to be counted: they belong to other processes.
    """
    own = list(range(count))[world.share(count)]
    if len(own) >= 2:
        return own
    more = [(world.rank + i) % count for i in range(count)]
    return (own + [place for place in more if place not in own])[: max(2, len(own))]


@dataclass(frozen=True)
class Plan:
    """The random choices of one batch; every process makes the same batch from it."""

    chosen: list[int]
    """Indices of the images in the epoch's list of paths."""
    count: int
    """Number of images of the batch, in all processes together."""
    boxes: Boxes
    mirrored: Tensor
    distortions: Distortions
    size: int


class _PlannedBatches(Dataset[tuple[Tensor, Tensor, Plan]]):
    """Plan -> (uint8 (N, 3, h, w), int64 (N,), the plan)."""

    def __init__(self, images: Images, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.images, self.paths, self.labels = images, paths, labels

    def __getitem__(self, plan: Plan) -> tuple[Tensor, Tensor, Plan]:
        preprocessing = self.images.preprocessing
        pixels = read_pixels(self.images, [self.paths[i] for i in plan.chosen])
        pixels = augment(pixels, plan.boxes, plan.mirrored, plan.size, preprocessing.interpolation)
        return pixels, torch.tensor([self.labels[i] for i in plan.chosen]), plan


def train_batches(
    images: Images,
    paths: Sequence[str],
    labels: Sequence[int],
    *,
    batch_size: int,
    config: AugmentConfig,
    world: World,
    seed: int,
    epochs: Iterable[tuple[int, int | None]],
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Batches of one epoch after the other: (float (N, 3, size, size), int64 (N,), images in all processes).

    ``epochs`` holds each one's number and the size of its training images, None for that of the preprocessing. (seed,
    number) fixes order and augmentation, whatever the number of processes. A process with fewer than two images of a
    batch gets others of it behind its own, which are not to be counted (see ``share_of``). On a GPU ``world.workers``
    processes prepare the next batches meanwhile, where the images are cached.
    """
    own = images.preprocessing

    def plans() -> Iterator[Plan]:
        for number, size in epochs:
            order, generator = epoch_order(len(paths), seed, number)
            for chosen in (part.tolist() for part in batches_of(order, batch_size)):
                boxes, mirrored = draw_boxes(len(chosen), own.cache_size, config, generator)
                drawn = draw_distortions(len(chosen), size or own.size, config, generator)
                share = share_of(len(chosen), world)
                yield Plan(
                    chosen=[chosen[i] for i in share],
                    count=len(chosen),
                    boxes=[boxes[i] for i in share],
                    mirrored=mirrored[share],
                    distortions=drawn.of(share),
                    size=size or own.size,
                )

    batches, fast = _PlannedBatches(images, paths, labels), world.device.type == "cuda"
    fill = [round(255 * value) for value in own.mean]
    loader: Iterable[tuple[Tensor, Tensor, Plan]] = map(batches.__getitem__, plans())
    if world.workers and images.pixels is not None:  # a forked process would lack the threads that decode
        own_seed = torch.Generator()  # the loader's; drawn from the global one, it would change dropout
        loader = DataLoader(
            batches, batch_size=None, sampler=plans(), num_workers=world.workers, pin_memory=fast, generator=own_seed,
            multiprocessing_context="fork",
        )  # fmt: skip
    for pixels, y, plan in loader:
        shape = replace(own, size=plan.size)
        pixels = resized(pixels.to(world.device, non_blocking=fast), shape)  # first: distortions count its pixels
        pixels = distort(pixels, plan.distortions, fill)
        yield to_input(pixels, shape, world), y.to(world.device, non_blocking=fast), plan.count


def eval_batches(
    images: Images, paths: Sequence[str], labels: Sequence[int], *, batch_size: int, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in order, without augmentation: (float (N, 3, size, size), int64 (N,))."""
    for start in range(0, len(paths), batch_size):
        part = slice(start, start + batch_size)
        yield to_input(read_pixels(images, paths[part]), images.preprocessing, world), torch.tensor(labels[part])
