"""Wall time of the same runs on a Ray cluster of one node and in local processes: ``python cluster_overhead.py``.

Twelve runs of a small network on drawn images, two at a time; both ways begin with no process started, and the cluster
itself runs, as it does for a user. Repeats alternate, the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported

from recorded import record, seeds_of

from finetune101.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from finetune101.demo.dataset import draw
from finetune101.experiments.cluster import RayWorkers
from finetune101.experiments.runner import Failed, LocalWorkers, Task, Workers, run_tasks

RUNS, JOBS = 12, 2


def tasks(folder: Path, data: Path, epochs: int) -> list[Task]:
    """The runs: seeds of one network."""
    config = TrainConfig(
        exp="",
        runs=str(folder),
        data=DataConfig(root=str(data)),
        model=ModelConfig(name="resnet18", pretrain=False, size=64),
        optim=OptimConfig(epochs=epochs, batch_size=16),
    )
    return seeds_of(config, RUNS)


def timed(runs: list[Task], make_workers: Callable[[], Workers]) -> tuple[float, float]:
    """Seconds from the start of the workers to the end of the last run, and those that the epochs took."""
    started = time.perf_counter()
    for event in run_tasks(runs, make_workers()):
        if isinstance(event, Failed):
            raise RuntimeError(str(event))
    seconds = time.perf_counter() - started
    records = [record for task in runs for record in task.run.metrics()]
    return seconds, sum(record["seconds"] + record["val_seconds"] for record in records)


def main() -> int:
    """Prints and writes the seconds of both ways and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    arguments = parser.parse_args()
    from ray.cluster_utils import Cluster

    seconds: dict[str, list[float]] = {"cluster": [], "local": []}
    trained: dict[str, list[float]] = {"cluster": [], "local": []}
    with tempfile.TemporaryDirectory() as name:
        os.environ["FINETUNE101_CACHE"] = str(Path(name) / "cache")
        data = draw(Path(name) / "images", classes=6, images_per_class=40)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": JOBS, "include_dashboard": False})
        timed(tasks(Path(name) / "warm", data, 1)[:1], lambda: LocalWorkers(1))  # decodes the images
        ways: dict[str, Callable[[], Workers]] = {
            "cluster": lambda: RayWorkers(cluster.address, jobs=JOBS),
            "local": lambda: LocalWorkers(JOBS),
        }
        for repeat in range(arguments.repeats):
            for way, make_workers in ways.items():
                runs = tasks(Path(name) / f"{way}_{repeat}", data, arguments.epochs)
                wall, epochs = timed(runs, make_workers)
                seconds[way].append(round(wall, 2))
                trained[way].append(round(epochs, 2))
                print(f"{way}: {wall:.1f} s, of them epochs {epochs / JOBS:.1f} s", flush=True)
        cluster.shutdown()
    values = {
        "runs": RUNS,
        "jobs": JOBS,
        "epochs": arguments.epochs,
        "seconds": seconds,
        "seconds_of_epochs": trained,
        "ratio": round(statistics.median(seconds["cluster"]) / statistics.median(seconds["local"]), 3),
    }
    print(json.dumps(values, indent=1))
    record(values, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
