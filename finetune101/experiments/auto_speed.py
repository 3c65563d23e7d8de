"""How long the runs of ``auto`` take on this machine: measured, each kind of run once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from finetune101.config import SystemConfig, TrainConfig
from finetune101.data.images import Index
from finetune101.machine import detect, use_cores
from finetune101.models.build import build
from finetune101.models.table import lookup
from finetune101.training import duration

BATCH = 4  # images of a forward pass by which networks are compared
START = 6.0
"""Seconds of a worker process's start, and of a network's."""
VALIDATION = 1.0
"""Seconds that a validation takes before its first image."""
FASTEST = 0.6
"""A training step takes at least so many times a plain forward pass (two cores, bf16, our kernels: 0.85)."""


@dataclass
class Speed:
    """The pace of runs on the images of ``index``, of which ``images`` are in each subset."""

    index: Index
    images: duration.Counts
    system: SystemConfig
    share: float = 1.0
    """What a probe takes, as a share of what a few images foretell; measured by the first one."""
    beyond: float = 1.0
    """The same as a multiple of plain forward passes."""
    _paces: dict[str, duration.Pace] = field(init=False, default_factory=dict)
    _forward: dict[str, float] = field(init=False, default_factory=dict)

    def forward(self, name: str, size: int | None = None) -> float:
        """Seconds per image of a plain forward pass, which a validation or frozen features do not exceed."""
        own = lookup(name).preprocessing.size
        if name not in self._forward:
            with duration.undisturbed(), torch.no_grad():
                self._forward[name] = self._timed(name, own)
        return self._forward[name] * ((size or own) / own) ** 2

    def _timed(self, name: str, size: int) -> float:
        world = detect(self.system)
        use_cores(self.system.threads)
        model = build(name, len(self.index.classes), pretrain=False).model.eval().to(world.device)
        model = model.to(memory_format=world.memory_format)
        x = torch.zeros(BATCH, 3, size, size, device=world.device).contiguous(memory_format=world.memory_format)
        tries: list[float] = []
        with world.autocast():
            while len(tries) < 3 or (len(tries) < 10 and sum(tries) < 1):  # on a busy machine some take far longer
                began = time.perf_counter()
                model(x).sum().item()
                tries.append(time.perf_counter() - began)
        return min(tries) / BATCH

    def probe(self, config: TrainConfig) -> float:
        """Seconds of the probe ``config``: start, decoding, features, and the output layer."""
        return START + self.decoding(config) + self.share * self._solving(config)

    def least_probe(self, config: TrainConfig) -> float:
        """Seconds that the probe ``config`` takes at least; no feature is computed to know them."""
        return START + self.decoding(config) + self._passes(config)

    def guess_probe(self, config: TrainConfig) -> float:
        """``probe``, without computing a feature: by the first probe, and by plain forward passes."""
        return START + self.decoding(config) + self.beyond * self._passes(config)

    def _passes(self, config: TrainConfig) -> float:
        """Seconds of plain forward passes of the images that a probe sees."""
        return self.forward(config.model.name, config.model.size) * (self.images.train + self.images.val)

    def count(self, config: TrainConfig, seconds: float) -> None:
        """Takes notice of the ``seconds`` that the features and the output layer of the probe ``config`` took."""
        self.share = min(2.0, max(0.5, seconds / self._solving(config)))
        self.beyond = max(1.0, seconds / self._passes(config))

    def _solving(self, config: TrainConfig) -> float:
        """Seconds of frozen features and of the output layer on them."""
        key = repr(config.model)
        if key not in self._paces:
            with duration.undisturbed():
                self._paces[key] = duration.measure(config, len(self.index.classes), 0)
        pace, images = self._paces[key], self.images
        return pace.features * (images.train + images.val) + pace.of(duration.Work(config, images))

    def decoding(self, config: TrainConfig) -> float:
        """Seconds of decoding the images at the size of ``config``."""
        model, own = config.model, lookup(config.model.name).preprocessing
        shape = replace(own, cache_size=model.cache_size or model.size or own.cache_size)
        return duration.decode_seconds(self.index, shape) * self.images.all

    def test(self, config: TrainConfig) -> float:
        """Seconds of a test, without looking for near-duplicates, and of fitting the score for unlike images."""
        images = self.images.all + self.images.val
        return 2 * VALIDATION + self.forward(config.model.name, config.model.size) * images

    def least(self, config: TrainConfig) -> float:
        """Seconds that one fine-tuning by ``config`` takes at least; nothing is trained to know them."""
        epochs, model = config.optim.epochs, config.model
        sizes = [config.augment.size_at(epoch, epochs) or model.size for epoch in range(1, epochs + 1)]
        return FASTEST * self.images.train * sum(self.forward(model.name, size) for size in sizes)

    def run(self, config: TrainConfig) -> float:
        """Seconds of one run of ``config``, when the images are decoded and seen by the frozen network."""
        key = duration.step_kind(config)
        if key not in self._paces:
            with duration.undisturbed():
                pace = duration.measure(config, len(self.index.classes), self.images.train)
            plain = self.forward(config.model.name, config.model.size)  # a few images also measure what is done once
            self._paces[key] = replace(pace, forward=min(pace.forward, plain), epoch=pace.epoch + VALIDATION)
        return self._paces[key].of(duration.Work(config, self.images))

    def first_run(self, config: TrainConfig) -> float:
        """Seconds of the first run of ``config``, which also decodes the images and sees them by the frozen network."""
        return self.run(config) + self.probe(config)
