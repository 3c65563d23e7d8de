"""The two sources of batches: images, decoded and augmented, or features of frozen layers, computed once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from finetune101.data.batches import batches_of, epoch_order, eval_batches, train_batches
from finetune101.evaluation.forward import logits
from finetune101.training.job import Job
from finetune101.training.probe import features

Batches = Iterator[tuple[Tensor, Tensor, int]]
"""Inputs and labels of this process, and the number of images that the batch has in all processes."""


class ImageBatches:
    """Batches of the images ``paths`` with ``labels``; the whole network is trained on them."""

    seconds = 0.0
    """What the source cost before the first batch; decoding is shared by all runs and is no cost of one."""

    def __init__(self, job: Job, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.job, self.paths, self.labels = job, paths, labels

    def trained(self, model: nn.Module) -> nn.Module:
        """The module that sees the batches: ``model``, the same one in all processes."""
        return self.job.world.wrap(model)

    def train(self, epochs: Iterable[int]) -> Batches:
        """The batches of these epochs, one epoch after the other."""
        config = self.job.config
        return train_batches(
            self.job.images,
            self.paths,
            self.labels,
            batch_size=config.optim.batch_size,
            config=config.augment,
            world=self.job.world,
            seed=config.system.seed,
            epochs=((number, config.augment.size_at(number, config.optim.epochs)) for number in epochs),
        )

    def val_logits(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and labels (N,) of this process's share of the validation images."""
        job = self.job
        paths, labels = job.manifest.subsets["val"], job.manifest.labels("val")
        share = job.world.share(len(paths))
        if not paths[share]:  # more processes than images
            return torch.empty(0, len(job.manifest.classes)), torch.empty(0, dtype=torch.int64)
        batches = eval_batches(
            job.images, paths[share], labels[share], batch_size=job.config.optim.batch_size, world=job.world
        )
        return logits(model, batches, job.world, fast=job.config.system.fast_kernels)


class FeatureBatches:
    """Batches of the features of ``paths``; the output layer alone is trained on them, in one process.

    10 epochs of 6,000 images take a second.
    """

    def __init__(self, job: Job, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.job = job
        both = [*paths, *(job.manifest.subsets["val"] if job.validates else ())]
        started = time.perf_counter()
        x, unpaid = features(job.built, job.images, both, job.world, job.config.system.fast_kernels)
        self.seconds = time.perf_counter() - started + unpaid
        self.x, self.x_val = x.to(job.world.device).split([len(paths), len(both) - len(paths)])
        self.y = torch.tensor(labels, device=job.world.device)

    def trained(self, model: nn.Module) -> nn.Module:
        """The module that sees the batches: the output layer of ``model``."""
        return model.get_submodule(self.job.built.head.rstrip("."))

    def train(self, epochs: Iterable[int]) -> Batches:
        """Features in the order that the images would have."""
        for epoch in epochs:
            order, _ = epoch_order(len(self.x), self.job.config.system.seed, epoch)
            for places in batches_of(order.to(self.x.device), self.job.config.optim.batch_size):
                yield self.x[places], self.y[places], len(places)

    def val_logits(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and labels (N,) of the validation images."""
        labels = torch.tensor(self.job.manifest.labels("val"))
        return logits(self.trained(model), [(self.x_val, labels)], self.job.world)
