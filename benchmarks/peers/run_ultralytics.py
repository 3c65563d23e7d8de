"""Ultralytics (AGPL-3.0: it is run, none of it is copied): YOLO(...).train with ResNet-18 as its package builds it.

Its networks are its own and torchvision's; EfficientNet-Lite0 is not among them. Its YAML of ResNet-18 asks for weights
from the net: the copy in the folder of the work asks for none.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import ultralytics
from clock import Clock, Work, do
from ultralytics import YOLO


def train(work: Work, clock: Clock) -> None:
    """Trains with the augmentation that all peers have."""
    source = Path(ultralytics.__file__).parent / "cfg/models/11/yolo11-cls-resnet18.yaml"
    file = Path(work["folder"]) / "yolo11-cls-resnet18.yaml"
    file.write_text(source.read_text(encoding="utf-8").replace("DEFAULT", "None"), encoding="utf-8")
    model = YOLO(str(file), task="classify")
    running: list[Any] = []

    def begin(name: str) -> None:
        part: contextlib.AbstractContextManager[None] = clock.part(name)
        part.__enter__()
        running.append(part)

    def end(trainer: Any) -> None:
        running.pop().__exit__(None, None, None)

    def trained(trainer: Any) -> None:
        end(trainer)
        begin("val_s")

    def validated(trainer: Any) -> None:
        if running:  # not the last validation of best.pt
            end(trainer)
            clock.top1(trainer.metrics["metrics/accuracy_top1"], 1)

    model.add_callback("on_train_epoch_start", lambda trainer: begin("train_s"))
    model.add_callback("on_train_batch_end", lambda trainer: clock.step())
    model.add_callback("on_train_epoch_end", trained)
    model.add_callback("on_fit_epoch_end", validated)
    model.train(
        data=work["data"],
        epochs=work["epochs"],
        imgsz=224,
        batch=work["batch_size"],
        workers=work["workers"],
        optimizer="SGD",
        lr0=0.01,
        momentum=0.9,
        nbs=work["batch_size"],
        warmup_epochs=0,
        scale=0.65,
        auto_augment=None,
        erasing=0.0,
        hsv_h=0.0,
        hsv_s=0.0,
        hsv_v=0.0,
        plots=False,
        device="cpu",
        project=work["folder"],
        name="run",
    )


if __name__ == "__main__":
    do(train)
