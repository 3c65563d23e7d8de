"""timm by its own parts: loaders, optimizer and schedule as its train.py puts them together, in a short loop.

train.py itself is in no package. Its rules of the rate: .1 for batches of 256, in proportion for others; weight decay
2e-5; cosine over the epochs (without its five epochs of warm-up, which two minutes do not hold). --channels-last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from clock import Clock, Work, do, write_labels
from timm.data import ImageDataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, accuracy
from torch import nn

NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}
CPU = torch.device("cpu")


def network(work: Work) -> nn.Module:
    """The network with the weights of the work, in channels-last."""
    own_name: str = work["network"]
    model = timm.create_model(NAMES.get(own_name, own_name), num_classes=len(work["classes"]))
    if work["weights"]:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(work["weights"]), strict=False)  # the new output layer is not in the file
    return model.to(memory_format=torch.channels_last)


def loader(work: Work, model: nn.Module, folder: Path, training: bool) -> Any:
    """timm's loader of a folder of images, with the settings of the network's weights."""
    config = resolve_data_config({"mean": work["mean"], "std": work["std"]}, model=model)
    own = work["recipe"] == "own"
    augment: dict[str, Any] = (
        {"color_jitter": 0.4 if own else 0.0, "scale": (0.08 if own else 0.35, 1.0)} if training else {}
    )
    return create_loader(
        ImageDataset(str(folder)),
        input_size=config["input_size"],
        batch_size=work["batch_size"],
        is_training=training,
        interpolation="random" if training else config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        num_workers=work["workers"],
        persistent_workers=work["workers"] > 0,
        pin_memory=False,
        device=CPU,
        **augment,
    )


def train(work: Work, clock: Clock) -> None:
    """Trains, validates and keeps a checkpoint per epoch."""
    own = work["recipe"] == "own"
    model = network(work)
    train_loader = loader(work, model, Path(work["data"]) / "train", training=True)
    val_loader = loader(work, model, Path(work["data"]) / "val", training=False)
    rate = 0.1 * work["batch_size"] / 256 if own else 0.01
    optimizer = create_optimizer_v2(model, opt="sgd", lr=rate, weight_decay=2e-5, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=work["epochs"], warmup_epochs=0)
    criterion = LabelSmoothingCrossEntropy(0.1) if own else nn.CrossEntropyLoss()
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=work["folder"], recovery_dir=work["folder"])
    for epoch in range(work["epochs"]):
        model.train()
        with clock.part("train_s"):
            losses = AverageMeter()
            for images, labels in train_loader:
                with torch.autocast("cpu", torch.bfloat16, enabled=work["bf16"]):
                    loss = criterion(model(images.contiguous(memory_format=torch.channels_last)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.update(loss.item(), images.size(0))
                clock.step()
        scheduler.step(epoch + 1)
        if own and epoch < work["epochs"] - 1:
            continue
        model.eval()
        with clock.part("val_s"), torch.inference_mode():
            top1 = AverageMeter()
            for images, labels in val_loader:
                with torch.autocast("cpu", torch.bfloat16, enabled=work["bf16"]):
                    output = model(images.contiguous(memory_format=torch.channels_last))
                top1.update(accuracy(output, labels)[0].item(), images.size(0))
        clock.top1(top1.avg, 100)
        saver.save_checkpoint(epoch, metric=top1.avg)


def predict(work: Work) -> None:
    """Labels of a folder of photos."""
    model = network(work).eval()
    batches = loader(work, model, Path(work["photos"]), training=False)
    labels: list[int] = []
    scores: list[float] = []
    with torch.inference_mode():
        for images, _ in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=work["bf16"]):
                output = model(images.contiguous(memory_format=torch.channels_last))
            best = output.float().softmax(-1).topk(1)
            labels += best.indices[:, 0].tolist()
            scores += best.values[:, 0].tolist()
    write_labels(work, [Path(name) for name in batches.dataset.filenames(basename=True)], labels, scores)


if __name__ == "__main__":
    do(train, predict=predict)
