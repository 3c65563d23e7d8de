"""A stage: which runs it asks for, and what it makes of what happens to them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiments.in_process import do_search

from finetune101.config import TrainConfig, change, from_dict, to_dict, validate
from finetune101.errors import Refused
from finetune101.experiments import space
from finetune101.experiments.point_run import identity
from finetune101.experiments.runner import Ended, Epoch, Failed, Task
from finetune101.experiments.search_plan import Plan, check_plan
from finetune101.experiments.stage import Stage, open_journal, shortened_schedule
from finetune101.run import Run

MakePlan = Callable[..., Plan]


def make_stage(base: TrainConfig, grid: dict[str, Any], **how: Any) -> Stage:
    folder = Path(base.runs) / base.exp
    folder.mkdir(parents=True, exist_ok=True)
    return Stage("s", base, space.make_space(grid), open_journal(folder), **how)


def epoch_of(task: Task, number: int, score: float | None) -> Epoch:
    record = {"epoch": number, "val_top1": score, "val_loss": 1.0, "step": number, "seconds": 1.0, "val_seconds": 0.5}
    return Epoch(task, record)


# a shortened schedule


def test_a_shortened_schedule_is_whole(base: TrainConfig) -> None:
    config = change(base, {"epochs": 20, "warmup_epochs": 2.0, "step_size": 10})
    for share, epochs in ((0.5, 10), (0.25, 5), (1 / 16, 1), (0.001, 1)):
        optim = shortened_schedule(config, share).optim
        assert optim.epochs == epochs and optim.warmup_epochs <= min(2 * epochs / 20, epochs - 1)
        assert optim.step_size == max(1, round(10 * epochs / 20))
        validate(shortened_schedule(config, share))
    same = shortened_schedule(config, 1.0)
    assert (
        same == config
        and shortened_schedule(change(config, {"warmup_epochs": 0.0, "epochs": 0}), 0.5).optim.epochs == 0
    )
    rest = dataclasses.replace(shortened_schedule(config, 0.5), optim=config.optim)
    assert rest == config  # nothing else changes


# the pruner


def test_the_median_compares_at_the_same_share_of_the_schedule(base: TrainConfig) -> None:
    """A run of 8 epochs stands at epoch 4 where one of 4 epochs stands at epoch 2."""
    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    stage = make_stage(base, {"epochs": [4, 8], "lr": rates}, pruner="median")
    points = [*({"epochs": 4, "lr": lr} for lr in rates), *({"epochs": 8, "lr": lr} for lr in rates[:2])]
    *shorter, bad, good = stage.tasks(points)
    for task in shorter:  # half-way they have 20 %
        assert all(stage.goes_on(epoch_of(task, number, 10.0 * number)) for number in (1, 2, 3, 4))
        task.run.path.mkdir(parents=True)
        stage.end(Ended(task))
    # after two of eight epochs 10 % is the median, as after one of four
    assert stage.goes_on(epoch_of(bad, 2, 10.0)) and stage.goes_on(epoch_of(good, 2, 12.0))
    assert not stage.goes_on(epoch_of(bad, 4, 15.0)) and stage.goes_on(epoch_of(good, 4, 21.0))
    stage.end(Ended(bad, is_stopped=True))
    states = {space.point_label(entry["point"]): entry["state"] for entry in stage.entries()}
    assert states["epochs=8,lr=0.1"] == "pruned" and list(states.values()).count("complete") == 5
    assert stage.entries()[-1]["epochs"] == 4 and stage.is_running()


def test_a_run_without_validation_is_no_trial(base: TrainConfig) -> None:
    stage = make_stage(base, {"lr": [0.1]})
    (task,) = stage.tasks([{"lr": 0.1}])
    with pytest.raises(Refused, match="a search needs validation images"):
        stage.goes_on(epoch_of(task, 1, None))


# points and their runs


def test_a_begun_run_is_asked_for_again_and_first(base: TrainConfig) -> None:
    grid = {"lr": [0.1, 0.2]}
    begun = next(make_stage(base, grid).tasks([{"lr": 0.2}]))  # and the process is gone
    again = make_stage(base, grid)
    tasks = list(again.tasks(space.points(again.space)))
    assert tasks[0] == begun and [task.config.optim.lr for task in tasks] == [0.2, 0.1]
    assert (again.drawn(), again.interrupted(), again.ended()) == (2, 2, 0)


def test_points_of_one_run_are_trained_once(base: TrainConfig) -> None:
    """gamma changes nothing with a cosine: both points are one run."""
    stage = make_stage(base, {"lr": [0.1]})
    (task,) = stage.tasks([{"lr": 0.1}])
    assert stage.goes_on(epoch_of(task, 1, 40.0))
    task.run.path.mkdir(parents=True)
    stage.end(Ended(task))
    stage.study.enqueue_trial({"lr": 0.1})
    assert list(stage._begin(stage.study.ask())) == []
    assert [entry["best_val_top1"] for entry in stage.entries()] == [40.0] and stage.ended() == 2


def test_a_fault_is_tried_again_by_the_next_command_only(base: TrainConfig) -> None:
    points = [{"lr": 0.1}]
    first = make_stage(base, {"lr": [0.1]})
    (task,) = first.tasks(points)
    first.end(Failed(task, "ZeroDivisionError", "ZeroDivisionError: a fault", True, "error.log"))
    assert list(first.tasks(points)) == [] and first.entries()[0]["trace"] == "error.log"
    second = make_stage(base, {"lr": [0.1]})
    assert list(second.tasks(points)) == [task] and second.drawn() == 1
    assert second.goes_on(epoch_of(task, 1, 30.0))
    task.run.path.mkdir(parents=True)
    second.end(Ended(task))
    (entry,) = second.entries()
    assert (entry["state"], entry["error"]) == ("complete", None) and list(
        make_stage(base, {"lr": [0.1]}).tasks(points)
    ) == []


def test_a_mistake_that_every_point_would_meet_ends_the_search(base: TrainConfig) -> None:
    stage = make_stage(base, {"lr": [0.1]})
    (task,) = stage.tasks([{"lr": 0.1}])
    with pytest.raises(Refused, match=r"lost\.safetensors"):
        stage.end(Failed(task, "Refused", "lost.safetensors is not there", False))


def test_identity_ignores_where_and_how_fast(base: TrainConfig) -> None:
    moved = from_dict({**to_dict(base), "runs": "elsewhere", "exp": "t", "recipe": "original"})
    faster = dataclasses.replace(moved, system=dataclasses.replace(base.system, threads=2))
    assert identity(base) == identity(moved) == identity(faster)
    assert identity(base) != identity(change(base, {"lr": 0.5}))
    assert identity(base) != identity(dataclasses.replace(base, data=dataclasses.replace(base.data, split_seed=1)))


def test_a_run_of_other_settings_under_the_same_name_is_trained_anew(plan: MakePlan) -> None:
    one = plan({"lr": [0.01]})
    (entry,) = do_search(one).entries
    run = Run(Path(entry["run"]))
    config = run.config()  # as if a version with another default had trained it
    older = dataclasses.replace(config, optim=dataclasses.replace(config.optim, momentum=0.3))
    run.write_json("config.json", to_dict(older))
    before = run.metrics()
    (one.folder / "optuna.journal").unlink()
    anew = do_search(one)
    (again,) = anew.entries
    assert len(anew.runs) == 1 and Path(again["run"]) != run.path and run.metrics() == before
    assert again["best_val_top1"] == entry["best_val_top1"]
    assert Run(Path(again["run"])).config().optim == config.optim
    assert do_search(one).epochs == []  # found again, by its other name


def test_a_point_that_diverges_stands_last_with_the_reason_and_stays_so(plan: MakePlan) -> None:
    one = plan({"lr": [1e30, 0.01]})
    entries = do_search(one).entries
    assert [entry["point"]["lr"] for entry in entries] == [0.01, 1e30]
    assert entries[0]["error"] is None and "the loss is not finite at step" in entries[1]["error"]
    assert entries[1]["best_val_top1"] is None and (entries[1]["state"], entries[1]["trace"]) == ("failed", None)
    again = do_search(one)
    assert again.entries == entries and again.epochs == []


def test_two_values_that_contradict_each_other_fail_alone(plan: MakePlan) -> None:
    done = do_search(plan({"nesterov": [True], "momentum": [0.0, 0.5]}, epochs=1))
    assert {e["point"]["momentum"]: e["state"] for e in done.entries} == {0.0: "failed", 0.5: "complete"}


def test_settings_that_do_not_go_together_fail_alone(plan: MakePlan) -> None:
    with pytest.raises(ValueError, match="there is no model 'resnet17'"):
        check_plan(plan({"model": ["resnet17"]}))
    good, bad = do_search(plan({"model": ["alexnet", "squeezenet1_1"]}, epochs=1)).entries  # at 32 px
    assert (good["point"]["model"], good["state"]) == ("squeezenet1_1", "complete")
    assert (bad["point"]["model"], bad["state"]) == ("alexnet", "failed") and "32" in bad["error"]


# the journal


def test_a_journal_that_a_full_disk_cut_is_read(plan: MakePlan) -> None:
    one = plan(epochs=1)
    entries = do_search(one).entries
    with (one.folder / "optuna.journal").open("ab") as journal:
        journal.write(b'{"op_code": 4, "wor')
    again = do_search(one)
    assert again.entries == entries and again.epochs == []
    assert all(json.loads(line) for line in (one.folder / "optuna.journal").read_text().splitlines())


def test_a_damaged_journal_is_one_sentence(plan: MakePlan) -> None:
    one = plan({"lr": [0.01]}, epochs=1)
    do_search(one)
    journal = one.folder / "optuna.journal"
    for damage in (b"nonsense\n", b"[]\n", b'{"op_code": 99}\n', b'{"op_code": 4, "worker_id": 3}\n', b"\xff\xfe\n"):
        whole = journal.read_bytes()
        journal.write_bytes(damage + whole)
        with pytest.raises(Refused, match=r"optuna\.journal is damaged"):
            do_search(one)
        journal.write_bytes(whole)
    journal.unlink()
    assert do_search(one).epochs == []
