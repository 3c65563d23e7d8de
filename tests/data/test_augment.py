"""Strong augmentation: the operations are torchvision's, for a batch at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

from finetune101.config import AugmentConfig
from finetune101.data.augment import OPERATIONS, Distortions, distort, draw_distortions

FILL = [10, 20, 200]
STRONG = AugmentConfig(policy="trivial", erasing=0.3)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Smooth random images, laid out as the trainer's are."""
    coarse = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 255
    fine = F.interpolate(coarse, 96, mode="bicubic").clamp(0, 255).to(torch.uint8)
    return fine.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str, pixels: Tensor) -> None:
    """Where an image is turned or sheared, its border is a blend of pixels and colour, which torchvision darkens."""
    policy = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=FILL)
    magnitudes, signed = policy._AUGMENTATION_SPACE[name]
    values = magnitudes(31, 96, 96)
    for step in (3, 10, 24, 30):
        for sign in (1, -1) if signed else (1,):
            amount = 0.0 if values is None else sign * float(values[step])
            how = (policy.interpolation, policy._fill)
            expected = policy._apply_image_or_video_transform(pixels, name, amount, *how)
            drawn = Distortions([OPERATIONS.index(name)] * 8, [sign * step / 30] * 8, [])
            differs = (distort(pixels, drawn, FILL).int() - expected.int()).abs().gt(1).float().mean()
            assert differs < (0.02 if name in ("Rotate", "ShearX", "ShearY") else 0.007), (step, sign)


def test_distortions_belong_to_an_image_not_to_its_batch(pixels: Tensor) -> None:
    drawn = draw_distortions(8, 96, STRONG, torch.Generator().manual_seed(1))
    changed = distort(pixels, drawn, FILL)
    assert changed.shape == pixels.shape and changed.dtype == torch.uint8
    assert torch.equal(distort(pixels[2:5], drawn.of([2, 3, 4]), FILL), changed[2:5])
    assert sum(not torch.equal(a, b) for a, b in zip(changed, pixels, strict=True)) >= 5


def test_every_operation_is_drawn_equally_often_and_to_both_sides() -> None:
    before = torch.random.get_rng_state()
    drawn = draw_distortions(14_000, 8, STRONG, torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    counts = torch.tensor(drawn.kinds).bincount(minlength=len(OPERATIONS))
    assert counts.min() > 880 and counts.max() < 1120  # four standard deviations about 1,000
    strengths = torch.tensor(drawn.strengths)
    assert strengths.min() == -1 and strengths.max() == 1 and abs(float(strengths.mean())) < 0.02


def test_the_share_of_erased_images_their_boxes_and_their_colour(pixels: Tensor) -> None:
    config = AugmentConfig(erasing=0.3)
    drawn = draw_distortions(400, 96, config, torch.Generator().manual_seed(0))
    areas = torch.tensor([height * width / 96**2 for _, _, height, width in drawn.holes])
    assert 0.2 < (areas > 0).float().mean() < 0.4
    assert areas[areas > 0].min() > 0.015 and areas.max() < 0.35
    images = pixels[:1].expand(400, -1, -1, -1)
    changed = (distort(images, drawn, FILL) != images).any(1)
    torch.testing.assert_close(changed.float().mean((1, 2)), areas, atol=0.01, rtol=0)
    first = int((areas > 0).nonzero()[0])
    colours = distort(images, drawn, FILL)[first][:, changed[first]]
    assert torch.equal(colours, torch.tensor(FILL, dtype=torch.uint8)[:, None].expand_as(colours))


def test_without_a_policy_nothing_happens(pixels: Tensor) -> None:
    none = replace(STRONG, policy="none", erasing=0.0)
    assert distort(pixels, draw_distortions(8, 96, none, torch.Generator()), FILL) is pixels
