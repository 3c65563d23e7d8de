"""Runs on a real Ray cluster: two nodes on loopback, compared with the same runs in processes of this machine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune101.config import TrainConfig
from finetune101.experiments.cluster import RayWorkers
from finetune101.experiments.runner import Ended, Epoch, Event, Failed, LocalWorkers, Task, Workers, run_tasks
from finetune101.run import Run

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'finetune101[cluster]'")

EPOCHS, SEEDS = 3, 4
COMPARED = ("epoch", "step", "val_loss", "val_top1")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A head without CPUs and two nodes with two CPUs each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    ray.init(nodes.address, log_to_driver=False, logging_level="critical")  # all tests share the processes of the nodes
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def tasks(small: TrainConfig) -> Callable[[str], list[Task]]:
    """Makes the same four runs in another folder: tasks("name")."""

    def make(folder: str) -> list[Task]:
        one = dataclasses.replace(
            small,
            runs=str(Path(small.runs) / folder),
            optim=dataclasses.replace(small.optim, epochs=EPOCHS),
        )
        systems = [dataclasses.replace(small.system, seed=seed) for seed in range(SEEDS)]
        return [Task(dataclasses.replace(one, exp=f"r{system.seed}", system=system)) for system in systems]

    return make


def all_events(tasks: list[Task], workers: Workers, **options: Any) -> list[Event]:
    return [event for event in run_tasks(tasks, workers, **options) if event is not None]


def metrics(run: Run) -> list[list[Any]]:
    return [[record[key] for key in COMPARED] for record in run.metrics()]


@pytest.fixture
def local(tasks: Callable[[str], list[Task]]) -> dict[str, list[list[Any]]]:
    """What the four runs learn in processes of this machine: by name."""
    runs = tasks("local")
    assert all(isinstance(event, Epoch | Ended) for event in all_events(runs, LocalWorkers(2)))
    return {task.config.exp: metrics(task.run) for task in runs}


def check_all(runs: list[Task], events: list[Event], local: dict[str, list[list[Any]]]) -> None:
    """Every epoch arrived once, every run ended, and all are equal to the local ones."""
    failures = [str(event) for event in events if isinstance(event, Failed)]
    assert failures == []
    epochs = Counter((event.task.config.exp, event.record["epoch"]) for event in events if isinstance(event, Epoch))
    assert epochs == {(task.config.exp, epoch): 1 for task in runs for epoch in range(1, EPOCHS + 1)}
    assert Counter(event.task for event in events if isinstance(event, Ended)) == dict.fromkeys(runs, 1)
    assert {task.config.exp: metrics(task.run) for task in runs} == local


def test_runs_on_two_nodes_equal_local_ones(two_nodes: Any, tasks: Any, local: Any) -> None:
    runs = tasks("shared")
    check_all(runs, all_events(runs, RayWorkers(two_nodes.address)), local)
    assert not list(Path(runs[0].config.runs).glob(".shared-*"))
    again = all_events(runs, RayWorkers(two_nodes.address))  # nothing is trained twice
    assert [event.is_new for event in again if isinstance(event, Epoch)] == [False] * EPOCHS * SEEDS


def test_files_come_back_from_nodes_that_share_no_folder(
    two_nodes: Any, tasks: Any, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RayWorkers, "_token", lambda self, runs: runs / "elsewhere")
    runs = [dataclasses.replace(task, is_tested=True) for task in tasks("alone")]
    check_all(runs, all_events(runs, RayWorkers(two_nodes.address)), local)
    for task in runs:
        assert task.is_done() and task.run.best.is_file() and not task.run.last.exists()


def test_a_killed_node_costs_no_epoch_and_repeats_none(two_nodes: Any, tasks: Any, local: Any) -> None:
    runs, killed, events = tasks("killed"), False, []
    node = two_nodes.add_node(num_cpus=2)
    workers = RayWorkers(two_nodes.address, jobs=6)
    busy = [node for node in two_nodes.list_all_nodes() if node is not two_nodes.head_node]
    for event in run_tasks(runs, workers):
        if event is not None:
            events.append(event)
        if not killed and isinstance(event, Epoch):
            two_nodes.remove_node(busy[0], allow_graceful=False)
            killed = True
    assert node and killed
    check_all(runs, events, local)
