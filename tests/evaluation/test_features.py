"""Features: the input of the output layer, beside the logits that prediction gives, kept for a data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune101.config import SystemConfig
from finetune101.data import store
from finetune101.data.cache import open_images
from finetune101.data.images import index_images
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.features import FeatureExtractor
from finetune101.machine import detect
from finetune101.models.build import build


def network(name: str, size: int | None = 64) -> TrainedNetwork:
    built = build(name, 3, pretrain=False, size=size)
    world = detect(SystemConfig(device="cpu"))
    return TrainedNetwork(
        model=built.model.eval(),
        preprocessing=built.preprocessing,
        classes=["a", "b", "c"],
        world=world,
        architecture=name,
    )


NAMES = ("alexnet", "resnet18", "mobilenet_v3_small", "squeezenet1_1", "convnext_tiny", "efficientnet_lite02")


@pytest.mark.parametrize("name", [*NAMES, "timm:convnext_atto", "timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_logits_are_those_of_prediction_and_come_from_the_features(name: str) -> None:
    trained = network(name, None if "vit" in name else 64)
    extract, size = FeatureExtractor(trained), trained.preprocessing.size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    features, logits = extract(x)
    assert torch.equal(logits, trained.forward()(x))
    assert features.shape == (2, extract.width) and features.isfinite().all() and features.std() > 0
    layer = trained.model.get_submodule(trained.head)
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            again = layer(features)
            assert torch.allclose(again, logits, atol=0.02 * float(logits.abs().max()) + 1e-3)
        else:  # SqueezeNet rectifies and pools behind its output layer
            assert extract.width == layer.in_channels == 512


def test_the_features_of_a_data_set_are_kept(tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path))
    trained, index = network("squeezenet1_1", 32), index_images(tiny_data)
    images, extract = open_images(index, trained.preprocessing), FeatureExtractor(trained)
    features, logits = extract.of_images(images, index.paths)
    assert features.shape == (len(index.paths), 512) and logits.shape == (len(index.paths), 3)
    assert [entry.kind for entry in store.cache_entries()].count("features") == 1

    def never(*_: object) -> None:
        raise AssertionError("it is computed again")

    monkeypatch.setattr("finetune101.evaluation.features._compute", never)
    again = extract.of_images(images, index.paths)
    assert torch.equal(features, again[0]) and torch.equal(logits, again[1])
