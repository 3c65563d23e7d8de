"""The second baseline: frozen features by a plain loop, for a linear head that is fitted afterwards.

ImageFolder-like reading with PIL in a DataLoader with the best of 0, 1, 2 and 4 workers, fp32, NCHW, eager. Times the
networks of the probe recipe on some images of the split and scales to all training and validation images; fitting the
head is not counted. ``python benchmarks/plain_features.py --data FOLDER`` writes results/speed/plain_features.json.
Random weights: they cost what pretrained ones cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from plain import NORMALIZE, WORKERS, Images, build
from torch.utils.data import DataLoader
from torchvision import transforms

HERE = Path(__file__).resolve().parent
NETWORKS = {"efficientnet_lite0": 224, "efficientnet_lite2": 260}  # and their input sizes
BATCH, BATCHES = 64, 8


def rate(
    name: str, size: int, data: Path, split: dict[str, dict[str, list[str]]], classes: list[str], workers: int
) -> float:
    """Images/s of the frozen network in one pass, decoding by ``workers`` processes included.

    The clock runs from the start of the workers to the last batch, so that it counts the decoding of every image.
    (Workers decode ahead: a clock that starts at the first batch would not count what is decoded by then.) Starting
    the workers takes less than a hundredth of the time.
    """
    steps = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor(), NORMALIZE])
    train = split["subsets"]["train"]
    paths = train[:: len(train) // (BATCH * BATCHES)][: BATCH * BATCHES]
    model = build(name, len(classes)).eval()
    loader = DataLoader(Images(data, paths, classes, steps), BATCH, num_workers=workers)
    with torch.no_grad():
        model(torch.zeros(BATCH, 3, size, size))  # what only the first batch pays for is not counted
        started = time.perf_counter()
        for inputs, _ in loader:
            model(inputs)
    return len(paths) / (time.perf_counter() - started)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", type=Path, default=HERE.parent / "results/splits/reference_seed42.json")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    split = json.loads(arguments.split.read_text())
    images = len(split["subsets"]["train"]) + len(split["subsets"]["val"])
    rows = []
    for _ in range(arguments.repeats):
        rates = {
            name: max(rate(name, size, arguments.data, split, split["classes"], workers) for workers in WORKERS)
            for name, size in NETWORKS.items()
        }
        rows.append({**rates, "seconds": sum(images / one for one in rates.values())})
        print({key: round(value, 1) for key, value in rows[-1].items()}, flush=True)
    medians = {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]}
    result = {"images": images, **medians, "measurements": rows, "cores": os.cpu_count()}
    (HERE.parent / "results/speed/plain_features.json").write_text(json.dumps(result, indent=1) + "\n")
    print(medians)


if __name__ == "__main__":
    main()
