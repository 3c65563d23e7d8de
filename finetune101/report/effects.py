"""What a search saw, in numbers and in words: effects, interactions, importance, changes of rank, costs of pruning."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy import stats

from finetune101.errors import Refused, escaped, shortened
from finetune101.experiments.replay import ORDERS, Curve, dropped
from finetune101.experiments.space import SEARCHED, Point, text
from finetune101.files import checked
from finetune101.run import Run

Floats = NDArray[np.float64]
EARLY = 3  # the epoch whose ranking is compared with the last one's
LEVELS = 6  # more values than this are put into bins


@dataclass(frozen=True)
class Seen:
    """The trials of a search that have a curve, and the settings that it varied."""

    name: str
    names: tuple[str, ...]
    curves: tuple[Curve, ...]
    failed: int
    images: int | None = None
    """Validation images, where the winner's run is at hand."""
    winner: Point | None = None
    """What the search chose, where that is not simply the best trial."""
    finalists: int = 0
    """Points that were trained again with several seeds to choose it."""

    @property
    def best(self) -> Curve:
        """The winner."""
        chosen = [curve for curve in self.curves if curve.point == self.winner]
        return chosen[0] if chosen else max(self.curves, key=lambda curve: curve.best)

    @property
    def common(self) -> int | None:
        """The last epoch that all trials reached, where some were stopped early: the only fair comparison."""
        return None if len(self.complete) == len(self.curves) else min(len(curve.scores) for curve in self.curves)

    def score(self, curve: Curve) -> float:
        """What the trial is compared by: its best accuracy up to the last common epoch."""
        return max(curve.scores[: self.common])

    @property
    def complete(self) -> tuple[Curve, ...]:
        """The trials that were not stopped early."""
        return tuple(curve for curve in self.curves if curve.state == "complete")


@dataclass(frozen=True)
class Level:
    """One value of a setting: trials that had it and their mean accuracy, the other settings held even."""

    value: str
    trials: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Variance:
    """Shares of the accuracy's variance: of each setting, of each pair beyond its two settings, and what is left."""

    effects: dict[str, tuple[Level, ...]]
    main: dict[str, float]
    pairs: dict[tuple[str, str], float]
    rest: float


def load(folder: Path) -> Seen:
    """The search in ``folder``, from its search.json and run directories.

    Raises Refused when it is none or has fewer than two trials.
    """
    if not (folder / "search.json").is_file():
        begun = (folder / "optuna.journal").exists()
        raise Refused(
            f"the search in {folder} has finished no trial yet; run its command again, it goes on"
            if begun
            else f"{folder} is no folder of a search; give RUNS/EXP of one"
        )
    saved = Run(folder).read_json("search.json")
    _check(saved, folder / "search.json")
    curves = []
    for entry in saved["results"]:
        records = Run(folder / Path(entry["run"]).name).metrics() if entry["run"] else []
        if records and entry["state"] != "failed":
            curves.append(_curve(entry, records, folder))
    if len(curves) < 2:
        raise Refused(f"{folder} has {len(curves)} trial(s) with a curve; let the search train at least 2")
    names = tuple(name for name in saved["space"] if len({str(curve.point[name]) for curve in curves}) > 1)
    chosen = saved.get("winner") or saved["results"][0]
    winner = Run(folder / Path(chosen["run"] or "").name)
    images = len(winner.read_json("split.json")["subsets"]["val"]) if winner.has("split.json") else None
    failed = sum(entry["state"] == "failed" for entry in saved["results"])
    return Seen(folder.name, names, tuple(curves), failed, images, chosen["point"], len(saved.get("finalists", [])))


REMEDY = "give the search's command again, it writes the file anew from its runs"


def _check(saved: Any, file: Path) -> None:
    """Raises Refused where the names in a search.json are not those of settings, or a point lacks one or its value."""
    if foreign := sorted(set(saved["space"]) - SEARCHED.keys()):
        raise Refused(f"{file} searches {escaped(shortened(foreign[0], 60))}, which is no setting; {REMEDY}")
    chosen = saved.get("winner")
    checked(chosen, Winner | None, f"{file}, winner,", remedy=REMEDY)
    checked(saved.get("finalists", []), list[dict[str, Any]], f"{file}, finalists,", remedy=REMEDY)
    for number, entry in enumerate([*saved["results"], *([chosen] if chosen else [])], 1):
        if entry["run"] and Path(entry["run"]).name in ("", ".."):
            raise Refused(f"{file} has a run without a name (result {number}); {REMEDY}")
        if missing := sorted(set(saved["space"]) - entry["point"].keys()):
            raise Refused(f"{file} has a point without {missing[0]} (result {number}); {REMEDY}")
        for name in saved["space"]:
            if not isinstance(entry["point"][name], str | bool | int | float | None):
                raise Refused(f"{file} has a {name} that is no value (result {number}); {REMEDY}")


