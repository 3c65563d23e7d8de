"""A finished run -> test.json and predictions.csv: the only place where the test set is scored."""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune101.config import DataConfig, Preprocessing
from finetune101.data import cache, dataset, splits, verify
from finetune101.data.batches import eval_batches
from finetune101.errors import Refused
from finetune101.evaluation import metrics
from finetune101.evaluation.inference import load_model, logits, mirrored, read_checkpoint, world_of
from finetune101.files import atomic
from finetune101.runs import Run
from finetune101.world import World


def scores(output: Tensor, labels: Tensor) -> dict[str, Any]:
    """Every number of one evaluation of logits (N, classes) against labels (N,); accuracies in percent."""
    prediction = output.argmax(1)
    correct = int((prediction == labels).sum())
    low, high = metrics.wilson(correct, len(labels))
    return {
        "n": len(labels),
        "correct": correct,
        "loss": metrics.cross_entropy(output, labels),
        "top1": 100 * correct / len(labels),
        "top1_interval": [low, high],
        "top5": metrics.top_k(output, labels, 5),
        "mean_per_class": metrics.mean_per_class(prediction, labels, output.shape[1]),
    }


@dataclass(frozen=True)
class Opened:
    """A network that is ready to be scored: its weights, its split and the images of it, and how it computes."""

    model: nn.Module
    preprocessing: Preprocessing
    manifest: splits.Manifest
    index: dataset.Index
    config: DataConfig
    world: World
    mirror: bool = False

    def logits(self, subset: str, batch_size: int) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and labels (N,) of ``subset``, in the manifest's order. Raises Refused without any."""
        paths, labels = self.manifest.subsets[subset], self.manifest.labels(subset)
        if not paths:
            raise Refused(f"the split has no {subset} images; choose another subset or make a split that has some")
        wanted = (path for paths in self.manifest.subsets.values() for path in paths)
        images = cache.open_images(self.index, self.preprocessing, self.config.cache, wanted=wanted)
        self.model.to(self.world.device, memory_format=self.world.memory_format)  # type: ignore[call-overload]
        batches = eval_batches(images, paths, labels, batch_size=batch_size, world=self.world)
        return logits(mirrored(self.model) if self.mirror else self.model, batches, self.world)

    @property
    def chosen_on_val(self) -> bool:
        """Whether there are validation images that were not trained on."""
        return bool(self.manifest.subsets["val"]) and self.config.fit_on == "train"


def open_scored(run: Run, data: str | None = None, known: dataset.Index | None = None, mirror: bool = False) -> Opened:
    """``run`` with its images, from ``data`` where that is given; ``known`` saves reading them again where it fits.

    Raises Refused when the images are not those of the split.
    """
    config = run.config().data
    config = config if data is None else dataclasses.replace(config, root=data)
    manifest = splits.from_json(run.read_json("split.json"))
    model, preprocessing, classes = load_model(run)
    if tuple(classes) != manifest.classes:
        raise Refused(f"{run.best} knows other classes than the split of {run.path}; train the run again")
    root = dataset.find(config.root)
    layout: Literal["folders", "classes"] = "folders" if manifest.protocol == "folders" else "classes"
    index = known if known and known.root == root else dataset.index(root, layout)
    splits.check(manifest, index)
    return Opened(model, preprocessing, manifest, index, config, world_of(run), mirror)


def evaluate(
    run: Run, *, subset: str = "test", data: str | None = None, batch_size: int = 64, mirror: bool = False
) -> dict[str, Any]:
    """Scores the best checkpoint of ``run`` on ``subset`` of its own split; "test" is written to the run directory.

    ``data`` overrides where the images are; with ``mirror`` each is seen twice (see ``inference.mirrored``). Raises
    Refused when the images are not those of the split.
    """
    check_batch_size(batch_size)
    opened = open_scored(run, data, mirror=mirror)
    output, labels = opened.logits(subset, batch_size)
    result = scores(output, labels)
    if subset == "test":
        result |= {
            "manifest_hash": opened.manifest.hash(),
            "protocol": opened.manifest.protocol,
            "epoch": int(read_checkpoint(run.best)[1]["epoch"]),
            "times_scored": times_scored(run) + 1,
            "mirror": mirror,
            "world": opened.world.describe(),
        }
        result |= calibrations(output, labels, opened.logits("val", batch_size) if opened.chosen_on_val else None)
        result["without_duplicates"] = _without_duplicates(opened, output.argmax(1) == labels)
        write_predictions(run.path / "predictions.csv", opened.manifest, output)
        run.write_json("test.json", result)
    return result


def check_batch_size(batch_size: int) -> None:
    """Raises Refused for one that cannot be."""
    if batch_size < 1:
        raise Refused(f"--batch-size is {batch_size}; give at least 1")


def times_scored(run: Run) -> int:
    """How often the test images of ``run`` were looked at: a test set that is looked at often is no test set."""
    return int(run.read_json("test.json").get("times_scored", 0)) if run.has("test.json") else 0


def _without_duplicates(opened: Opened, correct: Tensor) -> dict[str, Any]:
    """Top-1 (percent) on the test images of which no near-duplicate was trained on, and how many those are."""
    subsets, held = opened.manifest.subsets, ("train", "val") if opened.config.fit_on == "train+val" else ("train",)
    known = verify.with_duplicate(opened.index, subsets["test"], [path for part in held for path in subsets[part]])
    alone = torch.tensor([path not in known for path in subsets["test"]])
    n = int(alone.sum())
    return {"n": n, "top1": 100 * int(correct[alone].sum()) / n if n else None}


def calibrations(output: Tensor, labels: Tensor, val: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Calibration of logits as they are and, with logits and labels of validation images, by their temperature."""
    found: dict[str, Any] = {"calibration": calibration(output, labels)}
    if val:
        t = metrics.temperature(*val)
        found["calibration_scaled"] = {"temperature": t, **calibration(output / t, labels)}
    return found


def calibration(output: Tensor, labels: Tensor) -> dict[str, Any]:
    """Expected calibration error (a share) of logits (N, classes), and the bins behind it."""
    confidence, prediction = torch.softmax(output.double(), 1).max(1)
    bins = metrics.reliability(confidence.numpy(), prediction == labels)
    return {"ece": metrics.ece(bins), "bins": bins}


def write_predictions(out: Path, manifest: splits.Manifest, output: Tensor) -> None:
    """A CSV file: path, label, prediction, confidence of every test image."""
    confidence, prediction = torch.softmax(output, 1).max(1)
    with atomic(out) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "prediction", "confidence"])
        for path, p, c in zip(manifest.subsets["test"], prediction.tolist(), confidence.tolist(), strict=True):
            writer.writerow([path, dataset.class_of(path), manifest.classes[p], f"{c:.4f}"])
