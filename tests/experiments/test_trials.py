"""What a search's trials are compared by, and the values of its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from written_runs import RECORD

from finetune101.experiments.replay import Curve
from finetune101.experiments.trials import Trials, read_trials


def test_many_numbers_become_bins() -> None:
    curves = tuple(Curve({"lr": 0.001 * k}, (1.0 * k,), (1,), "complete") for k in range(1, 21))
    values, number = Trials("x", ("lr",), curves, 0).levels("lr")
    assert len(values) == 4 and [number.count(k) for k in range(4)] == [5, 5, 5, 5] and values[0] == "0.001 to 0.005"


def test_levels_are_in_order_and_hold_their_trials() -> None:
    points = [{"lr": 0.1, "schedule": "step"}, {"lr": 0.01, "schedule": "cosine"}, {"lr": 0.1, "schedule": "cosine"}]
    curves = tuple(Curve(point, (1.0, 2.0), (1, 2), "complete") for point in points)
    trials = Trials("x", ("lr", "schedule"), curves, 0)
    assert trials.by_level("lr") == [("0.01", [curves[1]]), ("0.1", [curves[0], curves[2]])]
    assert trials.levels("schedule") == (["step", "cosine"], [0, 1, 1])


def test_trials_are_compared_where_all_of_them_were() -> None:
    whole = Curve({"lr": 1}, (1.0, 2.0, 9.0), (1, 2, 3), "complete")
    cut = Curve({"lr": 2}, (3.0, 1.0), (1, 2), "pruned")
    trials = Trials("x", ("lr",), (whole, cut), 0)
    assert (trials.common, trials.score(whole), trials.score(cut)) == (2, 2.0, 3.0)
    assert trials.best is whole and Trials("x", ("lr",), (whole, cut), 0, winner={"lr": 2}).best is cut


def write_search_of(folder: Path, rungs: dict[str, dict[str, float]], **more: Any) -> Path:
    """A search over lr; ``rungs``: for each rate its accuracy by number of epochs, of which the last is its run."""
    results = []
    for lr, scores in rungs.items():
        run = folder / f"run{lr}"
        run.mkdir(parents=True)
        epochs, best = list(scores.items())[-1]
        records = [{**RECORD, "epoch": e, "step": e, "val_top1": best} for e in range(1, max(int(epochs), 1) + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        state = "complete" if len(scores) > 1 else "pruned"
        results.append({"point": {"lr": float(lr)}, "run": f"r/s/run{lr}", "state": state, "rungs": scores})
    saved = {"space": {"lr": [float(lr) for lr in rungs]}, "results": results, **more}
    (folder / "search.json").write_text(json.dumps(saved))
    return folder


def test_points_of_several_schedules_are_compared_on_the_first(tmp_path: Path) -> None:
    scores = {"0.1": {"2": 40.0, "8": 70.0}, "0.2": {"2": 50.0}, "0.3": {"2": 30.0}}
    trials = read_trials(write_search_of(tmp_path, scores))
    assert trials.rungs == (2, 8) and trials.common == 2
    assert [trials.score(curve) for curve in trials.curves] == [40.0, 50.0, 30.0]
    assert trials.probe is None and not trials.is_probe_best


def test_the_output_layer_alone_may_be_the_winner(tmp_path: Path) -> None:
    probe = {"point": {}, "run": "r/s/probe", "state": "complete", "best_val_top1": 80.0}
    scores = {"0.1": {"2": 40.0, "8": 70.0}, "0.2": {"2": 50.0}}
    winner = {"point": {"lr": 0.1}, "run": "r/s/run0.1"}
    beaten = read_trials(write_search_of(tmp_path / "a", scores, probe=probe, winner=winner))
    assert (beaten.probe, beaten.is_probe_best, beaten.best.point) == (80.0, False, {"lr": 0.1})
    winner = {"point": {}, "run": "r/s/probe"}
    best = read_trials(write_search_of(tmp_path / "b", scores, probe=probe, winner=winner))
    assert best.is_probe_best and best.best.best == 70.0


def test_rungs_of_the_first_version_are_epochs_of_one_schedule(tmp_path: Path) -> None:
    trials = read_trials(write_search_of(tmp_path, {"0.1": {"0": 40.0, "1": 70.0}, "0.2": {"0": 50.0}}))
    assert trials.rungs == () and all(curve.first_rung is None for curve in trials.curves)
