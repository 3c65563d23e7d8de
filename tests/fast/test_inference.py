"""Fused layers compute what the network computes, within rounding."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import timm
import torch
import torchvision
from torch import nn

from finetune101.config import SystemConfig
from finetune101.evaluation.forward import Forward
from finetune101.fast import fast_layers, fused_copy
from finetune101.fast.inference import FusedConv2d, fold_batch_norm, fuse
from finetune101.machine import detect

IMAGES = torch.randn(5, 3, 75, 64, generator=torch.Generator().manual_seed(0))
has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not has_bf16, reason="oneDNN has no bf16 on this processor")),
]
NETWORKS = ["tf_efficientnet_lite0", "resnet18", "mobilenet_v2", "alexnet", "squeezenet1_1", "efficientnet_b0"]


def network(name: str) -> nn.Module:
    """With batch norms as after some training."""
    torch.manual_seed(0)
    model = timm.create_model(name) if "lite" in name else torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 75, 64))
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_agree(name: str, dtype: torch.dtype) -> None:
    model = network(name)
    fused = fuse(copy.deepcopy(model), IMAGES[:1], dtype)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert sum(isinstance(module, FusedConv2d) for module in fused.modules()) == convolutions
    with torch.no_grad():
        exact, got = copy.deepcopy(model).double()(IMAGES.double()), fused(IMAGES.to(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            plain = model(IMAGES)
    factor, slack = (1.5, 0.01) if dtype == torch.bfloat16 else (2, 1e-4)
    centre = exact.mean(0)  # what all images share says nothing
    assert (got - exact).norm() < factor * (plain - exact).norm() + slack * (exact - centre).norm()


def test_folding_changes_no_output() -> None:
    model = network("tf_efficientnet_lite0")
    with torch.no_grad():
        before = model(IMAGES)
        assert len(fold_batch_norm(model, IMAGES[:1])) == 49
        torch.testing.assert_close(model(IMAGES), before, rtol=1e-3, atol=1e-3)


def test_a_norm_used_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.norm.running_mean.fill_(0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.b(self.norm(self.a(x))))

    model = Twice().eval()
    fused = fuse(copy.deepcopy(model), IMAGES[:1], torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(fused(IMAGES), model(IMAGES))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["nf_resnet26", "resnetv2_18"])
def test_layers_that_compute_something_else_are_left_alone(name: str, precision: Literal["fp32", "bf16"]) -> None:
    """Weight-standardised convolutions are convolutions by class, and norms may come first."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    x = IMAGES[:, :, :64, :64].contiguous(memory_format=torch.channels_last)
    world = detect(SystemConfig(device="cpu", precision=precision))
    with torch.no_grad(), world.autocast():
        exact, got = model(x).float(), Forward(model, world)(x)
    assert (got - exact).norm() < (0.1 if precision == "bf16" else 1e-3) * exact.norm()


def test_layers_made_fast_for_training_fuse_as_well() -> None:
    model = network("mobilenet_v2")
    before = fuse(copy.deepcopy(model), IMAGES[:1], torch.float32)
    fast_layers(model)
    after = fuse(model, IMAGES[:1], torch.float32)
    acts = [[m.act for m in one.modules() if isinstance(m, FusedConv2d)] for one in (before, after)]
    assert acts[0] == acts[1] and "hardtanh" in acts[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_known_networks_are_fused(name: str, dtype: torch.dtype) -> None:
    assert fused_copy(network(name), IMAGES.shape[1:], dtype) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_that_errs_is_not_used(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image in four, or the class of nearly equal outputs: what an error of the whole norm would let pass."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    ).eval()
    with torch.no_grad():
        model[4].bias += 100  # ten percent of the norm is much more than what tells the classes apart
    real = fuse

    class Wrong(nn.Module):
        def __init__(self, fused: nn.Module, swapped: slice) -> None:
            super().__init__()
            self.fused, self.swapped = fused, swapped

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = self.fused(x).float()
            output[self.swapped] += torch.tensor([5.0, -5.0, 5.0, -5.0])
            return output

    assert fused_copy(model, IMAGES.shape[1:], dtype) is not None
    for wrong in (slice(3, 4), slice(None)):
        monkeypatch.setattr("finetune101.fast.inference.fuse", lambda *a, wrong=wrong: Wrong(real(*a), wrong))
        assert fused_copy(model, IMAGES.shape[1:], dtype) is None