class Winner(TypedDict):
    """The key "winner" of search.json."""

    point: dict[str, Any]
    run: str | None


def _curve(entry: dict[str, Any], records: list[dict[str, Any]], folder: Path) -> Curve:
    """The curve of a trial from its records. Raises Refused for an epoch without a validation accuracy."""
    if records[0]["epoch"] == 0 and len(records) > 1:  # a solved output layer's score counts with epoch 1
        solved, first, *others = records
        records = [{**first, "val_top1": max(solved["val_top1"] or 0, first["val_top1"] or 0)}, *others]
    scores, steps = (tuple(record[key] for record in records) for key in ("val_top1", "step"))
    if None in scores:
        raise Refused(f"{folder / Path(entry['run']).name} has epochs without validation, so it is no trial; {REMEDY}")
    return Curve(entry["point"], scores, steps, entry["state"])


def levels(seen: Seen, name: str) -> tuple[list[str], list[int]]:
    """The values of setting ``name`` in order, as text, and which of them each trial has; many numbers become bins."""
    values = [curve.point[name] for curve in seen.curves]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    distinct = sorted(set(values)) if numbers else list(dict.fromkeys(values))
    if numbers and len(distinct) > LEVELS:
        edges = np.quantile(values, [0.25, 0.5, 0.75])
        which = np.searchsorted(edges, values, side="right")
        order = sorted(set(which.tolist()))
        ends = [[v for v, w in zip(values, which, strict=True) if w == bin] for bin in order]
        return [" to ".join(dict.fromkeys([f"{min(e):.3g}", f"{max(e):.3g}"])) for e in ends], [
            order.index(w) for w in which
        ]
    return [text(value) for value in distinct], [distinct.index(value) for value in values]


def variance(seen: Seen) -> Variance:
    """Analysis of variance by least squares on the settings' values; intervals are 95 %, from what it leaves over.

    Shares are omega squared (Hays, 1963), which is 0 on average where there is no effect. A pair is left out where too
    few trials are left to judge it by, or where the F test cannot tell it from chance (5 %, over all pairs).
    """
    y = np.array([seen.score(curve) for curve in seen.curves])
    columns = {name: _dummies(levels(seen, name)[1]) for name in seen.names}
    total = float(((y - y.mean()) ** 2).sum()) or 1.0
    additive = _design(list(columns.values()), len(y))
    left, free = _residual(additive, y)

    def omega(without: tuple[float, int], with_it: tuple[float, int]) -> float:
        error = with_it[0] / with_it[1] if with_it[1] else 0.0
        return max(0.0, without[0] - with_it[0] - (without[1] - with_it[1]) * error) / (total + error)

    main = {
        name: omega(_residual(_design([c for n, c in columns.items() if n != name], len(y)), y), (left, free))
        for name in seen.names
    }
    products = {
        (a, b): (columns[a][:, :, None] * columns[b][:, None, :]).reshape(len(y), -1)
        for a, b in itertools.combinations(seen.names, 2)
    }
    whole = _residual(np.hstack([additive, *products.values()]), y)
    pairs = {}
    for pair in products:
        less = _residual(np.hstack([additive, *(p for other, p in products.items() if other != pair)]), y)
        if 0 < whole[1] < less[1]:
            f = (less[0] - whole[0]) / (less[1] - whole[1]) / (whole[0] / whole[1] or 1e-12)
            if stats.f.sf(f, less[1] - whole[1], whole[1]) * len(products) < 0.05:
                pairs[pair] = omega(less, whole)
    effects = {name: _effect(seen, name, columns, y, left, free) for name in seen.names}
    return Variance(effects, main, pairs, max(0.0, 1 - sum(main.values()) - sum(pairs.values())))


