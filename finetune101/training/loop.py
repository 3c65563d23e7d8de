"""Training: ``fit`` takes a job of ``training.job`` and yields one record per epoch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from finetune101.data.batches import mix, step_count
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import checkpoint_info, read_checkpoint
from finetune101.evaluation.metrics import calibrate
from finetune101.fast import fast_layers
from finetune101.files import checked, parse_json
from finetune101.models.weights import read_by_torch
from finetune101.run import save_checkpoint, save_state
from finetune101.schemas import Record
from finetune101.training.distill import distillation_loss
from finetune101.training.forecast import Forecast
from finetune101.training.job import Job
from finetune101.training.optim import Average, factor, optimizer, set_rates
from finetune101.training.probe import fit_head
from finetune101.training.sources import Batches, FeatureBatches, ImageBatches


class Diverged(Refused):
    """The loss or the weights are no longer finite: the settings' fault, not the machine's."""


class Trainer:
    """Model, optimizer and counters of a job between two epochs: what a resumed run must find again."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.built.model.to(job.world.device, memory_format=job.world.memory_format)  # type: ignore[call-overload]
        if job.config.system.fast_kernels and job.world.device.type == "cpu":
            fast_layers(self.model)
        self.optimizer = optimizer(self.model, job.built.new, job.config)
        self.wrapped = self.model
        self.average = Average(self.model) if job.config.optim.ema else None
        self.scaler = torch.amp.GradScaler(job.world.device.type, enabled=job.world.precision == "fp16")
        self.records: list[dict[str, Any]] = []
        self.val_outputs: tuple[torch.Tensor, torch.Tensor] | None = None  # logits and labels of the last validation
        self.best_outputs: tuple[torch.Tensor, torch.Tensor] | None = None  # those of the best epoch
        self.forecast = Forecast()
        self.paths, self.labels = job.trained_on
        self.steps_per_epoch = step_count(len(self.paths), job.config.optim.batch_size)
        source = FeatureBatches if job.config.model.cached_features else ImageBatches
        self.source = source(job, self.paths, self.labels)

    def probe(self) -> dict[str, Any]:
        """Sets the head to the best linear one on frozen features: the record of epoch 0."""
        started, job = time.perf_counter(), self.job
        train, penalties = (self.paths, self.labels), job.config.model.probe_l2
        val = (job.manifest.subsets["val"], job.manifest.labels("val")) if job.validates else None
        fast, result = job.config.system.fast_kernels, {}
        with job.world.first():  # it may take longer than a process may be silent
            if job.world.writes:
                result = fit_head(job.built, job.images, train, val, penalties, job.world, fast)
        result = job.world.same_everywhere(self.model, result)
        if self.average:
            self.average.set(self.model)
        seconds = time.perf_counter() - started + result.pop("unpaid")
        record = {"epoch": 0, "step": 0, **result, "lr_head": 0.0, "lr_backbone": 0.0, "seconds": round(seconds, 3)}
        return record | {"images_per_s": round(len(self.paths) / seconds, 2)} | self.validate(epoch=0)

    @property
    def saved_model(self) -> torch.nn.Module:
        """The model that is validated and saved: the average where there is one."""
        return self.average.module if self.average else self.model

    def wrap(self) -> None:
        """Makes all processes train one model, and gives every one the weights of the first."""
        self.wrapped = self.source.trained(self.model)

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
            x, target, taught = self.mixed(x, y, step)
            set_rates(self.optimizer, factor(o, step, self.steps_per_epoch))
            own = len(range(total)[world.share(total)])  # the first ones; the others of x only fill up its batch norms
            # ranks hold unequal parts of the last batch: weight the loss so that DDP's mean is the mean over images
            output, _ = self.step(x, target, taught, own * world.size / total, max(own, 1))
            if self.average:
                self.average.update(self.model, average_decay(o.ema, step))
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
            "seconds": round(seconds + (self.source.seconds if epoch == 1 else 0.0), 3),
            "images_per_s": round(len(self.paths) / seconds, 2),
        }

    def mixed(
        self, x: torch.Tensor, y: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The batch of ``step``, mixed where ``augment.mix`` says so, its labels, and what the teachers make of it."""
        job, augment, target = self.job, self.job.config.augment, y
        if augment.mix:
            seed = job.config.system.seed * 1_000_003 + step
            x, target = mix(x, y, len(job.manifest.classes), augment.mix, seed, augment.mixup_alpha)
        temperature = job.config.optim.teacher_temperature
        return x, target, job.teachers.probabilities(x, temperature) if job.teachers else None

    def step(
        self,
        x: torch.Tensor,
        target: torch.Tensor,
        taught: torch.Tensor | None = None,
        weight: float = 1.0,
        counted: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on the loss of the first ``counted`` images (default: all) times ``weight``.

        ``taught`` are the teachers' probabilities of the images. Returns logits (N, classes) of all images and the
        loss, detached.
        """
        o = self.job.config.optim
        with self.job.world.autocast():
            output = self.wrapped(x)
            own, labels = output[:counted].float(), target[:counted]
            if taught is None:
                loss = F.cross_entropy(own, labels, label_smoothing=o.label_smoothing)
            else:
                loss = distillation_loss(
                    own, labels, taught[:counted], o.teacher_share, o.teacher_temperature, o.label_smoothing
                )
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
        if not self.job.validates or (epoch % o.val_every and epoch < o.epochs):
            return {"val_loss": None, "val_top1": None, "val_seconds": 0.0}
        job, world, started = self.job, self.job.world, time.perf_counter()
        world.same_buffers(self.saved_model)
        self.val_outputs = output, target = self.source.val_logits(self.saved_model)
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
        record["best"] = not self.job.validates or (scored and all(_score(record) > score for score in earlier))
        if not self.job.validates:
            if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
                raise _not_finite("the weights are not finite after step", record["step"])
            for older in self.records:
                older["best"] = False
        self.records.append(record)
        if record["best"]:
            self.best_outputs = self.val_outputs
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
        job = self.job
        own, classes = job.built.preprocessing, job.manifest.classes
        info = checkpoint_info(job.config.model.name, classes, own, epoch=record["epoch"])
        save_checkpoint(self.job.run.best, self.saved_model.state_dict(), info)

    def calibrate(self) -> None:
        """Adds the temperature of the validation images (``metrics.calibrate``) to the best weights.

        Nothing is added where this training has not validated the best epoch: without validation images, and where a
        resumed run had its best epoch before. ``evaluate`` then looks for the temperature.
        """
        if self.best_outputs is None:
            return
        job, (output, target) = self.job, self.best_outputs
        shares = job.world.gathered((output, target))
        if not job.world.writes:
            return
        outputs, labels = (interleaved([share[part] for share in shares]) for part in (0, 1))
        result = calibrate(outputs, labels)
        tensors, info = read_checkpoint(job.run.best)
        info["temperature"] = f"{result.temperature:.6f}"
        save_checkpoint(job.run.best, tensors, info | ({"temperature_reason": result.reason} if result.reason else {}))

    def _save_last(self, epoch: int) -> None:
        state = {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.module.state_dict() if self.average else None,
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
                self.average.module.load_state_dict(state["average"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise Refused(f"cannot resume from {file} (it does not hold what this run needs); {remedy}") from error
        self.records = records
        if self.job.world.writes:
            self.job.run.write_metrics(self.records)  # a crash may have come between the two files
        return epoch


def average_decay(decay: float, step: int) -> float:
    """The share of the old average that ``step`` (from 0) keeps: ``decay``, but less at the start.

    It grows from 1/10 as (1 + step) / (10 + step), so that the random start is forgotten sooner.
    """
    return min(decay, (1 + step) / (10 + step))


def interleaved(shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows (N, ...) of which ``World.share`` gave every process its part: ``shares``, by rank."""
    whole = shares[0].new_empty(sum(map(len, shares)), *shares[0].shape[1:])
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


def _score(record: dict[str, Any]) -> tuple[float, float]:
    """What the best epoch has most of: validation accuracy, and of equals the lowest loss (small sets have many)."""
    return record["val_top1"], -record["val_loss"]


def _not_finite(what: str, step: int) -> Diverged:
    return Diverged(f"{what} {step}; lower --lr or use --precision fp32 (the last checkpoint is kept)")


def fit(job: Job, *, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Trains ``job`` from where its run stands to the last epoch; yields a ``schemas.Record`` per epoch.

    Raises Diverged when the loss is no longer finite, Refused when a checkpoint cannot be written, the run's folder is
    gone or another process is lost; what was saved before stays. Other processes may work on the run afterwards.
    """
    with job.lock, job.world.together():
        yield from _epochs(job, quiet)


def _epochs(job: Job, quiet: bool) -> Iterator[dict[str, Any]]:
    if job.world.device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    trainer = Trainer(job)
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
        batches = trainer.source.train(range(done + 1, epochs + 1))
        for epoch in range(done + 1, epochs + 1):
            record = trainer.train_epoch(epoch, batches, bar)
            record = trainer.finish_epoch(record | trainer.validate(epoch))
            bar.set_postfix_str(f"epoch {epoch}/{epochs}")
            yield record
        if not quiet:  # a search needs no temperature, and the test of a study's run finds it
            trainer.calibrate()
