"""The search: every point once, resumed wherever it was interrupted, and blind to the test images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from finetune101.config import OptimConfig, TrainConfig, change, from_dict, to_dict
from finetune101.experiments import queue, space, trial
from finetune101.experiments.queue import Plan
from finetune101.experiments.trial import identity
from finetune101.experiments.workers import alone, run_workers
from finetune101.run import Run
from finetune101.training.loop import Job

MakePlan = Callable[..., Plan]


def search(plan: Plan, watch: Any = lambda study, record: None) -> optuna.Study:
    """The study of ``plan`` after it was run."""
    with alone(plan):
        return run_workers(plan, watch)


def stop_at(epochs: int) -> Any:
    """A watcher that presses Ctrl-C after so many epochs."""
    seen: list[Any] = []

    def watch(_: optuna.Study, record: dict[str, Any] | None) -> None:
        seen.extend([record] if record else [])
        if len(seen) == epochs:
            raise KeyboardInterrupt

    return watch


def told(plan: Plan, found: optuna.Study) -> list[tuple[Any, ...]]:
    """What is known of every point, apart from time and order."""
    entries = queue.results(plan, found)
    keys = ("state", "best_val_top1", "best_epoch", "epochs", "steps", "error")
    return sorted((space.point_label(e["point"]), *(e[key] for key in keys)) for e in entries)


def trained(found: optuna.Study) -> int:
    """How many trials trained at least one epoch."""
    return sum(trial.user_attrs.get("trained", 0) > 0 for trial in found.trials)


def test_a_grid_is_ranked_and_keeps_the_best_weights_only(plan: MakePlan) -> None:
    one = plan()
    entries = queue.results(one, search(one))
    assert sorted(entry["point"]["lr"] for entry in entries) == [0.01, 0.05]
    scores = [entry["best_val_top1"] for entry in entries]
    assert scores == sorted(scores, reverse=True)
    for rank, entry in enumerate(entries):
        run = Run(Path(entry["run"]))
        records = run.metrics()
        assert entry["state"] == "complete" and entry["epochs"] == len(records) == 2 and entry["error"] is None
        assert entry["best_val_top1"] == max(record["val_top1"] for record in records)
        assert entry["steps"] == records[-1]["step"]
        assert run.config().optim.lr == entry["point"]["lr"]
        assert run.name == identity(run.config())
        assert run.best.exists() == (rank == 0) and not run.last.exists() and not run.has("test.json")


def test_tensorboard_shows_a_run_per_point_and_no_other(plan: MakePlan) -> None:
    one = plan()
    search(one)
    folders = {file.parent for file in one.folder.rglob("events.out.tfevents.*")}
    assert folders == {file.parent for file in one.folder.rglob("config.json")} and len(folders) == 2
    assert len(list(one.folder.rglob("*.hparams"))) == 2


def test_the_same_search_twice_changes_nothing_the_second_time(plan: MakePlan) -> None:
    one = plan()
    search(one)
    kept = {path: path.stat().st_mtime_ns for path in one.folder.rglob("*") if path.is_file()}
    kept = {path: time for path, time in kept.items() if not path.name.endswith(".lock")}
    search(one)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (
        not {path for path in one.folder.rglob("*.*") if path.is_file()} - kept.keys() - set(one.folder.glob("*.lock"))
    )


@pytest.mark.slow
def test_a_grid_of_12_that_grows_by_4_trains_4(plan: MakePlan, base: TrainConfig) -> None:
    short = dataclasses.replace(base, optim=dataclasses.replace(base.optim, epochs=1))
    first = plan({"lr": [0.01, 0.02, 0.03, 0.04], "gamma": [0.1, 0.2, 0.5]}, base=short)
    assert trained(search(first)) == 12
    second = plan({"lr": [0.01, 0.02, 0.03, 0.04], "gamma": [0.1, 0.2, 0.5, 1]}, base=short)
    found = search(second)
    assert trained(found) == 4 and len(queue.results(second, found)) == 16


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_an_interrupted_search_ends_like_an_uninterrupted_one(epochs: int, plan: MakePlan, base: TrainConfig) -> None:
    whole, other = plan(), plan(base=dataclasses.replace(base, exp="again"))
    with pytest.raises(KeyboardInterrupt):
        search(other, stop_at(epochs))
    again = search(other)
    assert told(other, again) == told(whole, search(whole))
    assert sum(trial.user_attrs.get("trained", 0) for trial in again.trials) == 4  # no epoch twice


def test_out_of_time_it_stops_after_the_epoch_and_goes_on_later(plan: MakePlan) -> None:
    short = plan(timeout=1e-3)
    with alone(short):
        found = queue.open_study(short)
        queue.fill(short, found)
        queue.work(short, found, deadline=0)
        assert trained(found) == 0
        goal = queue.Objective(base=short.base, space=short.space, deadline=0)
        found.optimize(goal, n_trials=1, catch=(queue.OutOfTime,))
    assert [t.state.name for t in found.trials] == ["FAIL", "WAITING"] and trained(found) == 1
    whole = search(plan())
    assert len(queue.results(plan(), whole)) == 2
    assert sum(trial.user_attrs.get("trained", 0) for trial in whole.trials) == 4


def test_a_trial_whose_process_was_killed_is_taken_up(plan: MakePlan) -> None:
    one = plan()
    with alone(one):
        found = queue.open_study(one)
        queue.fill(one, found)
        found.ask()  # and the process is gone
    assert len(queue.results(one, search(one))) == 2


def test_a_journal_that_a_full_disk_cut_is_read(plan: MakePlan) -> None:
    one = plan()
    search(one)
    with (one.folder / "optuna.journal").open("ab") as journal:
        journal.write(b'{"op_code": 4, "wor')
    assert len(queue.results(one, search(one))) == 2


def test_a_point_that_is_queued_twice_is_trained_once(plan: MakePlan) -> None:
    one = plan()
    with alone(one):
        found = queue.open_study(one)
        for _ in range(2):
            found.enqueue_trial({"lr": 0.01, "gamma": 0.1}, user_attrs={"queued": True})
    found = search(one)
    assert trained(found) == 2 and len(queue.results(one, found)) == 2


def test_a_point_that_diverges_stands_last_with_the_reason_and_stays_so(plan: MakePlan) -> None:
    one = plan({"lr": [1e30, 0.01]})
    entries = queue.results(one, search(one))
    assert [entry["point"]["lr"] for entry in entries] == [0.01, 1e30]
    assert entries[0]["error"] is None and "the loss is not finite at step" in entries[1]["error"]
    assert entries[1]["best_val_top1"] is None and entries[1]["state"] == "failed"
    assert queue.results(one, search(one)) == entries


def test_two_values_that_contradict_each_other_fail_alone(plan: MakePlan) -> None:
    one = plan({"nesterov": [True], "momentum": [0.0, 0.5]})
    states = {entry["point"]["momentum"]: entry["state"] for entry in queue.results(one, search(one))}
    assert states == {0.0: "failed", 0.5: "complete"}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_draw_as_many_points_as_asked(sampler: str, plan: MakePlan) -> None:
    grid = {"lr": "1e-4..1e-1:log", "batch_size": "4..16", "flip": [True, False]}
    one = plan(grid, sampler=sampler, trials=2)
    first = told(one, search(one))
    more = search(plan(grid, sampler=sampler, trials=3))
    assert len(more.trials) == 3 and trained(more) == 3
    assert set(first) < set(told(one, more))
    assert all(1e-4 <= trial.params["lr"] <= 0.1 for trial in more.trials)
    assert all(type(trial.params["batch_size"]) is int for trial in more.trials)


def test_pruned_trials_keep_what_they_reached_and_their_rungs(plan: MakePlan, base: TrainConfig) -> None:
    longer = dataclasses.replace(base, optim=dataclasses.replace(base.optim, epochs=3))
    one = plan({"lr": [0.001, 0.01, 0.03, 0.05]}, base=longer, pruner="asha")
    entries = queue.results(one, search(one))
    assert len(entries) == 4 and all(entry["rungs"] for entry in entries)
    for entry in entries:
        assert (entry["state"] == "complete") == (entry["epochs"] == 3)
        assert len(Run(Path(entry["run"])).metrics()) == entry["epochs"]
    assert told(one, search(one)) == sorted(told(one, queue.open_study(one)))


def test_other_settings_share_nothing_but_the_folder(plan: MakePlan, base: TrainConfig) -> None:
    search(plan())
    other = plan(base=dataclasses.replace(base, optim=OptimConfig(epochs=2, batch_size=8, momentum=0.5)))
    assert trained(search(other)) == 2


def test_identity_ignores_where_and_how_fast(base: TrainConfig) -> None:
    moved = from_dict({**to_dict(base), "runs": "elsewhere", "exp": "t", "recipe": "original"})
    faster = dataclasses.replace(moved, system=dataclasses.replace(base.system, threads=2))
    assert identity(base) == identity(moved) == identity(faster)
    assert identity(base) != identity(change(base, {"lr": 0.5}))
    assert identity(base) != identity(dataclasses.replace(base, data=dataclasses.replace(base.data, split_seed=1)))


def test_a_run_of_other_settings_under_the_same_name_is_trained_anew(plan: MakePlan, base: TrainConfig) -> None:
    one = plan({"lr": [0.01]})
    (entry,) = queue.results(one, search(one))
    run = Run(Path(entry["run"]))
    config = run.config()  # as if a version with another default had trained it
    older = dataclasses.replace(config, optim=dataclasses.replace(config.optim, momentum=0.3))
    run.write_json("config.json", to_dict(older))
    before = run.metrics()
    (one.folder / "optuna.journal").unlink()
    found = search(one)
    (again,) = queue.results(one, found)
    assert trained(found) == 1 and Path(again["run"]) != run.path and run.metrics() == before
    assert again["best_val_top1"] == entry["best_val_top1"]
    assert Run(Path(again["run"])).config().optim == config.optim
    assert trained(search(one)) == 1  # found again, by its other name


def test_a_search_that_was_moved_trains_nothing_again(plan: MakePlan, base: TrainConfig, tmp_path: Path) -> None:
    one = plan()
    with pytest.raises(KeyboardInterrupt):
        search(one, stop_at(3))  # one run finished, one begun
    (tmp_path / "new").mkdir()
    one.folder.rename(tmp_path / "new" / "other")
    moved = plan(base=dataclasses.replace(base, runs=str(tmp_path / "new"), exp="other"))
    found = search(moved)
    assert sum(trial.user_attrs.get("trained", 0) for trial in found.trials) == 1  # of four epochs
    assert len(queue.results(moved, found)) == 2


def test_a_second_search_in_the_folder_is_refused(plan: MakePlan) -> None:
    with alone(plan()), pytest.raises(ValueError, match=rf"process {os.getpid()} .* wait for it"):
        search(plan())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "--trials is 0; give at least 1"),
        ({"sampler": "tpe"}, "--sampler tpe goes on for ever; add --trials"),
        ({"jobs": 0}, "--jobs is 0; give at least 1"),
    ],
)
def test_plans_that_cannot_work(options: dict[str, Any], message: str, plan: MakePlan) -> None:
    with pytest.raises(ValueError, match=message):
        queue.check_plan(plan(**options))


def test_a_database_that_is_not_there_is_one_sentence_without_the_password(plan: MakePlan) -> None:
    with pytest.raises(ValueError, match="cannot be used") as error:
        search(plan(storage="postgresql://someone:secret@127.0.0.1:9/none"))
    assert "secret" not in str(error.value)


def test_finalists_are_ranked_by_their_mean(plan: MakePlan) -> None:
    one = plan()
    last = queue.finals(one, queue.results(one, search(one)), 2, 2)
    found = search(last)
    assert trained(found) == 2  # the search's own seed is there already
    best = queue.averages(queue.results(last, found))
    assert [set(entry["seeds"]) for entry in best] == [{"0", "1"}] * 2
    assert best[0]["mean"] >= best[1]["mean"] and "seed" not in best[0]["point"]


class Locked(dict[str, Any]):
    """Subsets of which "test" cannot be read."""

    def __getitem__(self, name: str) -> Any:
        assert name != "test", "the search read the test images"
        return super().__getitem__(name)

    def items(self) -> Any:
        raise AssertionError("the search read the test images")

    values = items


@pytest.mark.parametrize("stage", ["all", "probe"])
def test_the_search_cannot_reach_the_test_images(
    stage: str, plan: MakePlan, base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job trains on a manifest whose test images raise when they are asked for."""
    frozen = {"freeze": True, "cached_features": True, "name": "resnet18"} if stage == "probe" else {}
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, **frozen))
    real = trial.prepare

    def locked(*arguments: Any, **how: Any) -> Job:
        job = real(*arguments, **how)
        return dataclasses.replace(
            job, manifest=dataclasses.replace(job.manifest, subsets=Locked(job.manifest.subsets))
        )

    monkeypatch.setattr(trial, "prepare", locked)
    one = plan(base=config)
    last = queue.finals(one, queue.results(one, search(one)), 1, 2)
    assert {entry["state"] for entry in queue.results(last, search(last))} == {"complete"}


