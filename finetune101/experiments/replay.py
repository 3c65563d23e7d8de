"""Replays samplers and pruners on the recorded curves of a search: what they would have cost, and whom they drop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import optuna

from finetune101.experiments.space import Point, point_label
from finetune101.experiments.stage import Sampler, make_sampler

Pruner = Literal["none", "median", "asha"]
PRUNERS: dict[Pruner, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
}
"""What stops a run by its own curve: "asha" keeps the best third at epochs 1, 3, 9, ..., "median" the better half."""
ORDERS = 40  # of the trials, in which a report asks whether a pruner drops the winner


@dataclass(frozen=True)
class Curve:
    """One trial: its point, validation accuracy (%) and training steps at the end of each epoch, and how it ended."""

    point: Point
    scores: tuple[float, ...]
    steps: tuple[int, ...]
    state: str
    first_rung: float | None = None
    """Accuracy (%) on the shortest schedule, where longer ones were for the best points only."""

    @property
    def best(self) -> float:
        """The trial's score: the best of its epochs."""
        return max(self.scores)


@dataclass(frozen=True)
class Replayed:
    """What a replay saw: (steps of the search so far, accuracy) of each epoch, and the labels of pruned points."""

    epochs: tuple[tuple[int, float], ...]
    pruned: frozenset[str]

    def steps_to(self, target: float) -> int | None:
        """Steps until an accuracy of ``target`` was seen; None when it never was."""
        return next((steps for steps, score in self.epochs if score >= target), None)


def replay(curves: Sequence[Curve], sampler: Sampler, pruner: Pruner, seed: int) -> Replayed:
    """Runs Optuna's sampler and pruner over the recorded points; a point drawn again costs nothing, as in a search.

    It ends when every point was tried, or after 50 draws for each.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorded = {point_label(curve.point): curve for curve in curves}
    choices = {name: list(dict.fromkeys(curve.point[name] for curve in curves)) for name in curves[0].point}
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, seed), pruner=PRUNERS[pruner]())
    if sampler == "grid":
        for i in np.random.default_rng(seed).permutation(len(curves)):
            study.enqueue_trial(curves[i].point)
    spent, epochs, tried, pruned = 0, [], dict[str, float](), set()
    for _ in range(50 * len(curves)):
        trial = study.ask()
        point = {name: trial.suggest_categorical(name, values) for name, values in choices.items()}
        name = point_label(point)
        if name in tried or name not in recorded:  # a point that diverged has no curve
            state = optuna.trial.TrialState.PRUNED if name in pruned else optuna.trial.TrialState.FAIL
            study.tell(trial, *([tried[name]] if name in tried and name not in pruned else [None, state]))
            continue
        curve, before = recorded[name], spent
        for epoch, (score, steps) in enumerate(zip(curve.scores, curve.steps, strict=True), 1):
            spent = before + steps
            epochs.append((spent, score))
            trial.report(score, epoch)
            if trial.should_prune() and epoch < len(curve.scores):
                pruned.add(name)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, curve.best)
        tried[name] = max(curve.scores[:epoch])
        if len(tried) == len(recorded):
            break
    return Replayed(tuple(epochs), frozenset(pruned))


def dropped(curves: Sequence[Curve], pruner: Pruner, orders: int = ORDERS) -> float:
    """Share of random orders of the trials in which ``pruner`` would have stopped the final winner early."""
    winner = point_label(max(curves, key=lambda curve: curve.best).point)
    return sum(winner in replay(curves, "grid", pruner, seed).pruned for seed in range(orders)) / orders
