"""Effects, replays and words, on curves whose truth is known."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

from finetune101.experiments.replay import Curve, dropped, replay
from finetune101.experiments.trials import Trials
from finetune101.reports import effects
from finetune101.reports.page import read_words


def made(noise: float = 0.0, interaction: float = 0.0) -> Trials:
    """A grid of 12: lr makes 20 points, batch_size 4, and their pair ``interaction`` more; gamma none."""
    rng, curves = np.random.default_rng(0), []
    for lr, size, gamma in itertools.product([0.01, 0.001], [64, 128, 256], [0.1, 0.5]):
        score = 70 + 20 * (lr == 0.01) + 4 * (size == 64) + rng.normal(0, 1) * noise
        score += interaction * (lr == 0.01) * (size == 64)
        slow = 6 if lr == 0.001 else 1
        scores = tuple(float(score * (1 - math.exp(-epoch / slow))) for epoch in range(1, 7))
        steps = tuple(epoch * 1000 // size for epoch in range(1, 7))
        curves.append(Curve({"lr": lr, "batch_size": size, "gamma": gamma}, scores, steps, "complete"))
    return Trials("made", ("lr", "batch_size", "gamma"), tuple(curves), 0)


def story(
    trials: Trials, change: effects.RankChange | None = None, drops: dict[str, float] | None = None, lang: str = "en"
) -> str:
    """All sentences on a search."""
    words, variance = read_words(lang), effects.analyse_variance(trials)
    told = effects.search_story(trials, variance, change, drops or {}, words)
    return words["gap"].join([*effects.winner_words(trials, words), *told])


def test_shares_of_variance_add_up_and_find_what_was_put_in() -> None:
    variance = effects.analyse_variance(made(noise=0.1))
    assert variance.main["lr"] > 0.9 > variance.main["batch_size"] > variance.main["gamma"]
    assert sum(variance.main.values()) + sum(variance.pairs.values()) + variance.rest == pytest.approx(1, abs=0.02)


def test_an_interaction_is_found_in_its_pair() -> None:
    variance = effects.analyse_variance(made(interaction=15))
    assert max(variance.pairs, key=lambda pair: variance.pairs[pair]) == ("lr", "batch_size")
    assert variance.pairs["lr", "batch_size"] > 0.02


def test_means_of_a_balanced_grid_are_the_plain_means_within_their_intervals() -> None:
    trials = made(noise=0.5)
    for name, effect in effects.analyse_variance(trials).effects.items():
        values, which = trials.levels(name)
        for k, level in enumerate(effect):
            plain = np.mean([c.best for c, w in zip(trials.curves, which, strict=True) if w == k])
            assert level.mean == pytest.approx(plain)
            assert level.low is not None and level.high is not None and level.low < level.mean < level.high
            assert level.value == values[k] and level.trials == which.count(k)


def test_importance_names_what_matters() -> None:
    importance = effects.importance(made(noise=0.1))
    assert max(importance["PED-ANOVA"], key=importance["PED-ANOVA"].__getitem__) in ("lr", "batch_size")
    if "fANOVA" in importance:
        assert max(importance["fANOVA"], key=importance["fANOVA"].__getitem__) == "lr"


def test_rank_change() -> None:
    rising = [Curve({"lr": k}, (float(7 - k), 0.0, 0.0, 10.0 * k), (1, 2, 3, 4), "complete") for k in range(1, 7)]
    change = effects.rank_change(rising)
    assert change is not None and change.correlation == pytest.approx(-1)
    assert (change.winner_then, change.kept, change.top, change.trials) == (6, 0, 3, 6)
    assert effects.rank_change(rising[:5]) is None  # ranks of so few say nothing


def test_the_paragraph_is_made_of_the_numbers() -> None:
    trials = made(noise=0.1)
    variance = effects.analyse_variance(trials)
    text = story(trials, effects.rank_change(trials.curves), {"asha": 0.25})
    assert f"lr explains {100 * variance.main['lr']:.0f}% of the variance" in text
    assert "At lr 0.001, 6 epochs are too few" in text and "asha in 25% of them" in text
    assert f"{trials.best.best:.2f}%" in text


@pytest.mark.parametrize(("sampler", "pruner"), [("grid", "none"), ("random", "none"), ("tpe", "asha")])
def test_a_replay_sees_every_point_once(sampler: str, pruner: str) -> None:
    trials = made(noise=0.5)
    replayed = replay(trials.curves, sampler, pruner, seed=1)  # type: ignore[arg-type]
    whole = sum(curve.steps[-1] for curve in trials.curves)
    spent = [steps for steps, _ in replayed.epochs]
    assert spent == sorted(spent) and spent[-1] <= whole
    assert replayed == replay(trials.curves, sampler, pruner, seed=1)  # type: ignore[arg-type]
    if pruner == "none":
        assert spent[-1] == whole and replayed.steps_to(trials.best.best) is not None and not replayed.pruned
    assert replayed.steps_to(101) is None


def test_asha_costs_less_than_the_grid_and_may_drop_the_winner() -> None:
    trials = made(noise=0.5)
    assert replay(trials.curves, "grid", "asha", 0).epochs[-1][0] < sum(curve.steps[-1] for curve in trials.curves)
    late = [Curve({"lr": k}, (50.0 + k, 50.0 + k, 60.0 + k), (1, 2, 3), "complete") for k in range(1, 9)]
    late.append(Curve({"lr": 0}, (1.0, 1.0, 99.0), (1, 2, 3), "complete"))  # worst until its last epoch
    assert dropped(late, "asha", orders=20) > 0.8 and dropped(late[:-1], "asha", orders=20) == 0


def test_words_say_how_much_of_the_ranking_is_chance() -> None:
    trials = dataclasses.replace(made(), images=400)
    best = trials.best.best
    text = story(trials)
    error = 100 * math.sqrt(best / 100 * (1 - best / 100) / 400)
    assert f"On 400 validation images the standard error is {error:.1f} points." in text
    assert sum(curve.best > best - error for curve in trials.curves) == 2
    assert "One other trial lies within" in text and "--finalists" in text
    few = 100 * math.sqrt(best / 100 * (1 - best / 100) / 20)
    near = sum(curve.best > best - few for curve in trials.curves) - 1
    assert near > 1 and f"{near} other trials lie within" in story(dataclasses.replace(trials, images=20))
    assert "standard error" not in story(made())
    alone = dataclasses.replace(trials, curves=trials.curves[:1] + trials.curves[-3:])
    assert "No other trial lies within" in story(alone) and "--finalists" not in story(alone)


def test_pruned_trials_are_compared_with_the_others_at_the_epoch_that_all_reached() -> None:
    trials = made()
    cut = [dataclasses.replace(c, scores=c.scores[:2], steps=c.steps[:2], state="pruned") for c in trials.curves[6:8]]
    pruned = dataclasses.replace(trials, curves=(*trials.curves[:6], *cut, *trials.curves[8:]))
    assert (trials.common, pruned.common) == (None, 2)
    short = tuple(dataclasses.replace(curve, scores=curve.scores[:2]) for curve in trials.curves)
    early = dataclasses.replace(trials, curves=short)
    assert effects.analyse_variance(pruned) == effects.analyse_variance(early)
    assert "2 trials were stopped early; below, all are compared at epoch 2" in story(pruned)


def test_intervals_stay_within_what_an_accuracy_can_be() -> None:
    curves = tuple(
        Curve({"lr": lr, "gamma": g}, (s,), (1,), "complete")
        for lr, g, s in [(1, 1, 0.0), (1, 2, 100.0), (2, 1, 100.0), (2, 2, 100.0), (3, 1, 100.0)]
    )
    for levels in effects.analyse_variance(Trials("x", ("lr", "gamma"), curves, 0)).effects.values():
        for level in levels:
            assert level.low is not None and level.high is not None
            assert 0 <= level.low <= level.mean <= level.high <= 100


def test_chance_is_no_interaction() -> None:
    rng, interactions, main = np.random.default_rng(1), 0, []
    for _ in range(60):
        grid = itertools.product([0.1, 0.03, 0.01, 0.003], [32, 64, 128], [0.1, 1.0])
        curves = [Curve({"lr": a, "b": b, "r": r}, (70 + rng.normal(),), (1,), "complete") for a, b, r in grid]
        variance = effects.analyse_variance(Trials("x", ("lr", "b", "r"), tuple(curves), 0))
        interactions += bool(variance.pairs)
        main.append(max(variance.main.values()))
    assert interactions <= 8 and np.mean(main) < 0.15
    single = [Curve({"lr": a, "b": b}, (10.0 * a + b,), (1,), "complete") for a in (1, 2, 3, 4) for b in (1, 2)]
    assert effects.analyse_variance(Trials("x", ("lr", "b"), tuple(single), 0)).pairs == {}


@pytest.mark.parametrize("finalists", [0, 1, 3])
def test_a_search_is_told_as_fully_in_chinese(finalists: int) -> None:
    trials = dataclasses.replace(made(interaction=5), images=400, finalists=finalists, failed=1, probe=60.0)
    change, drops = effects.rank_change(trials.curves), {"asha": 0.25, "median": 0.5}
    english, chinese = (story(trials, change, drops, lang) for lang in ("en", "zh"))
    numbers = [sorted(re.findall(r"\d+\.\d+", text)) for text in (english, chinese)]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 8
    assert len(re.findall(r"[.:](?= |$)", english)) <= len(re.findall("[。：；]", chinese))
    names = {"lr", "batch_size", "gamma", "asha", "median", "pruning", "--finalists"}
    assert not set(re.findall(r"[a-zA-Z_-]{3,}", chinese)) - names
