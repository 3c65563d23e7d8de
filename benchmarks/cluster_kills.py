"""Kills nodes and workers of a Ray cluster and counts what it costs: ``python benchmarks/cluster_kills.py --kills 20``.

A small study over drawn images runs again and again on a cluster of two nodes on loopback, with two workers each. Every
second kill hits a whole node, which another one replaces, the others a worker that trains; all with SIGKILL. Each
study is compared with one that nobody disturbed, in processes of this machine: every epoch of every run arrived once,
every run ended once, the same metrics. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported

from recorded import learned, record, seeds_of

from finetune101.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from finetune101.demo.dataset import draw
from finetune101.experiments.cluster import RayWorkers
from finetune101.experiments.runner import Ended, Epoch, Event, LocalWorkers, Task, run_tasks

RUNS, EPOCHS = 8, 4
PAUSE = 1.0  # seconds at least between two kills


@dataclass
class Tally:
    """What the kills cost, over all studies."""

    kills: int = 0
    of_nodes: int = 0
    studies: int = 0
    lost: int = 0
    repeated: int = 0
    different: int = 0
    notes: list[str] = field(default_factory=list)

    def failures(self) -> int:
        """Runs that are not as they would be without kills."""
        return self.lost + self.repeated + self.different


def tasks(folder: Path, data: Path) -> list[Task]:
    """The runs of a study: seeds of one small network."""
    config = TrainConfig(
        exp="",
        runs=str(folder),
        data=DataConfig(root=str(data)),
        model=ModelConfig(name="squeezenet1_1", pretrain=False, size=32),
        optim=OptimConfig(epochs=EPOCHS, batch_size=8),
    )
    return seeds_of(config, RUNS)


def metrics(runs: list[Task]) -> dict[str, list[list[Any]]]:
    """What the runs learned, epoch by epoch."""
    return {task.config.exp: learned(task.run.path) for task in runs}


def training_workers() -> Iterator[int]:
    """Process numbers of the workers of Ray that train at this moment, which their titles tell."""
    done = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        pid, _, title = line.strip().partition(" ")
        if title.startswith("ray::train_on_node"):
            yield int(pid)


def kill_one(cluster: Any, rng: random.Random, tally: Tally) -> None:
    """Kills a node, and adds another, or a worker that trains."""
    if tally.kills % 2 == 0:
        nodes = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
        cluster.remove_node(rng.choice(nodes), allow_graceful=False)
        cluster.add_node(num_cpus=2)
        tally.of_nodes += 1
    else:
        workers = list(training_workers())
        if not workers:
            return
        os.kill(rng.choice(workers), signal.SIGKILL)
    tally.kills += 1


def disturbed(runs: list[Task], cluster: Any, kills: int, rng: random.Random, tally: Tally) -> list[Event]:
    """Trains ``runs`` on the cluster, at which it kills until the tally has ``kills``; all events."""
    events = []
    at = time.monotonic() + rng.uniform(PAUSE, 8 * PAUSE)
    for event in run_tasks(runs, RayWorkers(cluster.address, jobs=4)):
        if event is not None:
            events.append(event)
        if tally.kills < kills and time.monotonic() > at and any(isinstance(event, Epoch) for event in events):
            kill_one(cluster, rng, tally)
            at = time.monotonic() + rng.uniform(PAUSE, 8 * PAUSE)
    return events


def judge(runs: list[Task], events: list[Event], truth: dict[str, list[list[Any]]], tally: Tally) -> None:
    """Adds to the tally what a study lost, repeated or changed."""
    tally.studies += 1
    results = metrics(runs)
    for task in runs:
        name = task.config.exp
        epochs = Counter(event.record["epoch"] for event in events if event.task == task and isinstance(event, Epoch))
        ends = [event for event in events if event.task == task and not isinstance(event, Epoch)]
        if set(epochs) != set(range(1, EPOCHS + 1)) or not any(isinstance(end, Ended) for end in ends):
            tally.lost += 1
            tally.notes.append(f"{name}: {dict(epochs)}, {'; '.join(map(str, ends))}")
        elif max(epochs.values()) > 1 or len(ends) > 1:
            tally.repeated += 1
            tally.notes.append(f"{name}: {dict(epochs)}, {len(ends)} ends")
        elif results[name] != truth[name]:
            tally.different += 1
            tally.notes.append(f"{name}: {results[name]} rather than {truth[name]}")


def stress(kills: int, seed: int, folder: Path) -> Tally:
    """Kills until there were ``kills``, and judges every study."""
    from ray.cluster_utils import Cluster

    data = draw(folder / "images", classes=3, images_per_class=20)
    undisturbed = tasks(folder / "truth", data)
    for _ in run_tasks(undisturbed, LocalWorkers(2)):
        pass
    truth = metrics(undisturbed)
    tally, rng = Tally(), random.Random(seed)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    while tally.kills < kills:
        runs = tasks(folder / f"study_{tally.studies}", data)
        judge(runs, disturbed(runs, cluster, kills, rng, tally), truth, tally)
        print(tally, flush=True)
    cluster.shutdown()
    return tally


def main() -> int:
    """1 when anything was lost, repeated or changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        os.environ["FINETUNE101_CACHE"] = str(Path(name) / "cache")
        tally = stress(arguments.kills, arguments.seed, Path(name))
    values = {**vars(tally), "failures": tally.failures(), "runs": RUNS, "epochs": EPOCHS, "workers": 4, "nodes": 2}
    values["seconds"] = round(time.perf_counter() - started)
    print(json.dumps(values, indent=1))
    record(values, arguments.out)
    return int(tally.failures() > 0)


if __name__ == "__main__":
    sys.exit(main())
