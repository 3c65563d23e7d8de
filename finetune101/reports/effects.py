"""What the settings of a search do: effects, interactions, importance, changes of rank, costs of pruning, in words."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy import stats

from finetune101.experiments import space
from finetune101.experiments.replay import ORDERS, Curve, dropped
from finetune101.experiments.trials import LEVELS, Trials
from finetune101.reports.page import Words, sentence

Floats = NDArray[np.float64]
EARLY = 3  # the epoch whose ranking is compared with the last one's


@dataclass(frozen=True)
class Level:
    """One value of a setting: how many trials had it, and their mean accuracy (%) with the other settings held even."""

    value: str
    trials: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Variance:
    """Shares of the accuracy's variance: of each setting, of each pair beyond its two settings, and of the rest."""

    effects: dict[str, tuple[Level, ...]]
    main: dict[str, float]
    pairs: dict[tuple[str, str], float]
    rest: float

    @property
    def strongest(self) -> str | None:
        """The setting with the largest share; None without settings."""
        return max(self.main, key=lambda name: self.main[name], default=None)


def analyse_variance(trials: Trials) -> Variance:
    """Analysis of variance by least squares on the settings' values; intervals are 95 %, from the residuals.

    Shares are omega squared (Hays, 1963), which is 0 on average where there is no effect. A pair is left out where too
    few trials are left to judge it by, or where the F test cannot tell it from chance (5 %, over all pairs). Random
    searches leave cells empty, so degrees of freedom are counted by the rank of the design.
    """
    y = np.array([trials.score(curve) for curve in trials.curves])
    columns = {}
    for name in trials.settings:  # a column for each value but the first, which is 0 in all of them
        _, number = trials.levels(name)
        columns[name] = (np.array(number)[:, None] == np.arange(1, max(number) + 1)).astype(float)
    additive = np.hstack([np.ones((len(y), 1)), *columns.values()])
    ends = np.cumsum([1, *(own.shape[1] for own in columns.values())])
    where = {name: np.arange(low, high) for name, (low, high) in zip(columns, itertools.pairwise(ends), strict=True)}
    total = float(((y - y.mean()) ** 2).sum()) or 1.0

    def omega(without: tuple[float, int], whole: tuple[float, int]) -> float:
        error = whole[0] / whole[1] if whole[1] else 0.0
        return max(0.0, without[0] - whole[0] - (without[1] - whole[1]) * error) / (total + error)

    fit = _residual(additive, y)
    main = {name: omega(_residual(np.delete(additive, own, 1), y), fit) for name, own in where.items()}
    products = {
        (a, b): (columns[a][:, :, None] * columns[b][:, None, :]).reshape(len(y), -1)
        for a, b in itertools.combinations(trials.settings, 2)
    }
    whole = _residual(np.hstack([additive, *products.values()]), y)
    pairs = {}
    for pair in products:
        less = _residual(np.hstack([additive, *(p for other, p in products.items() if other != pair)]), y)
        if 0 < whole[1] < less[1]:
            f = (less[0] - whole[0]) / (less[1] - whole[1]) / (whole[0] / whole[1] or 1e-12)
            if stats.f.sf(f, less[1] - whole[1], whole[1]) * len(products) < 0.05:
                pairs[pair] = omega(less, whole)
    effects = {name: _levels(trials, name, where[name], additive, y) for name in trials.settings}
    return Variance(effects, main, pairs, max(0.0, 1 - sum(main.values()) - sum(pairs.values())))


def _residual(design: Floats, y: Floats) -> tuple[float, int]:
    """Sum of squares that least squares leaves, and its degrees of freedom."""
    coefficients, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    return float(((y - design @ coefficients) ** 2).sum()), len(y) - int(rank)


def _levels(trials: Trials, setting: str, where: NDArray[np.intp], design: Floats, y: Floats) -> tuple[Level, ...]:
    """Of each value of ``setting`` (columns ``where`` of ``design``) the mean over all trials, had each this value."""
    left, free = _residual(design, y)
    inverse = np.linalg.pinv(design.T @ design)
    values, number = trials.levels(setting)
    levels = []
    for k, value in enumerate(values):
        at = design.mean(0)
        at[where] = np.arange(1, len(values)) == k
        mean, low, high = float(at @ inverse @ design.T @ y), None, None
        if free > 0:
            half = float(stats.t.ppf(0.975, free) * np.sqrt(max(0.0, at @ inverse @ at) * left / free))
            low, high = max(0.0, mean - half), min(100.0, mean + half)
        levels.append(Level(value, number.count(k), min(100.0, max(0.0, mean)), low, high))
    return tuple(levels)


def importance(trials: Trials) -> dict[str, dict[str, float]]:
    """Optuna's two measures, PED-ANOVA (being among the best tenth) and fANOVA (all variance), each summing to 1.

    fANOVA is left out where scikit-learn is not installed.
    """
    scores = [trials.score(curve) for curve in trials.curves]
    if not trials.settings or len(set(scores)) == 1:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    kinds = {name: _distribution([curve.point[name] for curve in trials.curves]) for name in trials.settings}
    for curve, score in zip(trials.curves, scores, strict=True):
        point = {name: curve.point[name] for name in trials.settings}
        study.add_trial(optuna.create_trial(params=point, distributions=kinds, value=score))
    evaluators: dict[str, Any] = {"PED-ANOVA": optuna.importance.PedAnovaImportanceEvaluator()}
    with contextlib.suppress(ImportError):
        evaluators["fANOVA"] = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return {name: optuna.importance.get_param_importances(study, evaluator=e) for name, e in evaluators.items()}


