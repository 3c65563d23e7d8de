"""Evaluated runs written to disk, with numbers that can be worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from finetune101.config import ModelConfig, OptimConfig, SystemConfig, TrainConfig, to_dict
from finetune101.data.splits import Manifest
from finetune101.run import Run

WORLD = {"device": "cpu", "precision": "fp32", "channels_last": False}
SCORES = {"loss": 0.5, "top1": 50.0, "top1_interval": [40.0, 60.0], "top5": 90.0, "mean_per_class": 50.0}
RECORD = {
    "train_loss": 1.0, "train_top1": 50.0, "lr_head": 0.01, "lr_backbone": 0.001, "images_per_s": 10.0,
    "val_loss": 1.0, "val_seconds": 0.0, "seconds": 60.0, "best": True,
}  # fmt: skip


CLASSES = ("ant", "bee")


def as_by_the_first_version(root: Path) -> None:
    """Takes the format off every env.json below ``root``: only of such runs features may have cost nothing."""
    for file in root.rglob("env.json"):
        values = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in values.items() if key != "format"}))


def write_run(
    path: Path,
    wrong: set[int],
    *,
    test: int = 200,
    seed: int = 42,
    name: str = "efficientnet_lite0",
    source: str = "random (seed 0)",
    run_seed: int = 0,
    **more: Any,
) -> Run:
    """An evaluated run whose test images with a number in ``wrong`` are taken for the other class.

    ``more``: ``scores`` (validation accuracies by epoch), ``pretrain``, ``init_hash``, ``recipe``, ``classes``;
    ``first`` (seconds of a pass before the first epoch that solves the output layer, then the weights are its).
    """
    classes, first = more.get("classes", CLASSES), more.get("first")
    subsets = {
        "train": tuple(f"{c}/train_{i}.jpg" for c in classes for i in range(3)),
        "val": (),
        "test": tuple(f"{classes[i % 4 == 0]}/{i:04d}.jpg" for i in range(test)),
    }
    manifest = Manifest(
        protocol="reference", seed=seed, options={}, classes=classes, content_hash=f"sha256:{seed}", subsets=subsets
    )
    run = Run(path)
    path.mkdir(parents=True)
    head = "random" if first is None else "probe"
    size = 32 if "pretrain" in more else None
    model = ModelConfig(name=name, pretrain=more.get("pretrain", True), size=size, head=head)
    optim = OptimConfig(epochs=len(more.get("scores", [])) or 20)
    system = SystemConfig(seed=run_seed)
    config = TrainConfig(exp=path.name, model=model, optim=optim, system=system, recipe=more.get("recipe"))
    run.write_json("config.json", to_dict(config))
    run.write_json("split.json", manifest.to_json())
    run.write_json(
        "env.json",
        {
            "world": WORLD,
            "model": {"init_source": source, "init_hash": more.get("init_hash", "sha256:0123456789abcdef")},
        },
    )
    correct = test - len(wrong)
    scores = more.get("scores", [])
    epoch = scores.index(max(scores)) + 1 if scores else 7 if first is None else 0
    solved = {**RECORD, "epoch": 0, "step": 0, "val_top1": None, "seconds": first, "best": True}
    run.write_metrics(
        [solved] * (first is not None)
        + [
            {**RECORD, "epoch": e, "step": 10 * e, "val_top1": score, "best": score == max(scores[:e])}
            for e, score in enumerate(scores, 1)
        ]
    )
    counts = {"n": test, "correct": correct, "manifest_hash": manifest.hash(), "epoch": epoch}
    run.write_json("test.json", {**SCORES, **counts})
    with open(path / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "prediction", "confidence"])
        for i, image in enumerate(subsets["test"]):
            label = image.split("/")[0]
            writer.writerow([image, label, classes[1 - classes.index(label)] if i in wrong else label, "0.9"])
    return run
