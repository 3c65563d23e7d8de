"""What a search's trials are compared by, and the values of its settings."""

from __future__ import annotations

from finetune101.experiments.replay import Curve
from finetune101.experiments.trials import Trials


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
