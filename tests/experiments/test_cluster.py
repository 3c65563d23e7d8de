"""Runs on a real Ray cluster: two nodes on loopback, compared with the same runs in processes of this machine."""

from __future__ import annotations

import dataclasses
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune101.config import DataConfig, ModelConfig, OptimConfig, SystemConfig, TrainConfig
from finetune101.errors import Refused
from finetune101.experiments import cluster, runner
from finetune101.experiments.cluster import Driver, RayWorkers, connect, fault_of_node, files_of, write_files
from finetune101.experiments.runner import Ended, Epoch, Event, Failed, LocalWorkers, Task, Workers, run_tasks

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'finetune101[cluster]'")

EPOCHS, SEEDS = 3, 4
COMPARED = ("epoch", "step", "val_loss", "val_top1")
Metrics = dict[str, list[list[Any]]]


@pytest.fixture(scope="module")
def nodes(own_cache: None) -> Iterator[Any]:
    """A head without CPUs and two nodes with a CPU each; all tests of this file share the processes on them."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    made = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    ray.init(made.address, log_to_driver=False, logging_level="critical")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def tasks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Task]]:
    """Makes the same four runs in a folder of that name: tasks("name")."""
    folder = tmp_path_factory.mktemp("cluster")

    def make(name: str) -> list[Task]:
        config = TrainConfig(
            exp="",
            runs=str(folder / name),
            data=DataConfig(root=str(tiny_data)),
            model=ModelConfig(name="squeezenet1_1", pretrain=False, size=32),
            optim=OptimConfig(epochs=EPOCHS, batch_size=8),
        )
        systems = [SystemConfig(threads=1, seed=seed) for seed in range(SEEDS)]
        return [Task(dataclasses.replace(config, exp=f"r{system.seed}", system=system)) for system in systems]

    return make


@pytest.fixture(scope="module")
def local(tasks: Callable[[str], list[Task]]) -> Metrics:
    """What the four runs learn in processes of this machine."""
    runs = tasks("local")
    all_events(runs, LocalWorkers(2))
    return learned(runs)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No node shares the folder of the runs."""
    monkeypatch.setattr(RayWorkers, "_token", lambda self, runs: runs / "not there")


def all_events(runs: list[Task], workers: Workers, **options: Any) -> list[Event]:
    return [event for event in run_tasks(runs, workers, **options) if event is not None]


def learned(runs: list[Task]) -> Metrics:
    return {task.config.exp: [[record[key] for key in COMPARED] for record in task.run.metrics()] for task in runs}


def check_all(runs: list[Task], events: list[Event], local: Metrics) -> None:
    """Every epoch arrived once, every run ended once, and all are equal to the local ones."""
    assert [str(event) for event in events if isinstance(event, Failed)] == []
    epochs = Counter((event.task, event.record["epoch"]) for event in events if isinstance(event, Epoch))
    assert epochs == {(task, epoch): 1 for task in runs for epoch in range(1, EPOCHS + 1)}
    assert Counter(event.task for event in events if isinstance(event, Ended)) == dict.fromkeys(runs, 1)
    assert learned(runs) == local


def test_runs_on_two_nodes_equal_local_ones(nodes: Any, tasks: Any, local: Metrics) -> None:
    runs = tasks("shared")
    workers = RayWorkers(nodes.address)
    assert workers.is_free() and not workers.is_busy()
    check_all(runs, all_events(runs, workers), local)
    assert not list(Path(runs[0].config.runs).glob(".*"))
    again = all_events(runs, RayWorkers(nodes.address))
    assert [event.is_new for event in again if isinstance(event, Epoch)] == [False] * EPOCHS * SEEDS


def test_files_come_back_from_nodes_that_share_no_folder(nodes: Any, tasks: Any, local: Metrics, alone: None) -> None:
    runs = [dataclasses.replace(task, is_tested=True) for task in tasks("alone")]
    check_all(runs, all_events(runs, RayWorkers(nodes.address)), local)
    for task in runs:
        assert task.is_done() and task.run.best.is_file() and not task.run.last.exists()
    (runs[0].run.path / "test.json").unlink()  # trained, not tested: the files go to the node
    events = all_events(runs[:1], RayWorkers(nodes.address))
    assert [event.is_new for event in events if isinstance(event, Epoch)] == [False] * EPOCHS
    assert runs[0].run.has("test.json")