def _dummies(which: list[int]) -> Floats:
    """A column for each value but the first, which is 0 in all of them."""
    return (np.array(which)[:, None] == np.arange(1, max(which) + 1)).astype(float)


def _design(columns: list[Floats], n: int) -> Floats:
    return np.hstack([np.ones((n, 1)), *columns])


def _residual(design: Floats, y: Floats) -> tuple[float, int]:
    """Sum of squares that least squares leaves, and its degrees of freedom."""
    coefficients, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    return float(((y - design @ coefficients) ** 2).sum()), len(y) - int(rank)


def _effect(seen: Seen, name: str, columns: dict[str, Floats], y: Floats, left: float, free: int) -> tuple[Level, ...]:
    design = _design(list(columns.values()), len(y))
    inverse = np.linalg.pinv(design.T @ design)
    coefficients = inverse @ design.T @ y
    values, which = levels(seen, name)
    found = []
    for k, value in enumerate(values):
        one = np.zeros((1, len(values) - 1))
        if k:
            one[0, k - 1] = 1
        # the mean over all trials, had each of them this value
        parts = [np.repeat(one, len(y), 0) if n == name else c for n, c in columns.items()]
        at = _design(parts, len(y)).mean(0)
        mean, half = float(at @ coefficients), None
        if free > 0:
            half = float(stats.t.ppf(0.975, free) * np.sqrt(max(0.0, at @ inverse @ at) * left / free))
        low, high = (None, None) if half is None else (max(0.0, mean - half), min(100.0, mean + half))
        found.append(Level(value, which.count(k), min(100.0, max(0.0, mean)), low, high))
    return tuple(found)


