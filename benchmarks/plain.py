"""The baseline: a training loop in the style of the original project, with nothing done for speed.

ImageFolder-like reading with PIL in a DataLoader, Resize((224, 224)) and a flip, fp32, NCHW, eager, SGD.
``python benchmarks/plain.py --model resnet18 --split split.json --data FOLDER`` prints one JSON line: seconds of each
epoch's training and validation with the number of workers that is fastest here, of 0, 1, 2 and 4 (``--workers``).
Random weights: they cost what pretrained ones cost.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

TIMM = {"efficientnet_lite0": "tf_efficientnet_lite0", "efficientnet_lite2": "tf_efficientnet_lite2"}
WORKERS = (0, 1, 2, 4)  # of a DataLoader: the best of them is what a plain loop can do
NORMALIZE = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Images(Dataset):
    """Images of a manifest's subset, opened anew every time."""

    def __init__(self, root: Path, paths: list[str], classes: list[str], transform: transforms.Compose) -> None:
        self.root, self.paths, self.classes, self.transform = root, paths, classes, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path = self.paths[i]
        with Image.open(self.root / path) as image:
            return self.transform(image.convert("RGB")), self.classes.index(path.split("/")[-2])


def build(name: str, classes: int) -> nn.Module:
    """The network, from timm or torchvision, with random weights."""
    if name in TIMM:
        return timm.create_model(TIMM[name], num_classes=classes)
    return torchvision.models.get_model(name, num_classes=classes)


def main() -> None:
    """Trains and validates ``--epochs`` times with each number of workers and prints the seconds of the fastest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    arguments = parser.parse_args()
    tried = [measure(arguments, workers) for workers in arguments.workers]
    print(json.dumps(min(tried, key=lambda epochs: sum(epoch["train_s"] + epoch["val_s"] for epoch in epochs))))


def measure(arguments: argparse.Namespace, workers: int) -> list[dict[str, float]]:
    """Seconds of training and validation of each epoch, with that many processes that decode."""
    split = json.loads(arguments.split.read_text())
    flip = [transforms.Resize((224, 224)), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALIZE]
    loaders = [
        DataLoader(
            Images(arguments.data, split["subsets"][subset], split["classes"], transforms.Compose(steps)),
            batch_size=arguments.batch_size,
            shuffle=subset == "train",
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        for subset, steps in (("train", flip), ("val", [flip[0], *flip[2:]]))
    ]
    model = build(arguments.model, len(split["classes"]))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for inputs, labels in islice(loaders[0], 1):  # what only the first step pays for is not counted
        criterion(model(inputs), labels).backward()
    epochs = []
    for _ in range(arguments.epochs):
        started = time.perf_counter()
        model.train()
        for inputs, labels in loaders[0]:
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
            loss.item()
        trained = time.perf_counter()
        model.eval()
        with torch.no_grad():
            for inputs, labels in loaders[1]:
                criterion(model(inputs), labels).item()
        epochs.append({"train_s": trained - started, "val_s": time.perf_counter() - trained, "workers": workers})
    return epochs


if __name__ == "__main__":
    main()
