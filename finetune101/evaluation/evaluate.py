"""A finished run -> test.json and predictions.csv: the only place where the test set is scored."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune101.config import DataConfig, Preprocessing
from finetune101.data import cache, dataset, splits, verify
from finetune101.data.batches import eval_batches
from finetune101.evaluation import metrics
from finetune101.evaluation.inference import load_model, logits, read_checkpoint, world_of
from finetune101.runs import Run, atomic
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


def evaluate(run: Run, *, subset: str = "test", data: str | None = None, batch_size: int = 64) -> dict[str, Any]:
    """Scores the best checkpoint of ``run`` on ``subset`` of its own split; "test" is written to the run directory.

    ``data`` overrides where the images are. Raises ValueError when the images are not those of the split.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; give at least 1")
    config = run.config()
    manifest = splits.from_json(run.read_json("split.json"))
    model, preprocessing, classes = load_model(run)
    if tuple(classes) != manifest.classes:
        raise ValueError(f"{run.best} knows other classes than the split of {run.path}; train the run again")
    source = config.data if data is None else dataclasses.replace(config.data, root=data)
    output, labels = subset_logits(model, preprocessing, manifest, source, world_of(run), subset, batch_size)
    result = scores(output, labels)
    if subset == "test":
        before = run.read_json("test.json") if run.has("test.json") else {}
        result |= {
            "manifest_hash": manifest.hash(),
            "protocol": manifest.protocol,
            "epoch": int(read_checkpoint(run.best)[1]["epoch"]),
            "times_scored": before.get("times_scored", 0) + 1,  # a test set that is looked at often is no test set
        }
        result["calibration"] = calibration(output, labels)
        if manifest.subsets["val"] and config.data.fit_on == "train":
            val = subset_logits(model, preprocessing, manifest, source, world_of(run), "val", batch_size)
            t = metrics.temperature(*val)
            result["calibration_scaled"] = {"temperature": t, **calibration(output / t, labels)}
        result["without_duplicates"] = _without_duplicates(manifest, source, output.argmax(1) == labels)
        write_predictions(run.path / "predictions.csv", manifest, output)
        run.write_json("test.json", result)
    return result


def _without_duplicates(manifest: splits.Manifest, data: DataConfig, correct: Tensor) -> dict[str, Any]:
    """Top-1 (percent) on the test images of which no near-duplicate was trained on, and how many those are."""
    held = ("train", "val") if data.fit_on == "train+val" else ("train",)
    trained = [path for subset in held for path in manifest.subsets[subset]]
    known = verify.with_duplicate(_index(manifest, data), manifest.subsets["test"], trained)
    alone = torch.tensor([path not in known for path in manifest.subsets["test"]])
    n = int(alone.sum())
    return {"n": n, "top1": 100 * int(correct[alone].sum()) / n if n else None}


def _index(manifest: splits.Manifest, data: DataConfig) -> dataset.Index:
    return dataset.index(dataset.find(data.root), "folders" if manifest.protocol == "folders" else "classes")


def calibration(output: Tensor, labels: Tensor) -> dict[str, Any]:
    """Expected calibration error (a share) of logits (N, classes), and the bins behind it."""
    confidence, prediction = torch.softmax(output.double(), 1).max(1)
    bins = metrics.reliability(confidence.numpy(), prediction == labels)
    return {"ece": metrics.ece(bins), "bins": bins}


def subset_logits(
    model: nn.Module,
    preprocessing: Preprocessing,
    manifest: splits.Manifest,
    data: DataConfig,
    world: World,
    subset: str,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) for the images of ``subset``, in the manifest's order."""
    paths = manifest.subsets[subset]
    if not paths:
        raise ValueError(f"the split has no {subset} images; choose another subset or make a split that has some")
    index = _index(manifest, data)
    splits.check(manifest, index)
    images = cache.open_images(index, preprocessing, data.cache, manifest.options.get("skipped", ()))
    model.to(world.device, memory_format=world.memory_format)  # type: ignore[call-overload]
    batches = eval_batches(images, paths, manifest.labels(subset), batch_size=batch_size, world=world)
    return logits(model, batches, world)


def write_predictions(out: Path, manifest: splits.Manifest, output: Tensor) -> None:
    """A CSV file: path, label, prediction, confidence of every test image."""
    confidence, prediction = torch.softmax(output, 1).max(1)
    with atomic(out) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "prediction", "confidence"])
        for path, p, c in zip(manifest.subsets["test"], prediction.tolist(), confidence.tolist(), strict=True):
            writer.writerow([path, dataset.class_of(path), manifest.classes[p], f"{c:.4f}"])
