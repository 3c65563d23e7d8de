"""What a search leaves: files that agree with each other, and words for what is left to do."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from experiments.in_process import InProcess

from finetune101.cli.main import main
from finetune101.errors import Refused
from finetune101.experiments import space
from finetune101.experiments.outcome import budget_text, dry_run, picture_name
from finetune101.experiments.search import run_search
from finetune101.experiments.search_plan import Plan, make_plan
from finetune101.experiments.settings import SearchOptions
from finetune101.experiments.trials import read_trials
from finetune101.reports.figures import draw_curves
from finetune101.run import Run
from finetune101.training.job import prepare
from finetune101.training.loop import fit


def search(plan: Plan, code: int = 0) -> dict[str, Any]:
    assert run_search(plan, plan.folder / "table.json", plan.folder / "plots", draw_curves, InProcess()) == code
    return json.loads((plan.folder / "search.json").read_text())


def test_the_table_follows_the_search_and_the_winner_its_images(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    short = dataclasses.replace(base, optim=dataclasses.replace(base.optim, epochs=1))
    two = Plan(base=short, space=space.make_space({"lr": [0.01, 0.02]}))
    one = Plan(base=short, space=space.make_space({"lr": [0.02]}))
    for plan, points in ((two, 2), (one, 1), (two, 2)):
        found = search(plan)
        rows = json.loads((plan.folder / "table.json").read_text())
        assert [row[0] for row in rows] == [entry["point"] for entry in found["results"]] and len(rows) == points
    said = capsys.readouterr().out
    assert f"--exp NAME --data {short.data.root}" in said and "Ranking of 1 point by" in said
    assert f"--data {short.data.root}" in (two.folder / "winner.yaml").read_text()
    longer = dataclasses.replace(short, optim=dataclasses.replace(short.optim, epochs=2))
    with pytest.raises(ValueError, match="holds a search with epochs 1, not 2; give this one another --exp"):
        search(Plan(base=longer, space=two.space))
    search(Plan(base=longer, space=space.make_space({"lr": [0.02], "epochs": [1]})))  # searched: no other base


def test_the_score_of_a_solved_output_layer_counts_with_the_first_epoch(base: Any) -> None:
    model = dataclasses.replace(base.model, name="resnet18", head="probe")
    plan = Plan(base=dataclasses.replace(base, model=model), space=space.make_space({"lr": [0.01, 0.02]}))
    saved, seen = search(plan), read_trials(plan.folder)
    assert [len(curve.scores) for curve in seen.curves] == [2, 2] and seen.curves[0].steps[0] > 0
    assert [curve.best for curve in seen.curves] == [entry["best_val_top1"] for entry in saved["results"]]


class Interrupted(InProcess):
    """Ctrl-C is pressed after the first epoch."""

    def answer(self, task: Any, go_on: bool) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_search_leaves_what_it_has(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(base=base, space=space.make_space({"lr": [0.01, 0.02]}))
    with pytest.raises(KeyboardInterrupt):
        run_search(plan, plan.folder / "table.json", plan.folder / "plots", draw_curves, Interrupted())
    with pytest.raises(ValueError, match="has written no results yet; run its command again"):
        read_trials(plan.folder)
    with pytest.raises(ValueError, match="is no folder of a search"):
        read_trials(Path(base.runs))
    optim = dataclasses.replace(base.optim, epochs=1)
    other = Plan(base=dataclasses.replace(base, exp="other", optim=optim), space=plan.space)
    with pytest.raises(KeyboardInterrupt):  # after the first of two runs
        run_search(other, other.folder / "table.json", other.folder / "plots", draw_curves, SecondInterrupted())
    saved = json.loads((other.folder / "search.json").read_text())
    assert len(saved["results"]) == 1 and saved["winner"] and (other.folder / "winner.yaml").is_file()
    assert len(search(other)["results"]) == 2 and "Ranking of 2 points" in capsys.readouterr().out


class SecondInterrupted(InProcess):
    """Ctrl-C is pressed in the second run."""

    def answer(self, task: Any, go_on: bool) -> None:
        if len(self.started) > 1:
            raise KeyboardInterrupt
        super().answer(task, go_on)


def test_a_budget_that_is_too_short_for_a_run_is_one_sentence(base: Any) -> None:
    plan = Plan(base=base, space=space.make_space({"lr": [0.01]}), budget=1.0)
    with pytest.raises(Refused, match="more than the budget; give a longer --budget, fewer --epochs or a smaller --si"):
        search(plan)
    assert not (plan.folder / "search.json").exists()


def test_a_budget_is_reckoned_for_the_longest_point_of_a_grid_over_epochs(base: Any) -> None:
    long = dataclasses.replace(base, optim=dataclasses.replace(base.optim, epochs=20))
    grid = space.make_space({"lr": [0.01, 0.02], "epochs": [2, 1]})
    plan = make_plan(long, grid, SearchOptions(budget="1h"))
    assert plan.base.optim.epochs == 2 and "4 points, up to 2 epochs each" in budget_text(plan)


@pytest.mark.slow
def test_a_search_ends_within_its_budget_with_a_winner(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ranges = space.make_space({"lr": "1e-3..1e-1:log"})
    plan = Plan(base=base, space=ranges, sampler="tpe", pruner="halving", budget=12.0)
    before = time.monotonic()
    saved = search(plan)
    assert time.monotonic() - before < 2 * 12  # how many points fit is the machine's speed
    assert saved["winner"] and saved["points"] == len(saved["results"]) >= 1
    assert "Within 12 seconds: as many points as fit" in capsys.readouterr().out
    assert len(search(plan)["results"]) >= saved["points"]  # another budget, and more points
    assert read_trials(plan.folder).complete


def test_a_dry_run_says_how_long_and_writes_nothing(base: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    plan = Plan(base=base, space=space.make_space({"lr": [0.01, 0.02], "model": ["squeezenet1_1", "alexnet"]}))
    said = dry_run(plan)  # alexnet cannot take 32 px
    assert said.startswith("4 trials, 0 of them finished; 8 epochs") and "about" in said and "alexnet cannot" in said
    assert not plan.folder.exists() and not (tmp_path / "cache").exists()


def test_the_estimate_leaves_out_what_is_finished_and_a_teacher_is_found_below_runs(base: Any) -> None:
    short = dataclasses.replace(base, optim=dataclasses.replace(base.optim, epochs=1))
    plan = Plan(base=short, space=space.make_space({"lr": [0.01, 0.02]}))
    search(Plan(base=short, space=space.make_space({"lr": [0.01]})))
    assert dry_run(plan).startswith("2 trials, 1 of them finished; 1 epochs")
    assert dry_run(Plan(base=short, space=space.make_space({"lr": [0.01]}))).endswith("nothing to do.")
    teacher = dataclasses.replace(short, exp="teacher")
    for _ in fit(prepare(teacher), quiet=True):
        pass
    taught = dataclasses.replace(short, exp="t", optim=dataclasses.replace(short.optim, teacher=("teacher",)))
    assert "about" in dry_run(Plan(base=taught, space=plan.space))


def test_many_settings_have_pictures_and_a_ranking(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "lr=0.01 batch_size=8 weight_decay=0.0001 momentum=0.9 nesterov=true schedule=cosine warmup_epochs=0 epochs=1 "
        "label_smoothing=0.1 crop_scale=0.8 erasing=0.1 policy=trivial mix=0.2 ema=0.9 backbone_lr_ratio=0.5 "
        "norm_weight_decay=false freeze_norm=false flip=true seed=1"
    )
    plan = Plan(base=dataclasses.replace(base, exp="e" * 190), space=space.parse_space(words.split()))
    search(plan)
    (picture,) = (plan.folder / "plots").iterdir()
    assert len(picture.name.encode()) < 255 and "Ranking of 1 point" in capsys.readouterr().out
    point = {"model": "../x\n/y", "weights": "/a b/c.pth"}
    assert (
        picture_name(plan, point, Run(Path("0123456789abcdef")))
        == f"{'e' * 60}_model=..-x-x0a-y,weights=-a-b-c.pth_012345.png"
    )


def test_a_damaged_search_json_is_one_sentence(base: Any) -> None:
    short = dataclasses.replace(base, optim=dataclasses.replace(base.optim, epochs=1))
    plan = Plan(base=short, space=space.make_space({"lr": [0.01, 0.02]}))
    search(plan)
    file = plan.folder / "search.json"
    whole = json.loads(file.read_text())
    for change in (
        {"space": {"lr": [1], "../../x": [1]}}, {"space": {"gamma": [1]}}, {"space": []}, {"results": {}},
        {"results": [{}]}, {"results": [{**whole["results"][0], "run": ".."}]},
        {"winner": 3}, {"winner": {"point": {}, "run": None}}, {"finalists": 3},
    ):  # fmt: skip
        file.write_text(json.dumps({**whole, **change}))
        with pytest.raises(Refused, match=r"search\.json"):
            read_trials(plan.folder)
    (plan.folder / "table.json").write_text("[[")  # written anew, like what can be had from the runs
    for text in (
        json.dumps({**whole, "base": {"exp": 1}}),
        json.dumps({**whole, "commands": 3}),
        json.dumps({"space": {}, "results": []}),
        "[",
        "null",
    ):
        file.write_text(text)
        with pytest.raises(Refused, match=r"search\.json"):
            search(plan)
    file.unlink()
    assert [e["run"] for e in search(plan)["results"]] == [e["run"] for e in whole["results"]]
    run = Run(Path(whole["results"][0]["run"]))
    (run.path / "config.json").write_text("[")
    (plan.folder / "optuna.journal").unlink()
    with pytest.raises(Refused, match="remove the folder"):
        search(plan)


def test_a_search_over_size_end_to_end(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(tiny_data), "--model", "squeezenet1_1", "--no-pretrain", "--epochs", "1", "--threads", "1"]
    assert main(["search", "--exp", "my sizes", *flags, "--batch-size", "8", "--grid", "size=32,48"]) == 0
    said = capsys.readouterr().out
    assert "This takes about" in said and "search report 'runs/my sizes'" in said
    folder = tmp_path / "runs" / "my sizes"
    saved = json.loads((folder / "search.json").read_text())
    assert sorted(entry["point"]["size"] for entry in saved["results"]) == [32, 48]
    for entry in saved["results"]:
        assert Run(tmp_path / entry["run"]).config().model.size == entry["point"]["size"]
    assert f"size: {saved['winner']['point']['size']}" in (folder / "winner.yaml").read_text()
    assert main(["search", "report", "runs/my sizes"]) == 0 and (folder / "report" / "report.html").is_file()
    assert main(["train", "--exp", "my sizes", *flags]) == 2 and main(["study", "--exp", "my sizes", *flags[:2]]) == 2
    assert "Traceback" not in capsys.readouterr().err
