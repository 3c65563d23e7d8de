"""Distillation: the student learns from the probabilities of trained networks as well as from the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune101.config import Preprocessing, TrainConfig
from finetune101.data import splits
from finetune101.data.splits import Manifest
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import load_model
from finetune101.evaluation.forward import Forward
from finetune101.machine import World
from finetune101.run import open_run


@dataclass(frozen=True)
class Teachers:
    """Trained networks, each with the input that it expects, and the input that the student gets."""

    networks: Sequence[tuple[Forward, Preprocessing]]
    student: Preprocessing
    world: World

    def probabilities(self, x: Tensor) -> Tensor:
        """Mean probabilities (N, classes) of the networks for the student's standardised input (N, 3, h, w)."""
        found = []
        with torch.no_grad():
            for network, theirs in self.networks:
                mine = x
                if (theirs.mean, theirs.std) != (self.student.mean, self.student.std):
                    mean, std, other_mean, other_std = (
                        torch.tensor(values, device=x.device).view(3, 1, 1)
                        for values in (self.student.mean, self.student.std, theirs.mean, theirs.std)
                    )
                    mine = (mine * std + mean - other_mean) / other_std
                if mine.shape[-1] != theirs.size:
                    mine = F.interpolate(mine, theirs.size, mode="bilinear", antialias=True)
                found.append(network(mine).softmax(1))
        return torch.stack(found).mean(0)

    def targets(self, x: Tensor, target: Tensor, share: float) -> Tensor:
        """``target``, int64 (N,) or shares (N, classes), mixed with ``share`` of the networks' probabilities.

        They see the very images of the student: Beyer et al., "Knowledge distillation: a good teacher is patient and
        consistent" (2022), after Hinton et al. (2015).
        """
        theirs = self.probabilities(x)
        own = target if target.dim() > 1 else F.one_hot(target, theirs.shape[1]).float()
        return (1 - share) * own + share * theirs


def open_teachers(config: TrainConfig, manifest: Manifest, student: Preprocessing, world: World) -> Teachers | None:
    """The networks of ``config.optim.teacher``, ready for batches of the student; None without any.

    Raises Refused for a teacher that may have seen this run's test images (another split) or that was trained on its
    validation images, and for one that began from ImageNet weights where the student's start is to be random.
    """
    networks: list[tuple[Forward, Preprocessing]] = []
    for name in config.optim.teacher:
        run = open_run(name, config.runs)
        if run.config().model.pretrain and not config.model.pretrain:
            raise Refused(f"the teacher {name} began from ImageNet weights, so --no-pretrain would not be honest")
        if splits.from_json(run.read_json("split.json")).hash() != manifest.hash():
            raise Refused(f"the teacher {name} was trained on another split; train it on this one")
        validates = config.data.fit_on == "train" and bool(manifest.subsets["val"])
        if validates and run.config().data.fit_on == "train+val":
            raise Refused(
                f"the teacher {name} was trained on the validation images (--fit-on train+val), which then choose"
                " nothing; train one with --fit-on train, or this run with --fit-on train+val"
            )
        model, theirs, _ = load_model(run)
        networks.append((Forward(model.requires_grad_(False), world, fast=config.system.fast_kernels), theirs))
    return Teachers(networks, student, world) if networks else None
