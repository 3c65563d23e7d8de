"""Epoch records into TensorBoard events, beside everything else that a run writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from finetune101.runs import Run

TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "train_top1": "accuracy/train",
    "val_top1": "accuracy/val",
    "lr_head": "learning_rate/head",
    "lr_backbone": "learning_rate/backbone",
    "images_per_s": "speed/images_per_s",
}


def log(run: Run, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Passes ``records`` on, each written to the run's TensorBoard events, by epoch."""
    writer = SummaryWriter(str(run.path))
    try:
        for record in records:
            for key, tag in TAGS.items():
                if record[key] is not None:
                    writer.add_scalar(tag, record[key], record["epoch"])
            writer.flush()
            yield record
    finally:
        writer.close()
