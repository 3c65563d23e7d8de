"""Distillation: the student learns from the probabilities of trained networks as well as from the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune101.config import Preprocessing, TrainConfig
from finetune101.data import splits
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import load_hashed
from finetune101.evaluation.evaluate import validates
from finetune101.evaluation.forward import Forward
from finetune101.files import sha256
from finetune101.machine import World
from finetune101.run import open_run


@dataclass(frozen=True)
class Teachers:
    """Trained networks, each with the input that it expects, and the input that the student gets."""

    networks: Sequence[tuple[Forward, Preprocessing]]
    student: Preprocessing
    world: World
    hashes: Sequence[str] = ()
    """"sha256:..." of the checkpoint of each network."""

    def probabilities(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """Mean probabilities (N, classes) of the networks for the student's standardised input (N, 3, h, w).

        The outputs of each network are divided by ``temperature`` first: above 1, probabilities are more alike.
        """
        with torch.no_grad():
            outputs = [network(self._input_of(expected, x)).float() for network, expected in self.networks]
            each = [(output / temperature).softmax(1) for output in outputs]
        return torch.stack(each).mean(0)

    def _input_of(self, expected: Preprocessing, x: Tensor) -> Tensor:
        """The student's standardised input as a teacher expects it: by its mean and deviation, at its size."""
        if (expected.mean, expected.std) != (self.student.mean, self.student.std):
            mean, std, other_mean, other_std = (
                torch.tensor(values, device=x.device).view(3, 1, 1)
                for values in (self.student.mean, self.student.std, expected.mean, expected.std)
            )
            x = (x * std + mean - other_mean) / other_std
        if x.shape[-1] != expected.size:
            x = F.interpolate(x, expected.size, mode="bilinear", antialias=True)
        return x


def distillation_loss(
    output: Tensor, target: Tensor, taught: Tensor, share: float, temperature: float, label_smoothing: float = 0.0
) -> Tensor:
    """(1 - ``share``) x cross-entropy with the labels + ``share`` x ``temperature`` squared x that with the teachers.

    ``output`` (N, classes) are the student's logits, ``target`` int64 (N,) or shares (N, classes) its labels, and
    ``taught`` (N, classes) the ``Teachers.probabilities`` at ``temperature`` of the very images of the student, crops
    and mixing included: Beyer et al., "Knowledge distillation: a good teacher is patient and consistent" (2022). The
    square keeps the size of the gradient at every temperature: Hinton et al. (2015).
    """
    loss = share * temperature**2 * F.cross_entropy(output / temperature, taught)
    if share < 1:
        loss = loss + (1 - share) * F.cross_entropy(output, target, label_smoothing=label_smoothing)
    return loss


def check_teachers(config: TrainConfig, manifest: splits.Manifest) -> None:
    """Raises Refused for a teacher that may have seen test images, or validation images of a run that validates.

    Such teachers were trained on another split or with --fit-on train+val. A teacher that began from ImageNet weights
    is refused where the student's start is to be random.
    """
    for name in config.optim.teacher:
        run = open_run(name, config.runs)
        if run.config().model.pretrain and not config.model.pretrain:
            raise Refused(f"the teacher {name} began from ImageNet weights, so --no-pretrain would not be honest")
        if splits.from_json(run.read_json("split.json")).hash() != manifest.hash():
            raise Refused(f"the teacher {name} was trained on another split; train it on this one")
        if validates(manifest, config.data) and run.config().data.fit_on == "train+val":
            raise Refused(
                f"the teacher {name} was trained on the validation images (--fit-on train+val), which then choose"
                " nothing; train one with --fit-on train, or this run with --fit-on train+val"
            )


def open_teachers(config: TrainConfig, student: Preprocessing, world: World) -> Teachers | None:
    """The networks of ``config.optim.teacher``, ready for batches of the student; None without any.

    Raises Refused for a run that does not exist or whose checkpoint cannot be read.
    """
    networks: list[tuple[Forward, Preprocessing]] = []
    hashes = []
    for name in config.optim.teacher:
        model, info, checkpoint_hash = load_hashed(open_run(name, config.runs).best)
        network = Forward(model.requires_grad_(False), world, fast=config.system.fast_kernels)
        networks.append((network, info.preprocessing))
        hashes.append(f"sha256:{checkpoint_hash}")
    return Teachers(networks, student, world, hashes) if networks else None


def teacher_hashes(config: TrainConfig) -> list[str]:
    """ "sha256:..." of the checkpoint of each of ``config.optim.teacher``. Raises Refused without one."""
    return [f"sha256:{sha256(open_run(name, config.runs).best)}" for name in config.optim.teacher]