def _distribution(values: Sequence[Any]) -> optuna.distributions.BaseDistribution:
    if all(isinstance(value, float) for value in values) and len(set(values)) > LEVELS:
        return optuna.distributions.FloatDistribution(min(values), max(values), log=min(values) > 0)
    return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))


# Ranks and pruning


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


def pruning(trials: Trials) -> dict[str, float]:
    """For each pruner the share of random orders in which it would have dropped the winner; {} with too few curves."""
    if len(trials.complete) < 4:
        return {}
    return {"asha": dropped(trials.complete, "asha"), "median": dropped(trials.complete, "median")}


def still_rising(trials: Trials, setting: str) -> list[tuple[str, float, int]]:
    """(value, points gained over the last third, epochs) of each value of ``setting`` that gained more than a point."""
    rising = []
    for value, curves in trials.by_level(setting):
        scores = [curve.scores for curve in curves if curve.state == "complete"]
        epochs = min(map(len, scores), default=0)
        if epochs >= 3:
            third = max(1, epochs // 3)
            gain = float(np.mean([max(own) - max(own[: len(own) - third]) for own in scores]))
            rising += [(value, gain, epochs)] if gain > 1 else []
    return rising


# In words


def winner_words(trials: Trials, words: Words) -> list[str]:
    """Sentences on what won, and how much of that is chance."""
    best = trials.best
    at = words["comma"].join(f"{name} {space.value_text(value)}" for name, value in best.point.items())
    values = {"trials": len(trials.curves), "best": best.best, "at": at, "n": trials.finalists}
    sentences = [sentence(words, "story_finalists" if trials.finalists else "story_best", **values)]
    if trials.untried:
        sentences.append(sentence(words, "story_untried", n=trials.untried))
    if trials.probe is not None:
        key = "story_probe_best" if trials.is_probe_best else "story_probe"
        sentences.append(sentence(words, key, probe=trials.probe))
    if equal := sum(curve.best == best.best for curve in trials.curves) - 1:
        sentences.append(sentence(words, "story_equal", n=equal))
    if trials.images:
        error = 100 * math.sqrt(best.best / 100 * (1 - best.best / 100) / trials.images)
        near = sum(curve.best >= best.best - error for curve in trials.curves) - 1
        sentences.append(sentence(words, "story_error", images=f"{trials.images:,}", error=error))
        sentences.append(sentence(words, "story_near" if near else "story_alone", n=near))
        if near and not trials.finalists:
            sentences.append(words["story_again"])
    return sentences


def search_story(
    trials: Trials, variance: Variance, change: RankChange | None, drops: dict[str, float], words: Words
) -> list[str]:
    """Sentences on what the settings do, every number of them computed."""
    sentences = [*_trial_words(trials, words), *_variance_words(trials, variance, words)]
    if change and change.correlation is not None:
        sentences.append(
            sentence(
                words, "story_ranks", early=change.early, correlation=change.correlation, top=change.top,
                kept=change.kept, winner=change.winner_then,
            )
        )  # fmt: skip
    if drops:
        parts = [sentence(words, "story_part", pruner=name, share=100 * share) for name, share in drops.items()]
        sentences.append(sentence(words, "story_pruning", orders=ORDERS, parts=words["comma"].join(parts)))
    return sentences


def _trial_words(trials: Trials, words: Words) -> list[str]:
    """Which trials ended early or failed."""
    sentences = []
    if stopped := len(trials.curves) - len(trials.complete):
        key = "story_shorter" if trials.rungs else "story_stopped"
        sentences.append(sentence(words, key, n=stopped, epochs=trials.common, epoch=trials.common))
    if trials.failed:
        sentences.append(sentence(words, "story_failed", n=trials.failed))
    return sentences


def _variance_words(trials: Trials, variance: Variance, words: Words) -> list[str]:
    """Which settings explain the accuracy."""
    sentences = []
    ranked = sorted(variance.main.items(), key=lambda item: -item[1])
    for name, share in ranked[:1]:
        means = [(value, float(np.mean([*map(trials.score, own)]))) for value, own in trials.by_level(name)]
        best, worst = max(means, key=lambda item: item[1]), min(reversed(means), key=lambda item: item[1])
        values = {"best": level_text(best[0], words), "worst": level_text(worst[0], words)}
        sentences.append(
            sentence(words, "story_share", name=name, share=100 * share, high=best[1], low=worst[1], **values)
        )
        if others := [f"{other} {100 * part:.0f}%" for other, part in ranked[1:4] if part >= 0.01]:
            sentences.append(sentence(words, "story_then", others=words["comma"].join(others)))
        elif ranked[1:]:
            sentences.append(words["story_then_none"])
        sentences += [
            sentence(words, "story_rising", name=name, value=level_text(value, words), n=epochs, gain=gain)
            for value, gain, epochs in still_rising(trials, name)[:2]
        ]
    if variance.pairs and max(variance.pairs.values()) >= 0.02:
        (a, b), share = max(variance.pairs.items(), key=lambda item: item[1])
        sentences.append(sentence(words, "story_pair", a=a, b=b, share=100 * share))
    return sentences


def level_text(level: str, words: Words) -> str:
    """The value of a setting, or the bin of its values, as a page in the language of ``words`` shows it."""
    return level.replace(" to ", words["to"])