@pytest.mark.slow
def test_two_workers_do_what_one_does(plan: MakePlan, base: TrainConfig) -> None:
    one = plan()
    two = plan(base=dataclasses.replace(base, exp="two"), jobs=2)
    assert told(one, search(one)) == told(two, search(two))


@pytest.mark.slow
def test_a_workers_mistake_is_the_searchs(plan: MakePlan) -> None:
    base = plan().base
    lost = dataclasses.replace(base, model=dataclasses.replace(base.model, pretrain=True, weights="lost.safetensors"))
    with pytest.raises(ValueError, match=r"lost\.safetensors"):
        search(plan(base=lost, jobs=2))


def test_settings_that_do_not_go_together_fail_alone(plan: MakePlan) -> None:
    with pytest.raises(ValueError, match="there is no model 'resnet17'"):
        queue.check_plan(plan({"model": ["resnet17"]}))
    mixed = plan({"model": ["alexnet", "squeezenet1_1"]})  # at 32 px
    entries = queue.results(mixed, search(mixed))
    assert [(e["point"]["model"], e["state"]) for e in entries] == [
        ("squeezenet1_1", "complete"),
        ("alexnet", "failed"),
    ]
    assert "32" in entries[1]["error"]


def test_what_two_machines_queued_at_once_is_taken_back(plan: MakePlan) -> None:
    made = plan({"lr": [0.01, 0.02, 0.03, 0.04]}, sampler="random", trials=3)
    with alone(made):
        shared = queue.open_study(made)
        queue.fill(made, shared)
        for _ in range(3):  # as the other machine, which read the queue before we wrote
            shared.enqueue_trial({}, user_attrs={"queued": True})
        queue.fill(made, shared)
        assert [t.state.name for t in shared.get_trials()] == ["WAITING"] * 3 + ["FAIL"] * 3
        assert queue.unfinished(shared) == 3
        more = dataclasses.replace(made, trials=4)
        queue.fill(more, shared)
        assert [t.state.name for t in shared.get_trials()].count("WAITING") == 4


def test_a_seed_that_failed_is_no_success() -> None:
    def entry(lr: float, seed: int, score: float, state: str = "complete") -> dict[str, Any]:
        return {"point": {"lr": lr, "seed": seed}, "state": state, "best_val_top1": score, "run": None}

    found = queue.averages([entry(1, 0, 90.0), entry(1, 1, 95.0, "failed"), entry(2, 0, 70.0), entry(2, 1, 72.0)])
    assert [(f["point"]["lr"], f["mean"], f["failed"]) for f in found] == [(2, 71.0, 0), (1, 90.0, 1)]


def test_a_trial_that_gains_epochs_may_be_interrupted_for_ever(plan: MakePlan) -> None:
    made = plan({"lr": [0.01]}, base=dataclasses.replace(plan().base, optim=OptimConfig(epochs=40, batch_size=8)))
    for _ in range(queue.MAX_RETRIES + 3):
        with pytest.raises(KeyboardInterrupt):
            search(made, stop_at(1))
    assert [e["state"] for e in queue.results(made, search(made))] == ["complete"]
