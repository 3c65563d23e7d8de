"""Networks of any architecture with random weights."""

from __future__ import annotations

import functools

import torch
from torch import nn

from finetune101.config import SystemConfig
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.machine import detect
from finetune101.models.build import build
from finetune101.models.table import lookup

CLASSES = ("ant", "bee", "cat")


def random_network(name: str, cache_size: int | None = None) -> TrainedNetwork:
    """The network ``name`` for three classes with random weights, as small as it can be."""
    size = None if lookup(name).fixed_size else 64
    built = build(name, len(CLASSES), pretrain=False, size=size, cache_size=cache_size, seed=3)
    model, layer, noise = built.model.eval(), built.output_layer, torch.Generator().manual_seed(1)
    assert isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None
    with torch.no_grad():  # an output layer whose logits differ by about 1 between images
        layer.weight.normal_(generator=noise)
        output = model(torch.randn(8, 3, *[built.preprocessing.size] * 2, generator=noise))
        spread = output.std(0).mean()
        layer.weight.div_(spread)
        if isinstance(layer, nn.Linear):
            layer.bias.copy_((layer.bias - output.mean(0)) / spread)
    return TrainedNetwork(
        model=model, preprocessing=built.preprocessing, classes=list(CLASSES),
        world=detect(SystemConfig(precision="fp32")), temperature=1.7, name="random", architecture=name,
    )  # fmt: skip


kept_network = functools.cache(random_network)
"""The same network for several tests."""