def importance(seen: Seen) -> dict[str, dict[str, float]]:
    """Optuna's two measures, PED-ANOVA (being among the best tenth) and fANOVA (all variance), each summing to 1.

    fANOVA is left out where scikit-learn is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for curve in seen.curves:
        distributions = {name: _distribution(seen, name) for name in seen.names}
        point = {name: curve.point[name] for name in seen.names}
        study.add_trial(optuna.create_trial(params=point, distributions=distributions, value=seen.score(curve)))
    evaluators: dict[str, Any] = {"PED-ANOVA": optuna.importance.PedAnovaImportanceEvaluator()}
    with contextlib.suppress(ImportError):
        evaluators["fANOVA"] = optuna.importance.FanovaImportanceEvaluator(seed=0)
    if not seen.names or len({seen.score(curve) for curve in seen.curves}) == 1:
        return {}
    return {name: optuna.importance.get_param_importances(study, evaluator=e) for name, e in evaluators.items()}


def _distribution(seen: Seen, name: str) -> optuna.distributions.BaseDistribution:
    values = [curve.point[name] for curve in seen.curves]
    if all(isinstance(value, float) for value in values) and len(set(values)) > LEVELS:
        return optuna.distributions.FloatDistribution(min(values), max(values), log=min(values) > 0)
    return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))


@dataclass(frozen=True)
class RankChange:
    """How the ranking after ``early`` epochs foretells the final one, over the ``trials`` that ran to the end."""

    early: int
    trials: int
    correlation: float | None
    winner_then: int
    kept: int
    top: int


def rank_change(curves: Sequence[Curve], early: int = EARLY) -> RankChange | None:
    """Compares the ranks at epoch ``early`` and at the end; None with fewer than three trials longer than that."""
    long = [curve for curve in curves if len(curve.scores) > early]
    if len(long) < 3:
        return None
    then, last = np.array([max(c.scores[:early]) for c in long]), np.array([c.best for c in long])
    varied = len(set(then)) > 1 and len(set(last)) > 1
    top = min(5, len(long) // 2)
    best_then, best_last = (set(np.argsort(-scores, kind="stable")[:top].tolist()) for scores in (then, last))
    return RankChange(
        early=early,
        trials=len(long),
        correlation=float(stats.spearmanr(then, last).statistic) if varied else None,
        winner_then=int((then > then[last.argmax()]).sum()) + 1,
        kept=len(best_then & best_last),
        top=top,
    )


def pruning(seen: Seen) -> dict[str, float]:
    """For each pruner the share of random orders in which it would have dropped the winner; {} with too few curves."""
    if len(seen.complete) < 4:
        return {}
    return {"asha": dropped(seen.complete, "asha"), "median": dropped(seen.complete, "median")}


def slow(seen: Seen, name: str) -> list[tuple[str, float, int]]:
    """(value of ``name``, points still gained over the last third, epochs) where trials with that value still rise."""
    values, which = levels(seen, name)
    found = []
    for k, value in enumerate(values):
        mine = [c for c, w in zip(seen.curves, which, strict=True) if w == k and c.state == "complete"]
        epochs = min((len(c.scores) for c in mine), default=0)
        if epochs < 3:
            continue
        third = max(1, epochs // 3)
        gain = float(np.mean([max(c.scores) - max(c.scores[: len(c.scores) - third]) for c in mine]))
        if gain > 1:
            found.append((value, gain, epochs))
    return found


def _means(seen: Seen, name: str) -> list[tuple[str, float]]:
    """(value of ``name``, mean accuracy of the trials that had it)."""
    values, which = levels(seen, name)
    scores = [[seen.score(c) for c, w in zip(seen.curves, which, strict=True) if w == k] for k in range(len(values))]
    return [(value, float(np.mean(own))) for value, own in zip(values, scores, strict=True)]


def words(seen: Seen, found: Variance, change: RankChange | None, drops: dict[str, float]) -> str:
    """A paragraph for people, every number of it computed."""
    best = seen.best
    at = ", ".join(f"{name} {text(value)}" for name, value in best.point.items())
    said = [
        f"Of {len(seen.curves)} trials, {seen.finalists} were trained again with several seeds. The best mean is "
        f"that of {at}, which reached {best.best:.2f} % of the validation images in the search."
        if seen.finalists
        else f"The best of {len(seen.curves)} trials reached {best.best:.2f} % of the validation images with {at}."
    ]
    equal = sum(curve.best == best.best for curve in seen.curves) - 1
    if equal:
        said.append(f"{equal} more reached the same.")
    if seen.images:
        error = 100 * math.sqrt(best.best / 100 * (1 - best.best / 100) / seen.images)
        near = sum(curve.best >= best.best - error for curve in seen.curves) - 1
        said.append(
            f"On {seen.images} validation images its standard error is {error:.1f} points, and {near} other trials lie "
            "within that"
            + (": --finalists trains the best again with several seeds." if near and not seen.finalists else ".")
        )
    stopped = len(seen.curves) - len(seen.complete)
    if stopped:
        said.append(f"{stopped} of them were stopped early, so what follows compares all at epoch {seen.common}.")
    if seen.failed:
        said.append(f"{seen.failed} more could not be trained to an end.")
    ranked = sorted(found.main.items(), key=lambda item: -item[1])
    if ranked:
        name, share = ranked[0]
        means = sorted(_means(seen, name), key=lambda item: -item[1])
        said.append(
            f"{name} explains {100 * share:.0f} % of the variance: on average {means[0][1]:.1f} % at "
            f"{means[0][0]}, {means[-1][1]:.1f} % at {means[-1][0]}."
        )
        others = [f"{other} {100 * part:.0f} %" for other, part in ranked[1:4] if part >= 0.01]
        if others:
            said.append(f"Then come {', '.join(others)}.")
        elif ranked[1:]:
            said.append("No other setting explains 1 %.")
        for value, gain, epochs in slow(seen, name)[:2]:
            said.append(
                f"At {name} {value}, {epochs} epochs are too few: the last third still gained {gain:.1f} points."
            )
    if found.pairs and max(found.pairs.values()) >= 0.02:
        (a, b), share = max(found.pairs.items(), key=lambda item: item[1])
        said.append(f"{a} and {b} act on each other: beyond their own effects this is {100 * share:.0f} %.")
    if change and change.correlation is not None:
        said.append(
            f"The ranking after epoch {change.early} agrees with the last one to a rank correlation of "
            f"{change.correlation:.2f}; {change.kept} of the {change.top} best were among the {change.top} best then, "
            f"the winner was number {change.winner_then}."
        )
    if drops:
        parts = [f"{pruner} in {100 * share:.0f} %" for pruner, share in drops.items()]
        orders = f"In {ORDERS} random orders of the trials, pruning would have dropped the winner"
        said.append(f"{orders}: {', '.join(parts)} of them.")
    return " ".join(said)