def test_a_failed_run_brings_its_files_back(nodes: Any, tasks: Any, alone: None) -> None:
    (task, *_) = tasks("failed")
    steep = Task(dataclasses.replace(task.config, optim=dataclasses.replace(task.config.optim, lr=1e30)))
    *_, failed = all_events([steep], RayWorkers(nodes.address))
    assert isinstance(failed, Failed) and failed.task == steep and failed.kind == "Diverged"
    assert steep.run.has("config.json") and not Path(steep.config.runs, "not there").exists()


def test_a_traceback_comes_back(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(runner, "_prepared", fault)
    (item,) = cluster._train_elsewhere(tasks("fault")[0], begun=[])
    assert isinstance(item.event, Failed) and item.event.kind == "RuntimeError"
    assert [name for name, _ in item.files or []] == ["error.log"]


@pytest.mark.parametrize("where", ["shared", "alone"])
def test_a_run_that_is_stopped_ends_there(nodes: Any, tasks: Any, local: Metrics, where: str, request: Any) -> None:
    if where == "alone":
        request.getfixturevalue("alone")
    runs = tasks(f"stopped {where}")[:2]
    events = all_events(runs, RayWorkers(nodes.address), goes_on=lambda epoch: epoch.task == runs[1])
    ends = {event.task: event.is_stopped for event in events if isinstance(event, Ended)}
    assert ends == {runs[0]: True, runs[1]: False}
    assert [event.record["epoch"] for event in events if isinstance(event, Epoch) and event.task == runs[0]] == [1]
    assert learned(runs) == {"r0": local["r0"][:1], "r1": local["r1"]}


def test_a_killed_node_costs_no_epoch_and_repeats_none(nodes: Any, tasks: Any, local: Metrics) -> None:
    runs, events = tasks("killed"), []
    victim = nodes.add_node(num_cpus=2)
    for event in run_tasks(runs, RayWorkers(nodes.address)):
        events += [event] if event is not None else []
        if victim and isinstance(event, Epoch):
            nodes.remove_node(victim, allow_graceful=False)
            victim = None
    check_all(runs, events, local)


def test_a_node_with_other_images_is_named(nodes: Any, tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "split_hash", lambda data: "sha256:another")
    with pytest.raises(Refused, match=f"the node {socket.gethostname()}.* has other images"):
        all_events(tasks("other"), RayWorkers(nodes.address))
    monkeypatch.setattr(RayWorkers, "_check_nodes", lambda *_: None)  # as of a node that joins later
    (failed,) = all_events(tasks("other")[:1], RayWorkers(nodes.address))
    assert isinstance(failed, Failed) and failed.kind == "Refused" and socket.gethostname() in failed.message


def test_what_a_node_may_lack(tasks: Any, tmp_path: Path) -> None:
    task = tasks("lacks")[0]
    driver = Driver(cluster.split_hash(task.config.data), tmp_path / "token", "secret")
    assert fault_of_node(task, driver) is None
    assert "the same version" in str(fault_of_node(task, dataclasses.replace(driver, version="0")))
    missing = dataclasses.replace(task.config, data=DataConfig(root=str(tmp_path / "none")))
    assert "lacks the images" in str(fault_of_node(Task(missing), driver))
    pupil = dataclasses.replace(task.config, optim=dataclasses.replace(task.config.optim, teacher=("a",)))
    assert "does not share" in str(fault_of_node(Task(pupil), driver))
    driver.token.write_text("secret")
    assert fault_of_node(Task(pupil), driver) is None


def test_files_stay_in_the_folder_of_the_run(tmp_path: Path) -> None:
    files = [("metrics.jsonl", b"1"), ("sub/a.txt", b"2")]
    write_files(tmp_path / "run", files)
    (tmp_path / "run" / "train.lock").touch()
    assert files_of(tmp_path / "run") == files
    for name in ("../a", "/a", "b/../../a", "..\\a", "C:a"):
        with pytest.raises(Refused, match="not in a run"):
            write_files(tmp_path / "run", [(name, b"")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:10001", "nonsense", "a:b:c"])
def test_a_cluster_that_cannot_be_reached_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(Refused) as refused:
        connect(address)
    assert "\n" not in str(refused.value)


def test_shares_of_gpus() -> None:
    for share in (-1.0, 1.5):
        with pytest.raises(Refused, match="gpus-per-run"):
            RayWorkers("auto", gpus_per_run=share)
