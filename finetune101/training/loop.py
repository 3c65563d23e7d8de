"""Training: ``prepare`` puts a run together, ``fit`` yields one record per epoch."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from finetune101.config import TrainConfig, to_dict
from finetune101.data.batches import epoch_order, eval_batches, mix, train_batches
from finetune101.data.cache import Images
from finetune101.data.splits import Manifest
from finetune101.errors import Refused
from finetune101.evaluation.inference import logits
from finetune101.models.build import Built
from finetune101.runs import Run, save_with
from finetune101.training import cpu, probe
from finetune101.training.distill import Teachers
from finetune101.training.forecast import Forecast
from finetune101.training.optim import factor, optimizer, set_rates
from finetune101.world import World

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


class Diverged(Refused):
    """The loss or the weights are no longer finite: the settings' fault, not the machine's."""


class Trainer:
    """Model, optimizer and counters of a job between two epochs: what a resumed run must find again."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.built.model.to(job.world.device, memory_format=job.world.memory_format)  # type: ignore[call-overload]
        if job.config.system.fast_kernels and job.world.device.type == "cpu":
            cpu.fast_layers(self.model)
        self.optimizer = optimizer(self.model, job.built.head, job.config)
        self.wrapped = self.model
        self.average = copy.deepcopy(self.model).requires_grad_(False) if job.config.optim.ema else None
        self.scaler = torch.amp.GradScaler(job.world.device.type, enabled=job.world.precision == "fp16")
        self.records: list[dict[str, Any]] = []
        self.forecast = Forecast()
        held = ("train", "val") if job.config.data.fit_on == "train+val" else ("train",)
        self.paths = [path for subset in held for path in job.manifest.subsets[subset]]
        self.labels = [label for subset in held for label in job.manifest.labels(subset)]
        self.validates = len(held) == 1 and bool(job.manifest.subsets["val"])
        self.steps_per_epoch = -(-len(self.paths) // job.config.optim.batch_size)

    def probe(self) -> dict[str, Any]:
        """Sets the head to the best linear one on frozen features: the record of epoch 0."""
        started, job = time.perf_counter(), self.job
        train, penalties = (self.paths, self.labels), job.config.model.probe_l2
        val = (job.manifest.subsets["val"], job.manifest.labels("val")) if self.validates else None
        fast = job.config.system.fast_kernels
        found = (
            probe.fit_head(job.built, job.images, train, val, penalties, job.world, fast) if job.world.writes else {}
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
        mine = job.world.share(len(paths))
        batches = eval_batches(
            job.images, paths[mine], labels[mine], batch_size=job.config.optim.batch_size, world=job.world
        )
        return logits(self.shown, batches, job.world)

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
        """One pass over the training images, the next ``batches``; raises Refused when a loss is not finite."""
        job, o, world = self.job, self.job.config.optim, self.job.world
        torch.manual_seed((job.config.system.seed * 1_000_003 + epoch) * 1009 + world.rank)  # dropout
        self.train_mode()
        losses, correct, started = [], torch.zeros((), device=job.world.device), time.perf_counter()
        step = (epoch - 1) * self.steps_per_epoch
        for x, y, total in islice(batches, self.steps_per_epoch):
            x, target = self.mixed(x, y, step)
            set_rates(self.optimizer, factor(o, step, self.steps_per_epoch))
            mine = len(range(total)[world.share(total)])
            # processes hold unequal shares of the last batch, and their gradients are averaged
            output, _ = self.step(x, target, mine * world.size / total)
            if self.average:
                move_towards(self.average, self.model, o.ema, step)
            step += 1
            plain = F.cross_entropy(output.float(), target)  # without smoothing, as validation's
            losses.append(plain * mine)
            correct += (output.argmax(1) == y)[:mine].sum()
            if step % 10 == 0 or len(losses) == self.steps_per_epoch:  # not each step: a GPU would have to wait
                self._check_finite(losses, step)
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

    def step(self, x: torch.Tensor, target: torch.Tensor, weight: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on the loss times ``weight``; returns logits (N, classes) and the loss, detached."""
        with self.job.world.autocast():
            output = self.wrapped(x)
            loss = F.cross_entropy(output.float(), target, label_smoothing=self.job.config.optim.label_smoothing)
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
        output, target = self.val_logits()
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
        earlier = [r["val_top1"] for r in self.records if r["val_top1"] is not None]
        now = record["val_top1"]
        record["best"] = not self.validates or (now is not None and all(now > value for value in earlier))
        if not self.validates:
            if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
                raise _not_finite("the weights are not finite after step", record["step"])
            for older in self.records:
                older["best"] = False
        self.records.append(record)
        if not self.job.world.writes:
            return record
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
        state = {key: value.contiguous() for key, value in self.shown.state_dict().items()}
        save_with(self.job.run.best, lambda part: save_file(state, part, info))

    def _save_last(self, epoch: int) -> None:
        state = {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "records": json.dumps(self.records),
        }
        save_with(self.job.run.last, lambda part: torch.save(state, part))

    def load_last(self) -> int:
        """Puts everything back as it was after the last finished epoch; returns that epoch, 0 when there is none."""
        file = self.job.run.last
        if not file.is_file():
            return 0
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.average:
                self.average.load_state_dict(state["average"])
            self.records = json.loads(state["records"])
        except Exception as error:
            raise Refused(f"cannot resume from {file} ({error}); start anew with --overwrite") from error
        if self.job.world.writes:
            self.job.run.write_metrics(self.records)  # a crash may have come between the two files
        return int(state["epoch"])


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
            for chosen in order.to(self.x.device).split(self.job.config.optim.batch_size):
                yield self.x[chosen], self.y[chosen], len(chosen)

    def val_logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of the validation images."""
        head = self.shown.get_submodule(self.job.built.head.rstrip("."))
        return logits(head, [(self.x_val, torch.tensor(self.job.manifest.labels("val")))], self.job.world)


def _not_finite(what: str, step: int) -> Diverged:
    return Diverged(f"{what} {step}; lower --lr or use --precision fp32 (the last checkpoint is kept)")


def fit(job: Job, *, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Trains ``job`` from where its run stands to the last epoch; yields the record of each epoch (see ``runs``).

    Raises Refused when the loss is no longer finite or a checkpoint cannot be written; what was saved before stays.
    """
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
