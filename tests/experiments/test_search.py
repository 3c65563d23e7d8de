"""The search: every point once, resumed wherever it was interrupted, and blind to the test images."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from experiments.in_process import InProcess, Simulated, do_search
from optuna.storages.journal import JournalFileBackend, JournalStorage

from finetune101.config import OptimConfig, TrainConfig, change
from finetune101.experiments import search as searching
from finetune101.experiments.folders import alone
from finetune101.experiments.outcome import Outcome
from finetune101.experiments.runner import Epoch, LocalWorkers, Task
from finetune101.experiments.search import Clock, Search, average
from finetune101.experiments.search_plan import Plan, check_plan, make_plan, probe_of
from finetune101.experiments.settings import SearchOptions
from finetune101.experiments.space import planned_search
from finetune101.run import Run
from finetune101.training.loop import Job

MakePlan = Callable[..., Plan]
FOUR = {"lr": [0.001, 0.01, 0.03, 0.05]}


def test_a_grid_is_ranked_and_keeps_the_best_weights_only(plan: MakePlan) -> None:
    entries = do_search(plan()).entries
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
        assert run.best.exists() == (rank == 0) and not run.last.exists() and not run.has("test.json")


def test_tensorboard_shows_a_run_per_point_and_no_other(plan: MakePlan) -> None:
    one = plan()
    do_search(one)
    folders = {file.parent for file in one.folder.rglob("events.out.tfevents.*")}
    assert folders == {file.parent for file in one.folder.rglob("config.json")} and len(folders) == 2
    assert len(list(one.folder.rglob("*.hparams"))) == 2


def test_the_same_search_twice_changes_nothing_the_second_time(plan: MakePlan) -> None:
    one = plan()
    do_search(one)
    before = {path: path.stat().st_mtime_ns for path in one.folder.rglob("*") if path.suffix != ".lock"}
    assert do_search(one).epochs == []
    after = {path: path.stat().st_mtime_ns for path in one.folder.rglob("*") if path.suffix != ".lock"}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_a_grid_that_grows_trains_the_new_points(plan: MakePlan) -> None:
    assert len(do_search(plan({"lr": [0.01, 0.02], "gamma": [0.1, 0.2]}, epochs=1)).runs) == 4
    grown = do_search(plan({"lr": [0.01, 0.02], "gamma": [0.1, 0.2, 0.5]}, epochs=1))
    assert len(grown.runs) == 2 and len(grown.entries) == 6


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_an_interrupted_search_ends_like_an_uninterrupted_one(epochs: int, plan: MakePlan, base: TrainConfig) -> None:
    other = plan(base=dataclasses.replace(base, exp="again"))
    first = do_search(other, stop_after=epochs)
    assert first.search.points_left() > 0
    second = do_search(other)
    assert second.scores() == do_search(plan()).scores() and second.search.points_left() == 0
    assert len(set(first.epochs + second.epochs)) == len(first.epochs + second.epochs) == 4  # no epoch twice


def test_two_jobs_do_what_one_does(plan: MakePlan, base: TrainConfig) -> None:
    one, two = plan(), plan(base=dataclasses.replace(base, exp="two"), jobs=2)
    workers = LocalWorkers(2)
    assert do_search(two, workers).scores() == do_search(one).scores()
    assert not workers.is_busy()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_draw_as_many_points_as_asked(sampler: str, plan: MakePlan) -> None:
    grid = {"lr": "1e-4..1e-1:log", "batch_size": "4..16", "flip": [True, False]}
    first = do_search(plan(grid, epochs=1, sampler=sampler, trials=2))
    more = do_search(plan(grid, epochs=1, sampler=sampler, trials=3))
    assert (len(first.runs), len(more.runs), len(more.entries)) == (2, 1, 3)
    assert set(first.scores()) < set(more.scores())
    points = [entry["point"] for entry in more.entries]
    assert all(1e-4 <= point["lr"] <= 0.1 and type(point["batch_size"]) is int for point in points)


def test_an_interrupted_draw_ends_like_an_uninterrupted_one(plan: MakePlan, base: TrainConfig) -> None:
    how: dict[str, Any] = {"grid": {"lr": "1e-4..1e-1:log"}, "sampler": "tpe", "trials": 3}
    other = plan(base=dataclasses.replace(base, exp="again"), **how)
    do_search(other, stop_after=3)
    assert do_search(other).scores() == do_search(plan(**how)).scores()


def test_with_halving_all_have_a_whole_short_schedule_and_the_best_quarter_all_epochs(plan: MakePlan) -> None:
    assert plan(epochs=32, pruner="halving").shares() == [1 / 16, 1] and plan(epochs=1, pruner="halving").shares() == [
        1
    ]
    one = plan({"lr": [0.001, 0.01, 0.03, 0.05], "gamma": [0.1, 0.5]}, epochs=4, pruner="halving", trials=5)
    do_search(one, stop_after=3)
    do_search(one, stop_after=4)
    done = do_search(one)
    short, whole = done.search.rungs
    assert (len(short.entries()), len(whole.entries())) == (5, 2)
    for stage, epochs in ((short, 1), (whole, 4)):
        for entry in stage.entries():
            run = Run(Path(entry["run"]))
            optim = run.config().optim
            assert (optim.epochs, optim.step_size) == (epochs, max(1, round(one.base.optim.step_size * epochs / 4)))
            assert len(run.metrics()) == entry["epochs"] == epochs
    ranked = [entry["point"] for entry in short.entries(one.points())]
    assert all(entry["point"] in ranked[:2] for entry in whole.entries())
    assert [list(entry["rungs"]) for entry in done.entries] == [["1", "4"]] * 2 + [["1"]] * 3
    assert [entry["state"] for entry in done.entries] == ["complete"] * 2 + ["pruned"] * 3
    best = done.entries[0]
    assert best["rungs"]["4"] == best["best_val_top1"] and Run(Path(best["run"])).best.is_file()
    assert Outcome(done.entries, []).winner == best and do_search(one).epochs == []


def test_a_point_that_failed_is_not_promoted(plan: MakePlan) -> None:
    one = plan({"lr": [1e30, 1e29, 1e28, 0.01]}, epochs=4, pruner="halving")
    done = do_search(one)
    assert [entry["point"]["lr"] for entry in done.search.rungs[1].entries()] == [0.01]
    assert [entry["state"] for entry in done.entries] == ["complete", *["failed"] * 3]


def test_a_point_that_fails_on_a_later_rung_keeps_its_score_of_the_first(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = searching.run_tasks.__globals__["fit"]

    def failing(job: Job, **how: Any) -> Any:
        if job.config.optim.epochs == 4:
            raise ZeroDivisionError("a fault")
        return real(job, **how)

    monkeypatch.setattr("finetune101.experiments.runner.fit", failing)
    one = plan(FOUR, epochs=4, pruner="halving")
    done = do_search(one)
    assert [entry["state"] for entry in done.search.rungs[1].entries()] == ["failed"]
    assert len(done.epochs) == 4  # it is not tried again and again
    assert all(list(entry["rungs"]) == ["1"] for entry in done.entries)
    winner = Outcome(done.entries, []).winner
    assert winner and winner["point"] == done.search.rungs[0].entries(one.points())[0]["point"]
    monkeypatch.undo()
    assert [number for _, number in do_search(one).epochs] == [1, 2, 3, 4]  # the same command tries it again


def test_finalists_are_ranked_by_their_mean(plan: MakePlan) -> None:
    do_search(plan())
    done = do_search(plan(finalists=2, seeds=2))
    assert len(done.runs) == 2  # the search's own seed is there already
    best = done.search.finalists()
    assert [set(entry["seeds"]) for entry in best] == [{"0", "1"}] * 2
    assert best[0]["mean"] >= best[1]["mean"] and "seed" not in best[0]["point"]
    assert Outcome(done.entries, best).winner == best[0]
    assert Run(Path(best[0]["run"])).best.is_file()
    more = do_search(plan(finalists=2, seeds=3))
    assert len(more.runs) == 2 and [set(entry["seeds"]) for entry in more.search.finalists()] == [{"0", "1", "2"}] * 2


def test_a_seed_that_failed_is_no_success() -> None:
    def entry(lr: float, seed: int, score: float, state: str = "complete") -> dict[str, Any]:
        return {"point": {"lr": lr, "seed": seed}, "state": state, "best_val_top1": score, "run": None}

    whole = average([entry(2, 0, 70.0), entry(2, 1, 72.0)])
    half = average([entry(1, 0, 90.0), entry(1, 1, 95.0, "failed")])
    assert (whole["mean"], whole["failed"]) == (71.0, 0) and (half["mean"], half["failed"]) == (90.0, 1)


def test_other_settings_share_nothing_but_the_folder(plan: MakePlan, base: TrainConfig) -> None:
    do_search(plan())
    other = plan(base=dataclasses.replace(base, optim=OptimConfig(epochs=2, batch_size=8, momentum=0.5)))
    assert len(do_search(other).runs) == 2


def test_a_search_that_was_moved_trains_nothing_again(plan: MakePlan, base: TrainConfig, tmp_path: Path) -> None:
    one = plan()
    do_search(one, stop_after=3)  # one run finished, one begun
    (tmp_path / "new").mkdir()
    one.folder.rename(tmp_path / "new" / "other")
    moved = do_search(plan(base=dataclasses.replace(base, runs=str(tmp_path / "new"), exp="other")))
    assert len(moved.epochs) == 1 and len(moved.entries) == 2  # of four epochs


def test_a_second_search_in_the_folder_is_refused(plan: MakePlan) -> None:
    with alone(plan().folder, "search"), pytest.raises(ValueError, match=rf"process {os.getpid()} .* wait for it"):
        do_search(plan())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "--trials is 0; give at least 1"),
        ({"sampler": "tpe"}, "--sampler tpe goes on for ever; add --trials"),
        ({"jobs": 0}, "--jobs is 0; give at least 1"),
        ({"finalists": -1}, "--finalists is -1"),
        ({"seeds": 0}, "--seeds is 0"),
    ],
)
def test_plans_that_cannot_work(options: dict[str, Any], message: str, plan: MakePlan) -> None:
    with pytest.raises(ValueError, match=message):
        check_plan(plan(**options))


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
    prepare = searching.run_tasks.__globals__["prepare"]

    def locked(*arguments: Any, **how: Any) -> Job:
        job = prepare(*arguments, **how)
        return dataclasses.replace(
            job, manifest=dataclasses.replace(job.manifest, subsets=Locked(job.manifest.subsets))
        )

    monkeypatch.setattr("finetune101.experiments.runner.prepare", locked)
    done = do_search(plan(base=config, finalists=1, seeds=2))
    assert {entry["state"] for entry in done.entries} == {"complete"} and done.search.finalists()[0]["failed"] == 0


# the budget


def test_a_budget_draws_as_many_points_as_it_has_time_for(plan: MakePlan) -> None:
    one = plan({"lr": "1e-4..1e-1:log"}, epochs=1, sampler="random", budget=1000.0)
    done = do_search(one, clock=Simulated(1000, lambda config: 300.0))
    assert len(done.runs) == 3 and Outcome(done.entries, []).winner == done.entries[0]
    again = do_search(one, clock=Simulated(700, lambda config: 300.0))  # the same points, and more in a new budget
    assert len(again.runs) == 2 and set(done.scores()) < set(again.scores())


def test_a_budget_leaves_time_for_the_whole_schedule_of_the_best(plan: MakePlan) -> None:
    one = plan({"lr": "1e-4..1e-1:log"}, epochs=4, budget=150.0, sampler="random", pruner="halving")
    clock = Simulated(150, lambda config: 10.0 * config.optim.epochs)
    done = do_search(one, clock=clock)
    assert [len(stage.entries()) for stage in done.search.rungs] == [6, 2] and clock.spent <= 150


def test_a_budget_leaves_time_for_the_seeds(plan: MakePlan) -> None:
    one = plan({"lr": "1e-4..1e-1:log"}, epochs=1, budget=100.0, sampler="random", finalists=1, seeds=2)
    clock = Simulated(100, lambda config: 10.0)
    done = do_search(one, clock=clock)
    assert [len(stage.entries()) for stage in done.search.stages()] == [9, 2] and clock.spent == 100


def test_out_of_time_it_stops_after_an_epoch_and_the_same_command_goes_on(plan: MakePlan) -> None:
    one = plan({"lr": [0.01]}, epochs=3, budget=100.0)
    clock = Simulated(100, lambda config: 300.0)
    done = do_search(one, clock=clock)
    assert len(done.epochs) == 1 and done.search.points_left() == 1 and done.entries == []
    again = do_search(one, clock=Simulated(1000, lambda config: 300.0))
    assert [number for _, number in again.epochs] == [2, 3]
    assert [entry["state"] for entry in again.entries] == ["complete"] and again.search.points_left() == 0


def test_the_clock_corrects_the_estimate_by_what_the_epochs_took(
    base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(searching.time, "monotonic", lambda: now[0])
    clock = Clock(1000.0, lambda config: 10.0, started=100.0)  # of 2 epochs
    assert clock.left() == 970 and clock.time_of([base, base]) == 20
    for _ in range(5):
        clock.count(Epoch(Task(base), {"epoch": 1}))
        now[0] += 15
    assert clock.time_of([base]) == pytest.approx(10 * 75 / 20) and clock.left() == 970 - 75
    assert Clock(None).left() == float("inf") and Clock(None).time_of([base]) == 0


def automatic(config: TrainConfig, **options: Any) -> Plan:
    config, space = planned_search(config, SearchOptions(**options))
    return make_plan(config, space, SearchOptions(**options))


def test_a_budget_alone_chooses_what_to_search(base: TrainConfig) -> None:
    pretrained = change(base, {"pretrain": True, "lr": 0.5})
    own = automatic(pretrained, budget="2h")
    assert (own.budget, own.sampler, own.pruner, own.finalists) == (7200, "tpe", "halving", 2)
    assert own.probe == probe_of(pretrained) and own.probe and own.probe.optim.epochs == 0
    assert own.first[0]["lr"] == 0.5 and own.points()[:2] == [own.first[0], {}]
    assert automatic(base, budget="2h").probe is None  # random weights have no features
    chosen = automatic(pretrained, budget="2h", sampler="random", pruner="median", finalists=1)
    assert (chosen.sampler, chosen.pruner, chosen.finalists) == ("random", "median", 1)
    named = automatic(pretrained, budget="30m", grid=("lr=0.1,0.2",))
    assert (named.budget, named.sampler, named.pruner, named.probe, named.first) == (1800, "grid", "none", None, ())
    for wrong in ("soon", "0s", "-1h", "1h30"):
        with pytest.raises(ValueError, match="is no time; write it like 90s, 30m or 2h"):
            automatic(base, budget=wrong)


def test_the_output_layer_alone_is_trained_first_and_may_win(plan: MakePlan, base: TrainConfig) -> None:
    probed = dataclasses.replace(base, model=dataclasses.replace(base.model, name="resnet18"))
    probe = probe_of(change(probed, {"pretrain": True}))
    assert probe
    probe = change(probe, {"pretrain": False})  # random weights do for this test
    done = do_search(plan({"lr": [0.01]}, base=probed, epochs=1, probe=probe))
    entry = done.search.probe_entry()
    assert entry and entry["error"] is None and entry["epochs"] == 0 and entry["point"] == {}
    better, worse = {**entry, "best_val_top1": 100.5}, {**entry, "best_val_top1": -1.0}
    assert Outcome(done.entries, [], better).winner == better
    assert Outcome(done.entries, [], worse).winner == done.entries[0]


# who else reads the journal, and who wrote it before


def test_optuna_and_its_dashboard_show_the_search_while_it_runs(plan: MakePlan) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    one = plan()
    file = one.folder / "optuna.journal"
    answers: list[dict[str, Any]] = []
    with alone(one.folder, "search"):
        search = Search(one, Clock(None))
        for event in search.run(InProcess()):
            if isinstance(event, Epoch):
                text = file.read_bytes()
                storage = JournalStorage(JournalFileBackend(str(file)))
                (name,) = optuna.get_all_study_names(storage)
                trials = optuna.load_study(study_name=name, storage=storage).trials
                answers.append(ask(dashboard.wsgi(storage), "/api/studies"))
                reported = [value for trial in trials for value in trial.intermediate_values]
                assert len(reported) == len(answers) - 1 and file.read_bytes() == text
    assert len(answers) == 4 and all("s-" in json.dumps(answer) for answer in answers)


def ask(app: Any, path: str) -> dict[str, Any]:
    """The answer of a WSGI application to GET ``path``."""
    from wsgiref.util import setup_testing_defaults

    environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": "GET"}
    setup_testing_defaults(environ)
    status: list[str] = []
    body = b"".join(app(environ, lambda code, headers, *rest: status.append(code)))
    assert status == ["200 OK"], status
    return json.loads(body)


def test_a_search_of_an_older_version_goes_on_as_a_grid(plan: MakePlan) -> None:
    one = plan()
    before = do_search(one).entries
    (one.folder / "optuna.journal").unlink()
    storage = JournalStorage(JournalFileBackend(str(one.folder / "optuna.journal")))
    older = optuna.create_study(storage=storage, study_name="s-0123456789", direction="maximize")
    for lr in (0.01, 0.05, 0.07):
        older.enqueue_trial({"lr": lr, "gamma": 0.1}, user_attrs={"queued": True})
    older.tell(older.ask(), 50.0)
    older.ask()
    (one.folder / "optuna.journal.lock").touch()
    done = do_search(one)
    assert done.epochs == [] and [entry["run"] for entry in done.entries] == [entry["run"] for entry in before]
    assert done.search.points_left() == 0


def test_finalists_without_all_seeds_are_not_compared(plan: MakePlan) -> None:
    one = plan(epochs=1, budget=30.0, finalists=2, seeds=2)
    done = do_search(one, clock=Simulated(30, lambda config: 10.0))
    assert len(done.runs) == 3 and done.search.finalists() == []  # the second seed of one point is missing
    assert Outcome(done.entries, done.search.finalists()).winner == done.entries[0]
    done = do_search(one, clock=Simulated(30, lambda config: 10.0))
    assert [len(entry["seeds"]) for entry in done.search.finalists()] == [2, 2]


def test_a_sampler_of_few_values_ends(plan: MakePlan) -> None:
    done = do_search(plan({"lr": [0.01, 0.02]}, epochs=1, sampler="random", trials=500))
    assert len(done.runs) == 2 and done.search.rungs[0].drawn() < 60
