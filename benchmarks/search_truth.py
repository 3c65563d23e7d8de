"""Trains every point of a grid on several folds and schedules: ``python benchmarks/search_truth.py --data DATA``.

What a search sees (one fold) and what is true (the mean over all folds) are then both known, so that
``search_cost.py`` can say what each strategy would have cost. The folds share out the training and validation images
of the reference split; its test images are not looked at. The output layer is trained on frozen features
(--stage probe), in the original's schedule: a rate that drops once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from finetune101.config import DataConfig, change
from finetune101.data.images import class_of, content_hash, find_data, index_images
from finetune101.data.splits import Manifest
from finetune101.experiments.point_run import identity
from finetune101.experiments.runner import Ended, Epoch, LocalWorkers, Task, run_tasks
from finetune101.experiments.search_plan import Plan
from finetune101.experiments.settings import SearchOptions
from finetune101.experiments.space import planned_search, point_label, points
from finetune101.experiments.stage import shortened_schedule
from finetune101.files import write_json
from finetune101.recipes import original
from finetune101.training.job import make_manifest

GRID = ("lr=0.003,0.01,0.03,0.1", "weight_decay=0,0.0001,0.001", "batch_size=64,256")


def folds(whole: Manifest, digests: Any, count: int) -> list[Manifest]:
    """``count`` splits of the training and validation images of ``whole``: each image validates in one of them."""
    rng = np.random.RandomState(0)
    members: list[list[str]] = [[] for _ in range(count)]
    for name in whole.classes:
        pool = sorted(p for part in ("train", "val") for p in whole.subsets[part] if class_of(p) == name)
        for number, i in enumerate(rng.permutation(len(pool))):
            members[(number + len(name)) % count].append(pool[i])
    splits = []
    for number in range(count):
        train = sorted(path for k, own in enumerate(members) if k != number for path in own)
        subsets = {"train": tuple(train), "val": tuple(sorted(members[number])), "test": ()}
        used = [path for paths in subsets.values() for path in paths]
        splits.append(dataclasses.replace(whole, subsets=subsets, content_hash=content_hash(digests, used)))
    return splits


def main() -> int:
    """Trains what is missing and writes OUT/truth.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/search_cost"))
    arguments = parser.parse_args()
    folder = Path(arguments.runs) / "truth"
    index = index_images(find_data(arguments.data))
    whole = make_manifest(index, DataConfig(root=arguments.data))
    base = change(original("truth"), {"runs": arguments.runs, "data": arguments.data, "model": arguments.model})
    base = change(base, {"step_size": 10})
    base, space = planned_search(base, SearchOptions(grid=GRID, stage="probe"))
    shares = Plan(base=base, space=space, pruner="halving").shares()
    tasks: dict[str, tuple[str, int, int]] = {}
    configs = []
    for number, split in enumerate(folds(whole, index.digests, arguments.folds)):
        file = folder / "splits" / f"fold{number}.json"
        write_json(file, split.to_json())
        for point in points(space):
            for share in shares:
                config = shortened_schedule(change(base, {**point, "split": str(file)}), share)
                config = dataclasses.replace(config, exp=f"truth/fold{number}/{identity(config)}")
                tasks[config.exp] = point_label(point), number, config.optim.epochs
                configs.append(config)
    scores: dict[str, dict[int, dict[int, list[float]]]] = {}
    steps: dict[str, dict[int, int]] = {}
    for event in run_tasks(map(Task, configs), LocalWorkers(arguments.jobs)):
        if isinstance(event, Epoch):
            label, number, epochs = tasks[event.task.config.exp]
            scores.setdefault(label, {}).setdefault(epochs, {}).setdefault(number, []).append(event.record["val_top1"])
            steps.setdefault(label, {})[epochs] = event.record["step"]
        elif isinstance(event, Ended):
            print(event.task.config.exp, tasks[event.task.config.exp][0], flush=True)
        elif event is not None:
            raise SystemExit(str(event))
    grid = [
        {
            "point": point,
            "steps": steps[point_label(point)],
            "curves": {epochs: [own[n] for n in sorted(own)] for epochs, own in scores[point_label(point)].items()},
        }
        for point in points(space)
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    value = {
        "model": arguments.model,
        "folds": arguments.folds,
        "validated": len(whole.subsets["train"]) + len(whole.subsets["val"]),
        "grid": grid,
    }
    (arguments.out / "truth.json").write_text(json.dumps(value) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
