"""Batches: one seed fixes order and augmentation, and preprocessing is what its name says."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop, functional

from finetune101.config import AugmentConfig, Preprocessing
from finetune101.data.batches import (
    augment,
    batches_of,
    draw_boxes,
    eval_batches,
    mix,
    read_pixels,
    share_of,
    step_count,
    to_input,
    train_batches,
)
from finetune101.data.cache import Images, open_images
from finetune101.data.decode import FILTERS, decode
from finetune101.data.images import index_images
from finetune101.machine import World

WORLD = World(torch.device("cpu"), "fp32", channels_last=False)
CROP = AugmentConfig(crop_scale=0.3)
PLAIN = AugmentConfig(flip=False)
STRONG = AugmentConfig(crop_scale=0.3, policy="trivial", erasing=0.5)
SHAPE = Preprocessing(
    size=24, cache_size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)


@pytest.fixture(scope="module")
def images(tiny_data: Path) -> Images:
    return open_images(index_images(tiny_data), SHAPE)


def stream(
    images: Images, epochs: Iterable[int], config: AugmentConfig = CROP, seed: int = 0, world: World = WORLD
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The training batches of ``epochs``; the label of an image is its place in the data set."""
    paths, labels, sizes = images.paths, list(range(len(images.paths))), {99: 32}
    numbers = ((number, sizes.get(number)) for number in epochs)
    return train_batches(images, paths, labels, batch_size=8, config=config, world=world, seed=seed, epochs=numbers)


def epoch(images: Images, config: AugmentConfig = CROP, seed: int = 0, epoch: int = 1) -> tuple[Tensor, Tensor]:
    """A whole epoch of training batches."""
    batches = list(stream(images, [epoch], config, seed))
    assert [len(y) for _, y, _ in batches] == [8, 8, 8, 8, 4]
    return torch.cat([x for x, _, _ in batches]), torch.cat([y for _, y, _ in batches])


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[bool, bool]:
    """Whether (images, order) agree."""
    return torch.equal(a[0], b[0]), torch.equal(a[1], b[1])


def test_every_image_comes_once_an_epoch(images: Images) -> None:
    x, y = epoch(images)
    assert x.shape == (36, 3, 24, 24) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert sorted(y.tolist()) == list(range(36))


@pytest.mark.parametrize("config", [CROP, AugmentConfig(), PLAIN, STRONG], ids=["crop", "flip", "plain", "strong"])
def test_seed_and_epoch_fix_everything(images: Images, config: AugmentConfig) -> None:
    first = epoch(images, config)
    torch.rand(7)  # the global random state plays no part
    assert same(epoch(images, config), first) == (True, True)
    for other in (epoch(images, config, seed=1), epoch(images, config, epoch=2)):
        assert same(other, first) == (False, False)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on, of any process with threads
def test_workers_make_the_same_batches(images: Images) -> None:
    alone, helped = (list(stream(images, [1, 99], STRONG, world=replace(WORLD, workers=n))) for n in (0, 2))
    assert [x.shape[-1] for x, _, _ in helped] == [24] * 5 + [32] * 5
    assert all(same(a[:2], b[:2]) == (True, True) and a[2] == b[2] for a, b in zip(alone, helped, strict=True))


def test_without_a_cache_no_worker_is_forked(images: Images) -> None:
    uncached = Images(images.root, images.paths, images.preprocessing)
    read_pixels(uncached, images.paths[:2])  # its threads are running: a fork would wait for them for ever
    by_workers, by_one = (list(stream(one, [1], PLAIN, world=replace(WORLD, workers=2))) for one in (uncached, images))
    assert all(same(a[:2], b[:2]) == (True, True) for a, b in zip(by_workers, by_one, strict=True))


