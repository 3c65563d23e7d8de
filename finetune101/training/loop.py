"""Training: ``fit`` takes a job from ``prepare`` and yields one record per epoch."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from finetune101.config import TrainConfig, to_dict
from finetune101.data.batches import batches_of, epoch_order, eval_batches, mix, step_count, train_batches
from finetune101.data.cache import Images
from finetune101.data.splits import Manifest
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import read_checkpoint
from finetune101.evaluation.forward import logits
from finetune101.evaluation.metrics import calibrate
from finetune101.fast import fast_layers
from finetune101.files import checked, parse_json
from finetune101.machine import World
from finetune101.models.build import Built
from finetune101.models.weights import read_by_torch
from finetune101.run import Run, save_checkpoint, save_state
from finetune101.schemas import Record
from finetune101.training import probe
from finetune101.training.distill import Teachers
from finetune101.training.forecast import Forecast
from finetune101.training.optim import factor, optimizer, set_rates

Batches = Iterator[tuple[torch.Tensor, torch.Tensor, int]]


@dataclass(frozen=True)
class Job:
    """Everything that one training needs, put together by ``training.prepare``."""

    config: TrainConfig
    run: Run
    world: World
    manifest: Manifest
    images: Images
    built: Built
    teachers: Teachers | None = None
    notes: tuple[str, ...] = ()
    """Lines on the images for the user: what was found, what is left out."""
    lock: ExitStack = field(default_factory=ExitStack)
    """Keeps other processes out of the run; ``fit`` closes it at its end."""


class Diverged(Refused):
    """The loss or the weights are no longer finite: the settings' fault, not the machine's."""


class Trainer:
    """Model, optimizer and counters of a job between two epochs: what a resumed run must find again."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.built.model.to(job.world.device, memory_format=job.world.memory_format)  # type: ignore[call-overload]
        if job.config.system.fast_kernels and job.world.device.type == "cpu":
            fast_layers(self.model)
        self.optimizer = optimizer(self.model, job.built.head, job.config)
        self.wrapped = self.model
        self.average = copy.deepcopy(self.model).requires_grad_(False) if job.config.optim.ema else None
        self.scaler = torch.amp.GradScaler(job.world.device.type, enabled=job.world.precision == "fp16")
        self.records: list[dict[str, Any]] = []
        self.validated: tuple[torch.Tensor, torch.Tensor] | None = None
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None  # of the best epoch
        self.forecast = Forecast()
        held = ("train", "val") if job.config.data.fit_on == "train+val" else ("train",)
        self.paths = [path for subset in held for path in job.manifest.subsets[subset]]
        self.labels = [label for subset in held for label in job.manifest.labels(subset)]
        self.validates = len(held) == 1 and bool(job.manifest.subsets["val"])
        self.steps_per_epoch = step_count(len(self.paths), job.config.optim.batch_size)

    def probe(self) -> dict[str, Any]:
        """Sets the head to the best linear one on frozen features: the record of epoch 0."""
        started, job = time.perf_counter(), self.job
        train, penalties = (self.paths, self.labels), job.config.model.probe_l2
        val = (job.manifest.subsets["val"], job.manifest.labels("val")) if self.validates else None
        fast = job.config.system.fast_kernels
        with job.world.first():  # it may take longer than a process may be silent
            found = (
                probe.fit_head(job.built, job.images, train, val, penalties, job.world, fast)
                if job.world.writes
                else {}
            )
        found = job.world.same_everywhere(self.model, found)
        if self.average:
            self.average.load_state_dict(self.model.state_dict())
        seconds = time.perf_counter() - started + found.pop("unpaid")
        record = {"epoch": 0, "step": 0, **found, "lr_head": 0.0, "lr_backbone": 0.0, "seconds": round(seconds, 3)}
        return record | {"images_per_s": round(len(self.paths) / seconds, 2)} | self.validate(epoch=0)

    @property
    def shown(self) -> torch.nn.Module:
        """The model that is validated and saved: the average where there is one."""
        return self.average or self.model

    def wrap(self) -> None:
        """Makes all processes train one model, and gives every one the weights of the first."""
        self.wrapped = self.job.world.wrap(self.model)

    def batches(self, epochs: Iterable[int]) -> Batches:
        """Inputs and labels of these epochs' steps, and the number of images that all processes have of each."""
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

    def val_logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of this process's share of the validation images."""
        job = self.job
        paths, labels = job.manifest.subsets["val"], job.manifest.labels("val")
        share = job.world.share(len(paths))
        if not paths[share]:  # more processes than images
            return torch.empty(0, len(job.manifest.classes)), torch.empty(0, dtype=torch.int64)
        batches = eval_batches(
            job.images, paths[share], labels[share], batch_size=job.config.optim.batch_size, world=job.world
        )
        return logits(self.shown, batches, job.world, fast=job.config.system.fast_kernels)

    def train_mode(self) -> None:
        """Dropout on, batch norms learning; frozen ones stay as they are."""
        self.wrapped.train()
        if self.job.config.model.freeze:
            self.wrapped.eval()
        if self.job.config.model.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def train_epoch(self, epoch: int, batches: Batches, bar: tqdm[Any]) -> dict[str, Any]:
        """One pass over the training images, the next ``batches``; raises Diverged when a loss is not finite."""
        job, o, world = self.job, self.job.config.optim, self.job.world
        torch.manual_seed((job.config.system.seed * 1_000_003 + epoch) * 1009 + world.rank)  # dropout
        self.train_mode()
        losses, correct, started = [], torch.zeros((), device=job.world.device), time.perf_counter()
        step = (epoch - 1) * self.steps_per_epoch
        for x, y, total in islice(batches, self.steps_per_epoch):
            x, target = self.mixed(x, y, step)
            set_rates(self.optimizer, factor(o, step, self.steps_per_epoch))
            own = len(range(total)[world.share(total)])  # the first ones; the others of x only fill up its batch norms
            # ranks hold unequal parts of the last batch: weight the loss so that DDP's mean is the mean over images
            output, _ = self.step(x, target, own * world.size / total, max(own, 1))
            if self.average:
                move_towards(self.average, self.model, o.ema, step)
            step += 1
            counted = slice(max(own, 1))
            plain = F.cross_entropy(output[counted].float(), target[counted])  # not smoothed, as validation's
            losses.append(plain * own)
            correct += (output.argmax(1) == y)[:own].sum()
            if step % 10 == 0 or len(losses) == self.steps_per_epoch:  # not each step: a GPU would have to wait
                self._check_finite(losses[-10:], step)
            bar.update(total)
            self.forecast.after_step(self, epoch, len(losses), started, bar)
        sums = world.sum(torch.stack([torch.stack(losses).sum(), correct]).cpu().double())
        seconds = time.perf_counter() - started
        rates = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        return {
            "epoch": epoch,
            "step": step,
            "train_loss": float(sums[0]) / len(self.paths),
            "train_top1": 100 * float(sums[1]) / len(self.paths),
            "lr_head": rates["lr_head"],
            "lr_backbone": rates.get("lr_backbone", 0.0),
            "seconds": round(seconds, 3),
            "images_per_s": round(len(self.paths) / seconds, 2),
        }

    def mixed(self, x: torch.Tensor, y: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of ``step`` with its images mixed where ``augment.mix`` says so, and its targets."""
        job, share, target = self.job, self.job.config.augment.mix, y
        if share:
            x, target = mix(x, y, len(job.manifest.classes), share, job.config.system.seed * 1_000_003 + step)
        if job.teachers:
            target = job.teachers.targets(x, target, job.config.optim.teacher_share)
        return x, target

    def step(
        self, x: torch.Tensor, target: torch.Tensor, weight: float = 1.0, counted: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on the loss of the first ``counted`` images (default: all) times ``weight``.

        Returns logits (N, classes) of all images and the loss, detached.
        """
        smoothing = self.job.config.optim.label_smoothing
        with self.job.world.autocast():
            output = self.wrapped(x)
            loss = F.cross_entropy(output[:counted].float(), target[:counted], label_smoothing=smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * weight).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return output.detach(), loss.detach()

    def _check_finite(self, losses: list[torch.Tensor], step: int) -> None:
        bad = (~torch.isfinite(torch.stack(losses))).nonzero()
        if len(bad):
            raise _not_finite("the loss is not finite at step", step - len(losses) + int(bad[0]) + 1)

    def validate(self, epoch: int) -> dict[str, Any]:
        """Loss and top-1 accuracy (percent) on the validation images; None without any, or where none is due."""
        o = self.job.config.optim
        if not self.validates or (epoch % o.val_every and epoch < o.epochs):
            return {"val_loss": None, "val_top1": None, "val_seconds": 0.0}
        job, world, started = self.job, self.job.world, time.perf_counter()
        world.same_buffers(self.shown)
        self.validated = output, target = self.val_logits()
        sums = torch.stack(
            [
                F.cross_entropy(output, target, reduction="sum").double(),
                (output.argmax(1) == target).sum().double(),
            ]
        )
        loss, correct = (world.sum(sums) / len(job.manifest.subsets["val"])).tolist()
        if not math.isfinite(loss):
            step = (len(self.records) + 1) * self.steps_per_epoch
            raise _not_finite("the validation loss is not finite after step", step)
        return {
            "val_loss": loss,
            "val_top1": 100 * correct,
            "val_seconds": round(time.perf_counter() - started, 3),
        }

    def finish_epoch(self, record: dict[str, Any]) -> dict[str, Any]:
        """Adds the record, saves the best weights when they are, then the state to resume from."""
        earlier = [_score(r) for r in self.records if r["val_top1"] is not None]
        scored = record["val_top1"] is not None
        record["best"] = not self.validates or (scored and all(_score(record) > score for score in earlier))
        if not self.validates:
            if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
                raise _not_finite("the weights are not finite after step", record["step"])
            for older in self.records:
                older["best"] = False
        self.records.append(record)
        if not self.job.world.writes:
            return record
        if not self.job.run.has("config.json"):
            raise Refused(
                f"{self.job.run.path} was moved or removed while it was trained, so the training ends; put it back and"
                " continue with --resume, or train it again"
            )
        if record["best"]:
            self._save_best(record)
        self._save_last(record["epoch"])
        self.job.run.write_metrics(self.records)
        return record

    def _save_best(self, record: dict[str, Any]) -> None:
        info = {
            "model": self.job.config.model.name,
            "classes": json.dumps(self.job.manifest.classes),
            "preprocessing": json.dumps(to_dict(self.job.built.preprocessing)),
            "epoch": str(record["epoch"]),
        }
        self.kept = self.validated
        save_checkpoint(self.job.run.best, self.shown.state_dict(), info)

    def calibrate(self) -> None:
        """Adds to the best weights the temperature that the validation images have; else ``evaluate`` finds it.

        Of a resumed run whose best epoch was earlier, and of several processes, no process has all outputs.
        """
        if self.kept is not None and self.job.world.size == 1:
            tensors, info = read_checkpoint(self.job.run.best)
            temperature = calibrate(*self.kept).temperature
            save_checkpoint(self.job.run.best, tensors, {**info, "temperature": f"{temperature:.6f}"})

    def _save_last(self, epoch: int) -> None:
        state = {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "records": json.dumps(self.records),
        }
        save_state(self.job.run.last, state)

    def load_last(self) -> int:
        """Puts everything back as it was after the last finished epoch; returns that epoch, 0 when there is none.

        Raises Refused for a file that is damaged, or of another network.
        """
        file, remedy = self.job.run.last, "start anew with --overwrite"
        if not file.is_file():
            return 0
        try:
            state = read_by_torch(file)
        except Refused as error:
            raise Refused(f"cannot resume from {file} (it is damaged, or no checkpoint of a run); {remedy}") from error
        try:
            records = checked(parse_json(state["records"], f"{file}", remedy), list[Record], f"{file}", remedy=remedy)
            epoch = int(state["epoch"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.average:
                self.average.load_state_dict(state["average"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise Refused(f"cannot resume from {file} (it does not hold what this run needs); {remedy}") from error
        self.records = records
        if self.job.world.writes:
            self.job.run.write_metrics(self.records)  # a crash may have come between the two files
        return epoch


def move_towards(average: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    """Makes ``average`` the exponential moving average of the weights and buffers of ``model`` after ``step`` (from 0).

    The start is forgotten sooner: the decay grows from 1/10 as (1 + step) / (10 + step).
    """
    ours, theirs = (list(module.state_dict().values()) for module in (average, model))
    floats = [[tensor for tensor in side if tensor.is_floating_point()] for side in (ours, theirs)]
    torch._foreach_lerp_(floats[0], floats[1], 1 - min(decay, (1 + step) / (10 + step)))
    for old, new in zip(ours, theirs, strict=True):
        if not old.is_floating_point():
            old.copy_(new)


class HeadTrainer(Trainer):
    """Trains the output layer on features that were computed once: 10 epochs of 6,000 images take a second."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        held = [*self.paths, *(job.manifest.subsets["val"] if self.validates else ())]
        started = time.perf_counter()
        x, unpaid = probe.features(job.built, job.images, held, job.world, job.config.system.fast_kernels)
        self.feature_seconds = time.perf_counter() - started + unpaid
        self.x, self.x_val = x.to(job.world.device).split([len(self.paths), len(held) - len(self.paths)])
        self.y = torch.tensor(self.labels, device=job.world.device)

    def train_epoch(self, epoch: int, batches: Batches, bar: tqdm[Any]) -> dict[str, Any]:
        """One pass over the features; computing them is a part of what the first one costs."""
        record = super().train_epoch(epoch, batches, bar)
        if epoch == 1:
            record["seconds"] = round(record["seconds"] + self.feature_seconds, 3)
        return record

    def wrap(self) -> None:
        """The output layer alone sees features."""
        self.wrapped = self.job.built.output_layer

    def batches(self, epochs: Iterable[int]) -> Batches:
        """Features in the order that the images would have."""
        for epoch in epochs:
            order, _ = epoch_order(len(self.x), self.job.config.system.seed, epoch)
            for chosen in batches_of(order.to(self.x.device), self.job.config.optim.batch_size):
                yield self.x[chosen], self.y[chosen], len(chosen)

    def val_logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of the validation images."""
        head = self.shown.get_submodule(self.job.built.head.rstrip("."))
        return logits(head, [(self.x_val, torch.tensor(self.job.manifest.labels("val")))], self.job.world)


def _score(record: dict[str, Any]) -> tuple[float, float]:
    """What the best epoch has most of: validation accuracy, and of equals the lowest loss (small sets have many)."""
    return record["val_top1"], -record["val_loss"]


def _not_finite(what: str, step: int) -> Diverged:
    return Diverged(f"{what} {step}; lower --lr or use --precision fp32 (the last checkpoint is kept)")


def fit(job: Job, *, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Trains ``job`` from where its run stands to the last epoch; yields the record of each epoch (see ``runs``).

    Raises Diverged when the loss is no longer finite, Refused when a checkpoint cannot be written, the run's folder is
    gone or another process is lost; what was saved before stays. Other processes may work on the run afterwards.
    """
    with job.lock, job.world.together():
        yield from _epochs(job, quiet)


def _epochs(job: Job, quiet: bool) -> Iterator[dict[str, Any]]:
    if job.world.device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    trainer = HeadTrainer(job) if job.config.model.cached_features else Trainer(job)
    done, epochs = trainer.load_last(), job.config.optim.epochs
    if job.config.model.head == "probe" and not trainer.records:
        yield trainer.finish_epoch(trainer.probe())
    trainer.wrap()
    with tqdm(
        total=epochs * len(trainer.paths),
        initial=done * len(trainer.paths),
        desc=job.config.exp,
        unit="img",
        disable=quiet or not job.world.writes,
        dynamic_ncols=True,
    ) as bar:
        batches = trainer.batches(range(done + 1, epochs + 1))
        for epoch in range(done + 1, epochs + 1):
            record = trainer.train_epoch(epoch, batches, bar)
            record = trainer.finish_epoch(record | trainer.validate(epoch))
            bar.set_postfix_str(f"epoch {epoch}/{epochs}")
            yield record
        if not quiet and job.world.writes:  # searches need none, and a study's test finds it
            trainer.calibrate()
