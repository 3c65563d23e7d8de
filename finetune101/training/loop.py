"""Training: ``prepare`` puts a run together, ``fit`` yields one record per epoch."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from finetune101.config import TrainConfig, to_dict
from finetune101.data.batches import eval_batches, train_batches
from finetune101.data.cache import Images
from finetune101.data.splits import Manifest
from finetune101.evaluation.inference import logits
from finetune101.models.build import Built
from finetune101.runs import Run, save_with
from finetune101.training import cpu
from finetune101.training.optim import factor, optimizer, set_rates
from finetune101.world import World


@dataclass(frozen=True)
class Job:
    """Everything that one training needs, put together by ``training.prepare``."""

    config: TrainConfig
    run: Run
    world: World
    manifest: Manifest
    images: Images
    built: Built


class Trainer:
    """Model, optimizer and counters of a job between two epochs: what a resumed run must find again."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.built.model.to(job.world.device, memory_format=job.world.memory_format)  # type: ignore[call-overload]
        if job.config.system.fast_kernels and job.world.device.type == "cpu":
            cpu.fast_depthwise(self.model)
        self.optimizer = optimizer(self.model, job.built.head, job.config)
        self.scaler = torch.amp.GradScaler(job.world.device.type, enabled=job.world.precision == "fp16")
        self.records: list[dict[str, Any]] = []
        held = ("train", "val") if job.config.data.fit_on == "train+val" else ("train",)
        self.paths = [path for subset in held for path in job.manifest.subsets[subset]]
        self.labels = [label for subset in held for label in job.manifest.labels(subset)]
        self.validates = len(held) == 1 and bool(job.manifest.subsets["val"])
        self.steps_per_epoch = -(-len(self.paths) // job.config.optim.batch_size)

    def train_epoch(self, epoch: int, bar: tqdm[Any]) -> dict[str, Any]:
        """One pass over the training images; raises ValueError when the loss is no longer finite."""
        job, o = self.job, self.job.config.optim
        self.model.train()
        if job.config.model.freeze:
            self.model.eval()  # batch-norm statistics and dropout of a frozen network stay as they are
        losses, correct, started = [], torch.zeros((), device=job.world.device), time.perf_counter()
        batches = train_batches(
            job.images,
            self.paths,
            self.labels,
            batch_size=o.batch_size,
            config=job.config.augment,
            world=job.world,
            seed=job.config.system.seed,
            epoch=epoch,
        )
        step = (epoch - 1) * self.steps_per_epoch
        for x, y in batches:
            set_rates(self.optimizer, factor(o, step, self.steps_per_epoch))
            with job.world.autocast():
                output = self.model(x)
                loss = F.cross_entropy(output.float(), y, label_smoothing=o.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            step += 1
            losses.append(loss.detach() * len(y))
            correct += (output.detach().argmax(1) == y).sum()
            if step % 10 == 0 or len(losses) == self.steps_per_epoch:  # not each step: a GPU would have to wait
                self._check_finite(losses, step)
            bar.update(len(y))
        seconds = time.perf_counter() - started
        rates = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        return {
            "epoch": epoch,
            "step": step,
            "train_loss": float(torch.stack(losses).sum()) / len(self.paths),
            "train_top1": 100 * float(correct) / len(self.paths),
            "lr_head": rates["lr_head"],
            "lr_backbone": rates.get("lr_backbone", 0.0),
            "seconds": round(seconds, 3),
            "images_per_s": round(len(self.paths) / seconds, 2),
        }

    def _check_finite(self, losses: list[torch.Tensor], step: int) -> None:
        bad = (~torch.isfinite(torch.stack(losses))).nonzero()
        if len(bad):
            raise _not_finite("the loss is not finite at step", step - len(losses) + int(bad[0]) + 1)

    def validate(self) -> dict[str, Any]:
        """Loss and top-1 accuracy (percent) on the validation images; None without any."""
        if not self.validates:
            return {"val_loss": None, "val_top1": None}
        job = self.job
        paths, labels = job.manifest.subsets["val"], job.manifest.labels("val")
        batches = eval_batches(job.images, paths, labels, batch_size=job.config.optim.batch_size, world=job.world)
        output, target = logits(self.model, batches, job.world)
        loss = float(F.cross_entropy(output, target))
        if not math.isfinite(loss):
            step = (len(self.records) + 1) * self.steps_per_epoch
            raise _not_finite("the validation loss is not finite after step", step)
        return {
            "val_loss": loss,
            "val_top1": 100 * float((output.argmax(1) == target).float().mean()),
        }

    def finish_epoch(self, record: dict[str, Any]) -> dict[str, Any]:
        """Adds the record, saves the best weights when they are, then the state to resume from."""
        earlier = [r["val_top1"] for r in self.records]
        record["best"] = not self.validates or all(record["val_top1"] > value for value in earlier)
        if not self.validates:
            if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
                raise _not_finite("the weights are not finite after step", record["step"])
            for older in self.records:
                older["best"] = False
        self.records.append(record)
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
        state = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        save_with(self.job.run.best, lambda part: save_file(state, part, info))

    def _save_last(self, epoch: int) -> None:
        state = {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "records": json.dumps(self.records),
        }
        if self.job.world.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
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
            torch.set_rng_state(state["rng"])
            self.records = json.loads(state["records"])
        except Exception as error:
            raise ValueError(f"cannot resume from {file} ({error}); start anew with --overwrite") from error
        if "cuda_rng" in state and self.job.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
        return int(state["epoch"])


def _not_finite(what: str, step: int) -> ValueError:
    return ValueError(f"{what} {step}; lower --lr or use --precision fp32 (the last checkpoint is kept)")


def fit(job: Job, *, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Trains ``job`` from where its run stands to the last epoch; yields the record of each epoch (see ``runs``).

    Raises ValueError when the loss is no longer finite or a checkpoint cannot be written; what was saved before stays.
    """
    torch.manual_seed(job.config.system.seed)  # dropout
    if job.world.device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    trainer = Trainer(job)
    done, epochs = trainer.load_last(), job.config.optim.epochs
    with tqdm(
        total=epochs * len(trainer.paths),
        initial=done * len(trainer.paths),
        desc=job.config.exp,
        unit="img",
        disable=quiet,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no line twice a second
    ) as bar:
        for epoch in range(done + 1, epochs + 1):
            record = trainer.train_epoch(epoch, bar)
            record = trainer.finish_epoch(record | trainer.validate())
            bar.set_postfix_str(f"epoch {epoch}/{epochs}")
            yield record