def test_drawing_leaves_every_global_generator_alone(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` seeds every GPU's generator, where dropout draws; ``fork_rng`` restores the CPU's only."""
    for name in ("manual_seed", "seed"):
        monkeypatch.setattr(torch, name, lambda *_: pytest.fail("a generator of every device was seeded"))
        monkeypatch.setattr(torch.random, name, lambda *_: pytest.fail("a generator of every device was seeded"))
    before = torch.get_rng_state()
    x, _ = epoch(images, replace(STRONG, mix=1.0))
    mix(x, torch.arange(len(x)), 36, 1.0, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_boxes_are_those_that_torchvision_draws_after_its_seed() -> None:
    """The numbers of earlier versions, so that a run can be trained again."""
    boxes, _ = draw_boxes(6, 50, CROP, torch.Generator().manual_seed(3))
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        crop, image = RandomResizedCrop(50, scale=(0.3, 1.0)), torch.empty(3, 50, 50)
        assert boxes == [tuple(crop.make_params([image]).values()) for _ in range(6)]


GEOMETRIES = [(40, 100, 40), (40, 40, 40), (100, 100, 40), (40, 100, 64), (64, 48, 80)]
"""Sizes in pixels: the network's input, the decoded images', the training images'."""


def grey(folder: Path, size: int, cache_size: int) -> Images:
    """Eight grey images of one value, which preprocessing leaves as they are."""
    (folder / "a").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(np.full((cache_size, cache_size, 3), 200, np.uint8)).save(folder / f"a/{i}.png")
    shape = Preprocessing(size=size, cache_size=cache_size, mean=(0,) * 3, std=(1,) * 3, interpolation="bilinear")
    return Images(folder, [f"a/{i}.png" for i in range(8)], shape)


@pytest.mark.parametrize("crop", [1.0, 0.5])
@pytest.mark.parametrize(("size", "cache_size", "train_size"), GEOMETRIES)
def test_erasing_paints_what_the_network_sees(
    tmp_path: Path, size: int, cache_size: int, train_size: int, crop: float
) -> None:
    """A box has 2 to 33 % of the image: 17.5 % on average, whatever the sizes, spread over the image."""
    images, count = grey(tmp_path, size, cache_size), 24
    numbers = ((number, train_size) for number in range(1, count + 1))
    config = AugmentConfig(crop_scale=crop, erasing=1.0)
    batches = train_batches(
        images, images.paths, [0] * 8, batch_size=8, config=config, world=WORLD, seed=0, epochs=numbers
    )
    x = torch.cat([x for x, _, _ in batches])
    assert x.shape == (8 * count, 3, train_size, train_size)
    holes = (x[:, 0] < 0.5).float()
    assert holes.flatten(1).any(1).all()
    assert float(holes.mean()) == pytest.approx(0.175, abs=0.02)
    assert float(holes.mean((1, 2)).min()) > 0.01 and float(holes.mean((1, 2)).max()) < 0.35  # sides are rounded
    half = train_size // 2
    corners = [float(holes[:, top : top + half, left : left + half].mean()) for top in (0, half) for left in (0, half)]
    assert max(corners) - min(corners) < 0.08  # the standard error of each is about .015


@pytest.mark.parametrize(("size", "cache_size", "train_size"), GEOMETRIES)
@pytest.mark.parametrize("crop", [1.0, 0.999999])
def test_a_shift_is_in_pixels_of_what_the_network_sees(
    tmp_path: Path, size: int, cache_size: int, train_size: int, crop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TrivialAugment's largest shift is 32 pixels; the place that it uncovers has the colour of the mean, black."""
    monkeypatch.setattr("finetune101.data.augment.OPERATIONS", ("TranslateX",))
    images = grey(tmp_path, size, cache_size)
    config = AugmentConfig(crop_scale=crop, policy="trivial", flip=True)
    numbers = ((number, train_size) for number in range(1, 31))
    batches = train_batches(
        images, images.paths, [0] * 8, batch_size=8, config=config, world=WORLD, seed=0, epochs=numbers
    )
    uncovered = torch.cat([(x[:, 0] < 0.5).all(1).sum(1) for x, _, _ in batches])  # columns of each image
    assert int(uncovered.max()) == min(32, train_size)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17])
def test_no_batch_is_a_single_image(count: int) -> None:
    for batch_size in (2, 4, 8):
        order = torch.arange(count)
        parts = batches_of(order, batch_size)
        assert torch.equal(torch.cat(parts), order)  # each image once
        assert len(parts) == step_count(count, batch_size)
        assert count == 1 or min(len(part) for part in parts) >= 2
        assert max(len(part) for part in parts) <= batch_size + 1
    assert [len(part) for part in batches_of(torch.arange(3), 1)] == [1, 1, 1]  # as asked for


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8])
def test_every_process_has_two_images_of_which_its_own_count(processes: int) -> None:
    for count in (2, 3, 8, 9, 17):
        shares = [share_of(count, replace(WORLD, rank=rank, size=processes)) for rank in range(processes)]
        assert min(len(share) for share in shares) >= 2
        assert all(len(set(share)) == len(share) for share in shares)
        counted = [share[: len(range(rank, count, processes))] for rank, share in enumerate(shares)]
        assert sorted(place for share in counted for place in share) == list(range(count))
    assert [share_of(1, replace(WORLD, rank=rank, size=2)) for rank in (0, 1)] == [[0], [0]]


def test_labels_belong_to_their_images(images: Images) -> None:
    x, y = epoch(images, PLAIN)
    plain = to_input(read_pixels(images, images.paths), SHAPE, WORLD)
    torch.testing.assert_close(x, plain[y], rtol=0, atol=0)


def test_flips_mirror_about_half(images: Images) -> None:
    x, y = epoch(images, AugmentConfig())
    plain = to_input(read_pixels(images, images.paths), SHAPE, WORLD)[y]
    straight = (x == plain).flatten(1).all(1)
    mirrored = (x == to_input(read_pixels(images, images.paths).flip(-1), SHAPE, WORLD)[y]).flatten(1).all(1)
    assert (straight ^ mirrored).all() and 8 < int(mirrored.sum()) < 28


def test_crops_keep_their_share_of_the_image() -> None:
    """On a ramp, the range of values that a crop shows is the share of the width that it keeps."""
    ramp = torch.arange(0, 200, 2, dtype=torch.uint8).expand(64, 3, 100, 100).contiguous()
    config = AugmentConfig(flip=False, crop_scale=0.25)
    out = augment(ramp, *draw_boxes(64, 100, config, torch.Generator().manual_seed(0)), 40)
    assert out.shape == (64, 3, 40, 40) and out.dtype == torch.uint8
    contrasts = (out.amax((1, 2, 3)).float() - out.amin((1, 2, 3)).float()) / 198
    # a quarter of the area at a ratio of 3:4 to 4:3 is at least .43 of the width
    assert 0.38 < contrasts.min() < 0.7 and 0.85 < contrasts.max() <= 1


def test_without_augmentation_pixels_stay_as_they_are() -> None:
    pixels = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment(pixels, *draw_boxes(5, 16, PLAIN, torch.Generator()), 8), pixels, rtol=0, atol=0)


def test_evaluation_batches_are_in_order(images: Images, tiny_data: Path) -> None:
    paths = images.paths[::5]
    batches = list(eval_batches(images, paths, list(range(len(paths))), batch_size=3, world=WORLD))
    assert [len(y) for _, y in batches] == [3, 3, 2]
    assert torch.cat([y for _, y in batches]).tolist() == list(range(8))
    x = torch.cat([x for x, _ in batches])
    for path, image in zip(paths, x, strict=True):
        pixels = torch.from_numpy(decode(tiny_data / path, 32, "bilinear").copy()).permute(2, 0, 1)[None]
        torch.testing.assert_close(image, to_input(pixels, SHAPE, WORLD)[0], rtol=0, atol=0)


def test_to_input_is_resize_and_standardise() -> None:
    pixels = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = to_input(pixels, SHAPE, WORLD)
    mean, std = torch.tensor(SHAPE.mean).view(3, 1, 1), torch.tensor(SHAPE.std).view(3, 1, 1)
    torch.testing.assert_close(x, (pixels / 255 - mean) / std)
    flat = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    torch.testing.assert_close(to_input(flat, SHAPE, WORLD), ((128 / 255 - mean) / std).expand(1, 3, 24, 24))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_larger_images_are_resized_as_the_preprocessing_says(interpolation: str) -> None:
    """By the filter that decodes them: sampled down by a whole factor, both agree with Pillow's to a rounding."""
    pixels = torch.randint(256, (48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shape = replace(SHAPE, cache_size=48, interpolation=interpolation)
    x = to_input(pixels.permute(2, 0, 1)[None], shape, WORLD)
    expected = Image.fromarray(pixels.numpy()).resize((24, 24), FILTERS[interpolation])
    values = torch.from_numpy(np.array(expected)).permute(2, 0, 1)[None]
    difference = (x - to_input(values, SHAPE, WORLD)).abs() * torch.tensor(SHAPE.std).view(3, 1, 1) * 255
    assert difference.max() < 1.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_resized_as_torchvision_does(interpolation: str) -> None:
    rows = torch.randint(256, (4, 60, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = rows.permute(0, 3, 1, 2)
    boxes = [(0, 0, 60, 60), (3, 5, 40, 31), (0, 0, 60, 20), (10, 0, 24, 60)]
    for size in (24, 60, 80):
        cut = augment(pixels, boxes, torch.zeros(4, dtype=torch.bool), size, interpolation)
        for one, image, box in zip(cut, pixels, boxes, strict=True):
            mode = InterpolationMode(interpolation)
            assert torch.equal(one, functional.resized_crop(image[None], *box, [size, size], mode)[0])


def test_to_input_changes_no_pixel_of_its_own(images: Images) -> None:
    before = images.read(images.paths[:4]).copy()
    to_input(read_pixels(images, images.paths[:4]), SHAPE, WORLD)
    assert (images.read(images.paths[:4]) == before).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [24, 32])
def test_the_memory_format_is_that_of_the_world(images: Images, channels_last: bool, size: int) -> None:
    world = World(torch.device("cpu"), "fp32", channels_last)
    shape = Preprocessing(size=size, cache_size=32, mean=SHAPE.mean, std=SHAPE.std, interpolation="bilinear")
    x = to_input(read_pixels(images, images.paths[:4]), shape, world)
    assert x.shape == (4, 3, size, size) and x.is_contiguous(memory_format=world.memory_format)
    torch.testing.assert_close(x, to_input(read_pixels(images, images.paths[:4]), shape, WORLD), rtol=0, atol=0)


def test_mixed_images_carry_the_shares_of_their_classes() -> None:
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    y, kinds = torch.arange(6), set()
    before = torch.random.get_rng_state()
    for seed in range(40):
        mixed, shares = mix(x, y, 6, 1.0, seed)
        torch.testing.assert_close(shares.sum(1), torch.ones(6))
        # each image's value is its class, so the mean value of a mixed one is the mean of its classes
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(6.0))
        kinds.add("cut" if torch.equal(mixed, mixed.round()) else "up")
        assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert kinds == {"cut", "up"}
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = torch.cat([mix(x, y, 6, 1.0, seed, mixup_alpha=1.0)[1].flatten() for seed in range(200)])
    inside = weights[(weights > 0) & (weights < 1)]
    counts = torch.histc(inside, 4, 0, 1)
    assert len(inside) == 200 * 12 and float(counts.min() / counts.max()) > 0.5  # MixUp alone, all shares as likely
    same = mix(x, y, 6, 0.0, 0)
    assert torch.equal(same[0], x) and torch.equal(same[1], y)
    changed = sum(mix(x, y, 6, 0.3, seed)[1].dim() == 2 for seed in range(400))
    assert 80 < changed < 160
    part = mix(x[:4], y[:4], 6, 1.0, 7)[1].max(1).values  # another process's share of the batch
    assert torch.allclose(part.max(), mix(x, y, 6, 1.0, 7)[1].max())
