"""The grid: every point once, ranked, and resumed wherever it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune101.config import DataConfig, ModelConfig, OptimConfig, SystemConfig, TrainConfig, from_dict
from finetune101.runs import Run
from finetune101.search.study import configure, grid, points
from finetune101.training.loop import fit
from finetune101.training.prepare import prepare

SPACE = {"lr": [0.01, 0.05], "gamma": [0.1]}


@pytest.fixture
def base(tiny_data: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        exp="s",
        runs=str(tmp_path / "runs"),
        data=DataConfig(root=str(tiny_data)),
        model=ModelConfig(name="squeezenet1_1", pretrain=False, size=32),
        optim=OptimConfig(epochs=2, batch_size=8),
        system=SystemConfig(threads=1),
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


def search(base: TrainConfig, results: Path, space: dict[str, list[Any]] = SPACE) -> list[dict[str, Any]]:
    for _ in grid(base, space, results):
        pass
    return json.loads(results.read_text())["results"]


def scores(entries: list[dict[str, Any]]) -> list[float]:
    return [entry["best_val_top1"] for entry in entries]


def test_points_are_all_combinations_in_order() -> None:
    assert points({"lr": [1, 2], "gamma": [0.5, 0.1]}) == [
        {"lr": 1, "gamma": 0.5}, {"lr": 1, "gamma": 0.1}, {"lr": 2, "gamma": 0.5}, {"lr": 2, "gamma": 0.1}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rate": [1]}, "learning_rate is not a setting to search; choose from .*lr"),
        ({"lr": []}, "lr has no values to search; give at least one"),
    ],
)
def test_points_refuse(space: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        points(space)


def test_a_point_is_the_base_with_its_settings(base: TrainConfig) -> None:
    config = configure(base, {"lr": 0.5, "weight_decay": 0.0})
    assert config.exp == "s/lr=0.5,weight_decay=0.0"
    assert (config.optim.lr, config.optim.weight_decay, config.optim.batch_size) == (0.5, 0.0, 8)
    assert (config.data, config.model, config.system) == (base.data, base.model, base.system)


def test_a_grid_is_ranked_and_keeps_the_best_weights_only(base: TrainConfig, results: Path) -> None:
    entries = search(base, results)
    assert sorted(entry["lr"] for entry in entries) == [0.01, 0.05]
    assert scores(entries) == sorted(scores(entries), reverse=True)
    saved = json.loads(results.read_text())
    assert from_dict(saved["base"]) == base and (saved["space"], saved["points"]) == (SPACE, 2)
    for rank, entry in enumerate(entries):
        run = Run(Path(entry["run"]))
        records = run.metrics()
        assert entry["epochs"] == 2 and entry["error"] is None
        best = max(record["val_top1"] for record in records)
        assert entry["best_val_top1"] == best
        assert records[entry["best_epoch"] - 1]["val_top1"] == best
        assert run.config().optim.lr == entry["lr"]
        assert run.best.exists() == (rank == 0) and not run.last.exists()
        assert list(run.path.glob("events.out.tfevents.*"))


def test_results_are_written_after_every_point(base: TrainConfig, results: Path) -> None:
    for number, entries in enumerate(grid(base, SPACE, results), 1):
        assert len(entries) == number
        assert json.loads(results.read_text())["results"] == entries


def test_a_finished_grid_trains_nothing_again(base: TrainConfig, results: Path) -> None:
    first = search(base, results)
    kept = {path: path.stat().st_mtime_ns for path in Path(base.runs).rglob("*.*") if path.is_file()}
    results.unlink()
    assert search(base, results) == first
    assert {path: path.stat().st_mtime_ns for path in Path(base.runs).rglob("*.*") if path.is_file()} == kept


def test_an_interrupted_grid_ends_like_an_uninterrupted_one(base: TrainConfig, results: Path, tmp_path: Path) -> None:
    whole = search(base, tmp_path / "whole.json")
    other = TrainConfig(**{**vars(base), "exp": "again"})
    stopped = grid(other, SPACE, results)
    next(stopped)
    stopped.close()  # between the points
    job = prepare(configure(other, points(SPACE)[1]))
    epochs = fit(job, quiet=True)
    next(epochs)
    epochs.close()  # within the second one
    entries = search(other, results)
    assert [{**entry, "run": None} for entry in entries] == [{**entry, "run": None} for entry in whole]


def test_a_point_that_fails_stands_there_with_the_reason(base: TrainConfig, results: Path) -> None:
    entries = search(base, results, {"lr": [1e30, 0.01]})
    assert [entry["lr"] for entry in entries] == [0.01, 1e30]
    assert entries[0]["error"] is None and "the loss is not finite at step" in entries[1]["error"]
    assert entries[1]["best_val_top1"] is None


def test_a_point_that_failed_stays_so_when_the_grid_is_resumed(base: TrainConfig, results: Path) -> None:
    first = search(base, results, {"lr": [1e30, 0.01]})
    assert search(base, results, {"lr": [1e30, 0.01]}) == first


def test_a_setting_that_cannot_work_stops_the_grid(base: TrainConfig, results: Path) -> None:
    with pytest.raises(ValueError, match="--lr is -1; give a positive number"):
        search(base, results, {"lr": [-1]})
    assert not results.exists()


def test_another_base_needs_another_name(base: TrainConfig, results: Path) -> None:
    job = prepare(configure(base, points(SPACE)[0]))
    next(fit(job, quiet=True))
    other = TrainConfig(**{**vars(base), "optim": OptimConfig(epochs=2, batch_size=8, momentum=0.5)})
    with pytest.raises(
        ValueError, match=r"--resume cannot change optim\.momentum .*; or give the search another --exp"
    ):
        search(other, results)


def test_a_finished_point_of_another_base_is_not_taken_for_its_own(base: TrainConfig, results: Path) -> None:
    search(base, results)
    other = TrainConfig(**{**vars(base), "optim": OptimConfig(epochs=2, batch_size=8, momentum=0.5)})
    with pytest.raises(ValueError, match=r"optim\.momentum"):
        search(other, results)
