"""How long the runs of ``auto`` take on this machine: measured, each kind of run once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from finetune101.config import TrainConfig
from finetune101.data.images import Index
from finetune101.models.build import build
from finetune101.models.table import lookup
from finetune101.training import duration

FEW_IMAGES = 4  # of a forward pass by which networks are compared


@dataclass
class Speed:
    """The pace of runs on the images of ``index``, of which ``images`` are in each subset."""

    index: Index
    images: duration.Counts
    _paces: dict[str, duration.Pace] = field(init=False, default_factory=dict)
    _forward: dict[str, float] = field(init=False, default_factory=dict)

    def pace(self, config: TrainConfig) -> duration.Pace:
        """The pace of ``config``. Raises Refused for a network or a size that cannot be."""
        key = repr((config.model, config.augment.train_sizes, config.optim.batch_size, config.optim.epochs > 0))
        if key not in self._paces:
            with duration.undisturbed():
                self._paces[key] = duration.measure(config, len(self.index.classes))
        return self._paces[key]

    def run(self, config: TrainConfig) -> float:
        """Seconds of one run of ``config``, when the images are decoded and seen by the frozen network."""
        return self.pace(config).of(duration.Work(config, self.images))

    def preparation(self, config: TrainConfig) -> float:
        """Seconds of decoding the images and computing their frozen features, which several runs share."""
        model, own = config.model, lookup(config.model.name).preprocessing
        shape = replace(own, cache_size=model.cache_size or model.size or own.cache_size)
        seen = self.images.train + self.images.val
        return duration.decode_seconds(self.index, shape) * self.images.all + self.pace(config).features * seen

    def test(self, config: TrainConfig) -> float:
        """Seconds of the forward passes of a test."""
        return 1.5 * self.pace(config).forward * (self.images.test + self.images.val)

    def forward(self, name: str) -> float:
        """Seconds of a forward pass of the network ``name`` on a few images, to compare networks by."""
        if name not in self._forward:
            built = build(name, len(self.index.classes), pretrain=False)
            size = built.preprocessing.size
            x = torch.zeros(FEW_IMAGES, 3, size, size).contiguous(memory_format=torch.channels_last)
            model = built.model.eval().to(memory_format=torch.channels_last)
            tries = []
            with torch.no_grad():
                for _ in range(3):
                    began = time.perf_counter()
                    model(x)
                    tries.append(time.perf_counter() - began)
            self._forward[name] = min(tries)
        return self._forward[name]
