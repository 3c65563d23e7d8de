"""Ours against the plain loop, A B A B, on a fixed stratified subset: images/s of whole epochs, and peak memory.

``python benchmarks/paired.py --data FOLDER --models resnet18 efficientnet_lite0 --pairs 5`` writes
results/speed/paired_<model>.json: every measurement, medians and the ratio's spread. Each measurement is a process of
its own, the plain loop's with the number of workers that is fastest (0, 1, 2 or 4); neither side pays for start-up or
for building the cache: the plain loop makes one step before it counts, ours counts its second epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from finetune101.data import splits
from finetune101.data.images import Index, content_hash, find_data, index_images

HERE = Path(__file__).resolve().parent
TRAIN, VAL = 640, 96  # images of the subset
FULL_TRAIN, FULL_VAL = 6003, 904  # of the reference split


def subset(split: splits.Manifest, index: Index) -> splits.Manifest:
    """``split`` with TRAIN and VAL of its images, taken evenly from its classes."""
    subsets = dict(split.subsets)
    for name, count in (("train", TRAIN), ("val", VAL)):
        classes = defaultdict(list)
        for path in split.subsets[name]:
            classes[path.split("/")[-2]].append(path)
        ranked = sorted((i, path) for paths in classes.values() for i, path in enumerate(sorted(paths)))
        subsets[name] = tuple(sorted(path for _, path in ranked[:count]))
    used = [path for paths in subsets.values() for path in paths]
    return dataclasses.replace(split, subsets=subsets, content_hash=content_hash(index.digests, used))


def peak_memory(process: subprocess.Popen[str]) -> float:
    """Waits for ``process``; its highest anonymous memory in MB (Linux), so not the memory-mapped cache."""
    peak = 0.0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))])
        except (OSError, ValueError):
            pass
        time.sleep(0.05)
    return peak


def measure(command: list[str], read: Any) -> dict[str, float]:
    """Runs ``command``; ``read`` turns its output into (train seconds, validation seconds) of the second epoch."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    memory = peak_memory(process)
    out, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    train, val = read(out)
    scaled = train * FULL_TRAIN / TRAIN + val * FULL_VAL / VAL
    return {"train_s": train, "val_s": val, "epoch_s": scaled, "images_per_s": FULL_TRAIN / scaled, "peak_mb": memory}


def pair(model: str, data: Path, split: Path, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """One measurement of the plain loop and one of ours."""
    flags = ["--model", model, "--data", str(data), "--split", str(split), "--batch-size", "64"]

    def read_plain(out: str) -> tuple[float, float]:
        epoch = json.loads(out.splitlines()[-1])[-1]  # of the best number of workers
        return epoch["train_s"], epoch["val_s"]

    def read_ours(_: str) -> tuple[float, float]:
        epoch = json.loads((folder / "runs/speed/metrics.jsonl").read_text().splitlines()[-1])
        return epoch["seconds"], epoch["val_seconds"]

    plain = measure([sys.executable, str(HERE / "plain.py"), *flags, "--epochs", "1"], read_plain)
    train = [sys.executable, "-m", "finetune101", "train", "--exp", "speed", "--runs", str(folder / "runs")]
    recipe = ["--recipe", "original", "--overwrite", "--no-pretrain", "--size", "224", "--epochs", "2"]
    return plain, measure([*train, *recipe, *flags], read_ours)


def summary(model: str, plain: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the ratio of each pair."""
    ratios = [b["images_per_s"] / a["images_per_s"] for a, b in zip(plain, ours, strict=True)]
    memory = [b["peak_mb"] / a["peak_mb"] for a, b in zip(plain, ours, strict=True)]
    return {
        "model": model,
        "pairs": len(ratios),
        "plain_images_per_s": round(statistics.median(a["images_per_s"] for a in plain), 1),
        "ours_images_per_s": round(statistics.median(b["images_per_s"] for b in ours), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "memory_ratio": round(statistics.median(memory), 2),
        "plain_20_epochs_s": round(20 * statistics.median(a["epoch_s"] for a in plain)),
        "cores": os.cpu_count(),
        "measurements": {"plain": plain, "ours": ours},
    }


def main() -> None:
    """Measures every model asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", type=Path, default=HERE.parent / "results/splits/reference_seed42.json")
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2", "efficientnet_lite0", "alexnet"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/speed")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = folder / "split.json"
        chosen = subset(splits.read_split(arguments.split), index_images(find_data(str(arguments.data))))
        split.write_text(json.dumps(chosen.to_json()))
        for model in arguments.models:
            plain, ours = [], []
            for number in range(1, arguments.pairs + 1):
                a, b = pair(model, arguments.data, split, folder)
                plain.append(a)
                ours.append(b)
                rates = f"{a['images_per_s']:.1f} -> {b['images_per_s']:.1f} images/s"
                print(
                    f"{model} {number}/{arguments.pairs}: {rates}, {a['peak_mb']:.0f} -> {b['peak_mb']:.0f} MB",
                    flush=True,
                )
            result = summary(model, plain, ours)
            (arguments.out / f"paired_{model}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(f"{model}: {result['ratio']} times {result['ratio_range']}, memory {result['memory_ratio']} times")


if __name__ == "__main__":
    main()
