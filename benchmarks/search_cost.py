"""What each strategy of a search costs on a grid whose truth is known: ``python benchmarks/search_cost.py TRUTH.json``.

TRUTH.json is of ``search_truth.py``. A strategy sees one fold; it is done when a run of a good point, on the whole
schedule, has ended: one whose mean over all folds is within 0.5 points of the best mean. Its cost is the training
steps until then as a share of the whole grid's, over 20 orders. One that never gets there costs the whole grid.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from recorded import record

from finetune101.experiments.replay import PRUNERS
from finetune101.experiments.search_plan import ETA
from finetune101.experiments.space import Point, point_label
from finetune101.experiments.stage import make_sampler


@dataclass(frozen=True)
class Recorded:
    """A point, its curves by number of epochs and fold (validation accuracy in %), and its steps by those."""

    point: Point
    curves: dict[int, list[list[float]]]
    steps: dict[int, int]

    @property
    def epochs(self) -> int:
        """Those of the whole schedule."""
        return max(self.curves)

    def score(self, epochs: int, fold: int) -> float:
        """What a search sees of a run of ``epochs``."""
        return max(self.curves[epochs][fold])

    @property
    def truth(self) -> float:
        """Mean over all folds, on the whole schedule."""
        return float(np.mean([max(curve) for curve in self.curves[self.epochs]]))


Run = tuple[Recorded, int, bool]
"""A point, the steps that were spent on it, and whether it ran to the end of the whole schedule."""
Strategy = Callable[[list[Recorded], int, int], Iterator[Run]]


def shuffled(grid: list[Recorded], seed: int) -> list[Recorded]:
    """``grid`` in a random order."""
    return [grid[i] for i in np.random.default_rng(seed).permutation(len(grid))]


def random(grid: list[Recorded], fold: int, seed: int) -> Iterator[Run]:
    """One point after the other."""
    for one in shuffled(grid, seed):
        yield one, one.steps[one.epochs], True


def tpe(grid: list[Recorded], fold: int, seed: int) -> Iterator[Run]:
    """What the scores so far suggest (Optuna); a point that is drawn again costs nothing."""
    by_label = {point_label(one.point): one for one in grid}
    choices = {name: list(dict.fromkeys(one.point[name] for one in grid)) for name in grid[0].point}
    study = optuna.create_study(direction="maximize", sampler=make_sampler("tpe", seed))
    tried = set()
    for _ in range(50 * len(grid)):
        trial = study.ask()
        label = point_label({name: trial.suggest_categorical(name, values) for name, values in choices.items()})
        one = by_label[label]
        study.tell(trial, one.score(one.epochs, fold))
        if label not in tried:
            tried.add(label)
            yield one, one.steps[one.epochs], True


def pruned(pruner: Any, grid: list[Recorded], fold: int, seed: int) -> Iterator[Run]:
    """One point after the other, stopped by its own curve on the whole schedule (Optuna)."""
    study = optuna.create_study(direction="maximize", pruner=PRUNERS[pruner]())
    for one in shuffled(grid, seed):
        trial, curve = study.ask(), one.curves[one.epochs][fold]
        stopped = len(curve)
        for epoch, score in enumerate(curve, 1):
            trial.report(score, epoch)
            if trial.should_prune() and epoch < len(curve):
                stopped = epoch
                break
        is_whole = stopped == len(curve)
        study.tell(trial, *([max(curve)] if is_whole else [None, optuna.trial.TrialState.PRUNED]))
        yield one, one.steps[one.epochs] * stopped // len(curve), is_whole


def halving(grid: list[Recorded], fold: int, seed: int) -> Iterator[Run]:
    """A short schedule as a whole for each point; of every ETA points the best one goes on to the whole schedule."""
    short, promoted = min(grid[0].curves), set[str]()
    ended: list[Recorded] = []
    for number, one in enumerate(shuffled(grid, seed), 1):
        ended.append(one)
        yield one, one.steps[short], False
        most = math.ceil(number / ETA) if number == len(grid) else number // ETA
        for best in sorted(ended, key=lambda other: -other.score(short, fold))[:most]:
            if point_label(best.point) not in promoted:
                promoted.add(point_label(best.point))
                yield best, best.steps[best.epochs], True


STRATEGIES: dict[str, Strategy] = {
    "random": random,
    "tpe": tpe,
    "median": lambda *arguments: pruned("median", *arguments),
    "asha (own curves)": lambda *arguments: pruned("asha", *arguments),
    "halving (whole schedules)": halving,
}


def cost(runs: Iterator[Run], good: set[str], whole: int) -> float:
    """Steps until a good point was trained on the whole schedule, as a share of ``whole``; 1 where none was."""
    spent = 0
    for one, steps, is_whole in runs:
        spent += steps
        if is_whole and point_label(one.point) in good:
            return spent / whole
    return 1.0


def standard_error(grid: list[Recorded], validated: int) -> tuple[float, float]:
    """Of the best point's accuracy, and, the median over points, of its difference to the best over folds (points)."""
    best = max(grid, key=lambda one: one.truth)
    share = best.truth / 100
    differences = [
        np.std([max(a) - max(b) for a, b in zip(one.curves[one.epochs], best.curves[best.epochs], strict=True)], ddof=1)
        / math.sqrt(len(best.curves[best.epochs]))
        for one in grid
        if one is not best
    ]
    return 100 * math.sqrt(share * (1 - share) / validated), float(np.median(differences))


def main() -> int:
    """Prints a line per strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("truth", type=Path)
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--within", type=float, default=0.5, help="points of the best that are good enough")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    saved = json.loads(arguments.truth.read_text(encoding="utf-8"))
    grid = [
        Recorded(
            one["point"],
            {int(epochs): curves for epochs, curves in one["curves"].items()},
            {int(epochs): steps for epochs, steps in one["steps"].items()},
        )
        for one in saved["grid"]
    ]
    best = max(one.truth for one in grid)
    good = {point_label(one.point) for one in grid if one.truth >= best - arguments.within}
    whole = sum(one.steps[one.epochs] for one in grid)
    error, paired = standard_error(grid, saved["validated"])
    print(f"{len(grid)} points, best {best:.2f} % (standard error {error:.2f}, of a difference {paired:.2f})")
    print(f"{len(good)} points are within {arguments.within} of it")
    values: dict[str, Any] = {
        "points": len(grid), "best": best, "standard_error": error, "standard_error_of_a_difference": paired,
        "within": arguments.within, "good_points": len(good), "steps_of_the_grid": whole, "orders": arguments.orders,
    }  # fmt: skip
    for name, strategy in STRATEGIES.items():
        shares = [cost(strategy(grid, n % saved["folds"], n), good, whole) for n in range(arguments.orders)]
        values[name] = {"mean": float(np.mean(shares)), "missed": sum(own >= 1 for own in shares), "shares": shares}
        print(f"{name:27s} mean {np.mean(shares):.3f}  median {np.median(shares):.3f}  missed {values[name]['missed']}")
    record(values, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
