"""What a search leaves: files that agree with each other, and words for what is left to do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune101.search import effects, space
from finetune101.search.study import Plan
from finetune101.searching import run_search


def search(plan: Plan, **how: Any) -> dict[str, Any]:
    run_search(plan, plan.folder / "table.json", plan.folder / "plots", **how)
    return json.loads((plan.folder / "search.json").read_text())


def test_the_table_follows_the_search_and_the_winner_its_images(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    short = dataclasses.replace(base, optim=dataclasses.replace(base.optim, epochs=1))
    two = Plan(base=short, space=space.make({"lr": [0.01, 0.02]}))
    one = Plan(base=short, space=space.make({"lr": [0.02]}))
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
    search(Plan(base=longer, space=space.make({"lr": [0.02], "epochs": [1]})))  # searched: no other base


def test_the_score_of_a_solved_output_layer_counts_with_the_first_epoch(base: Any) -> None:
    model = dataclasses.replace(base.model, name="resnet18", head="probe")
    plan = Plan(base=dataclasses.replace(base, model=model), space=space.make({"lr": [0.01, 0.02]}))
    saved, seen = search(plan), effects.load(plan.folder)
    assert [len(curve.scores) for curve in seen.curves] == [2, 2] and seen.curves[0].steps[0] > 0
    assert [curve.best for curve in seen.curves] == [entry["best_val_top1"] for entry in saved["results"]]


def test_a_search_out_of_time_says_what_is_left(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(base=base, space=space.make({"lr": [0.01, 0.02]}), timeout=1e-6)
    run_search(plan, plan.folder / "table.json", plan.folder / "plots")
    assert capsys.readouterr().out.strip() == "2 of 2 points are left; the same command goes on."
    with pytest.raises(ValueError, match="has finished no trial yet; run its command again"):
        effects.load(plan.folder)
    with pytest.raises(ValueError, match="is no folder of a search"):
        effects.load(Path(base.runs))
