"""The page of a search: its tables and pictures; reads run folders only.

Optuna draws with pyplot, which changes global state, a line per trial without the winner, and no cell means; so the
pictures are our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from finetune101.errors import Refused
from finetune101.experiments.space import value_text
from finetune101.experiments.trials import Trials, read_trials
from finetune101.reports import effects
from finetune101.reports.drawing import (
    BLUE,
    GREY,
    PHONE,
    VERMILION,
    font_remark,
    picture_words,
    plot_style,
    save_figure,
)
from finetune101.reports.effects import EARLY, Variance, level_text
from finetune101.reports.page import Name, Page, Words, number, words


def write_search_report(
    folder: Path, pairs: Sequence[tuple[str, ...]] = (), out: Path | None = None, lang: str = "en"
) -> Path:
    """Writes the page of the search in ``folder`` to ``out`` (default: report/ in it); ``pairs`` are its heat maps.

    Raises Refused when ``folder`` is no search, or a pair is not two of its settings.
    """
    trials = read_trials(folder)
    variance, importance = effects.analyse_variance(trials), effects.importance(trials)
    chosen, change = _pairs(trials, variance, pairs), effects.rank_change(trials.complete)
    page = Page(out or folder / "report", lang)
    page.title, page.remark = page.say("search", name=trials.name), font_remark(lang)
    page.headline = page.join(effects.winner_words(trials, page.words))
    if story := effects.search_story(trials, variance, change, effects.pruning(trials), page.words):
        page.add("list", "search_story", sentences=story)
    _best_trials(page, trials)

    def add(key: str, stem: str, draw: Callable[..., Figure], *arguments: Any, **content: Any) -> None:
        page.picture(f"search_{key}", _saved(lang, draw, *arguments), page.words[f"search_{key}"], stem=stem, **content)

    upto = page.say("search_upto", epoch=trials.common) if trials.common else ""
    add("curves", "curves", draw_trials, trials, variance.strongest)
    if trials.settings:
        add("effects", "effects", draw_effects, trials, variance, upto=upto)
        add("variance", "variance", draw_shares, variance, importance)
    for a, b in chosen:
        add("heat", f"heat_{a}_{b}", draw_heat, trials, a, b, name=f"{a} × {b}", upto=upto)
    if change:
        add("ranks", "ranks", draw_ranks, trials, trials=change.trials, early=EARLY)
    return page.write()


def add_search(page: Page, folder: Path, key: str) -> None:
    """Adds what the search in ``folder`` says, in sentences and one picture, to another page.

    Raises Refused when ``folder`` is no search.
    """
    trials = read_trials(folder)
    variance, change = effects.analyse_variance(trials), effects.rank_change(trials.complete)
    story = effects.search_story(trials, variance, change, {}, page.words)
    page.add("list", key, sentences=[*effects.winner_words(trials, page.words), *story], name_of_search=trials.name)
    if trials.settings:
        upto = page.say("search_upto", epoch=trials.common) if trials.common else ""
        draw = _saved(page.lang, draw_effects, trials, variance)
        page.picture(f"{key}_effects", draw, page.words["search_effects"], upto=upto)


def _saved(lang: str, draw: Callable[..., Figure], *arguments: Any) -> Callable[..., Path]:
    """What writes the picture of ``draw`` to a file, in the language ``lang``."""
    labels = picture_words(lang)

    def drawn(file: Path, narrow: bool = False) -> Path:
        with plot_style():
            return save_figure(draw(*arguments, words=labels, narrow=narrow), file, narrow=narrow)

    return drawn


def _best_trials(page: Page, trials: Trials) -> None:
    settings = map(Name, trials.best.point)
    heads = ("search_rank", "search_accuracy", *settings, "search_epochs", "search_steps", "search_end")
    rows = [
        [
            number(rank, "d"),
            number(curve.best),
            *(words(value_text(value)) for value in curve.point.values()),
            number(len(curve.scores), "d"),
            number(curve.steps[-1], "d"),
            words(page.words.get(f"state_{curve.state}", curve.state)),
        ]
        for rank, curve in enumerate(sorted(trials.curves, key=lambda curve: -curve.best)[:15], 1)
    ]
    page.table("search_trials", heads, rows)


def _pairs(trials: Trials, variance: Variance, asked: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    """The pairs of settings with a heat map: those ``asked`` for, else lr × batch_size and the strongest pair."""
    settings = trials.settings
    for pair in asked:
        if len(pair) != 2 or not set(pair) <= set(settings) or pair[0] == pair[1]:
            raise Refused(f"--pair {','.join(pair)} cannot be drawn; give two of {', '.join(settings) or 'none'}")
    if asked:
        return [(a, b) for a, b in asked]
    if len(settings) == 2:  # also where no cell has two trials, which tell an effect of both from chance
        return [(settings[0], settings[1])]
    pairs = [("lr", "batch_size")] if {"lr", "batch_size"} <= set(settings) else []
    if variance.pairs:
        strongest = max(variance.pairs, key=lambda pair: variance.pairs[pair])
        pairs += [strongest] if set(strongest) != {"lr", "batch_size"} else []
    return pairs


def _colours(count: int) -> list[Any]:
    """``count`` colours in order from cividis, which colour-blind people read like all others; no pale yellow."""
    return [matplotlib.colormaps["cividis"](0.85 * k / max(1, count - 1)) for k in range(count)]


def _unit(setting: str, words: Words) -> str:
    """A setting with its unit."""
    return words.get(f"unit_{setting}", setting)


def draw_trials(trials: Trials, setting: str | None, words: Words, narrow: bool = False) -> Figure:
    """Best accuracy so far against training steps, a line per trial, coloured by its value of ``setting``."""
    figure = Figure(figsize=(PHONE, 4.6) if narrow else (10, 5), layout="constrained")
    axes = figure.subplots()
    levels = trials.by_level(setting) if setting else [("", list(trials.curves))]
    for k, (colour, (value, curves)) in enumerate(zip(_colours(len(levels)), levels, strict=True)):
        look: dict[str, Any] = {"color": colour, "linestyle": ("-", "--", "-.", ":")[k % 4], "linewidth": 1.2}
        label = f"{setting} {level_text(value, words)}" if setting else words["fig_trial"]
        axes.plot([], [], label=label, **look | {"linewidth": 2})
        for curve in curves:
            best = {"color": VERMILION, "linestyle": "-", "linewidth": 3, "zorder": 5} if curve is trials.best else {}
            marker = "o" if len(curve.steps) <= 12 else ""
            scores = np.maximum.accumulate(curve.scores)
            axes.plot(curve.steps, scores, alpha=0.9, marker=marker, markersize=3, **look | best)
            if curve.state == "pruned":
                axes.plot(curve.steps[-1], curve.best, "x", color=colour, markersize=7)
    axes.plot([], [], color=VERMILION, linewidth=3, label=words["fig_winner"])
    if any(curve.state == "pruned" for curve in trials.curves):
        axes.plot([], [], "x", color=GREY, markersize=7, label=words["fig_stopped"])
    figure.legend(loc="outside lower left", ncols=2 if narrow else 6)  # in the axes it would lie on a curve
    axes.set(xlabel=words["fig_batches"], ylabel=words["fig_so_far"])
    axes.set_xlim(left=0)
    return figure


def draw_effects(trials: Trials, variance: Variance, words: Words, narrow: bool = False) -> Figure:
    """A panel per setting: mean accuracy of each value with its interval."""
    columns = 1 if narrow else min(3, len(trials.settings))
    rows = math.ceil(len(trials.settings) / columns)
    figure = Figure(figsize=(PHONE if narrow else 10, (3 if narrow else 3.2) * rows), layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, (name, effect) in zip(panels, variance.effects.items(), strict=False):
        axes.plot([level.mean for level in effect], color=BLUE, marker="o", linewidth=1)
        for x, level in enumerate(effect):
            if level.low is not None and level.high is not None:
                axes.plot([x, x], [level.low, level.high], color=BLUE, linewidth=2.5, alpha=0.6)
        many = max(len(level.value) for level in effect) * len(effect) > 28
        values = [_broken(level.value, words) if many else level_text(level.value, words) for level in effect]
        labels = [f"{value}\n({level.trials})" for value, level in zip(values, effect, strict=True)]
        axes.set_xticks(range(len(effect)), labels, fontsize=9)
        share = words["fig_of_variance"].format(share=100 * variance.main[name])
        axes.set(xlabel=_unit(name, words), title=share)
        axes.margins(x=0.2)
    for axes in panels[len(trials.settings) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(words["fig_val_percent"])
    return figure


def _broken(level: str, words: Words) -> str:
    """A bin in two lines."""
    return level.replace(" to ", f"{words['to'].rstrip()}\n")


def draw_shares(
    variance: Variance, importance: dict[str, dict[str, float]], words: Words, narrow: bool = False
) -> Figure:
    """Bars: shares of variance on the left, Optuna's importance on the right."""
    rest = words["fig_rest"]
    shares = {**variance.main, **{f"{a} × {b}": share for (a, b), share in variance.pairs.items()}}
    strongest = sorted(shares.items(), key=lambda item: -item[1])[:9]
    bars = [*strongest, (rest, max(0.0, 1 - sum(share for _, share in strongest)))][::-1]
    height = 0.8 + 0.42 * max(len(bars), 6)
    figure = Figure(figsize=(PHONE, 2 * height) if narrow else (10, height), layout="constrained")
    left, right = figure.subplots(*((2, 1) if narrow else (1, 2)))
    colours = [GREY if name == rest else VERMILION if "×" in name else BLUE for name, _ in bars]
    drawn = left.barh([name for name, _ in bars], [100 * share for _, share in bars], color=colours, height=0.6)
    left.bar_label(drawn, fmt="%.0f", padding=3, fontsize=9)
    left.set(xlabel=words["fig_shares"], xlim=(0, 112), title=words["fig_anova"])
    left.grid(axis="y", visible=False)
    names = list(variance.main)[::-1]
    for k, (title, colour) in enumerate((("PED-ANOVA", BLUE), ("fANOVA", VERMILION))):
        if title in importance:
            values = [importance[title].get(name, 0) for name in names]
            right.barh(np.arange(len(names)) + 0.2 - 0.4 * k, values, height=0.36, color=colour, label=title)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel=words["fig_importance_axis"], xlim=(0, 1), title=words["fig_importance"])
    right.grid(axis="y", visible=False)
    if importance:
        right.legend(loc="lower right")
    return figure


def draw_heat(trials: Trials, a: str, b: str, words: Words, narrow: bool = False) -> Figure:
    """Mean best accuracy for each pair of values of ``a`` (upwards) and ``b`` (to the right)."""
    (rows, row), (columns, column) = trials.levels(a), trials.levels(b)
    cells: dict[tuple[int, int], list[float]] = {}
    for curve, y, x in zip(trials.curves, row, column, strict=True):
        cells.setdefault((y, x), []).append(trials.score(curve))
    grid = np.full((len(rows), len(columns)), np.nan)
    for cell, scores in cells.items():
        grid[cell] = np.mean(scores)
    width = PHONE if narrow else 2.6 + 1.2 * len(columns)
    figure = Figure(figsize=(width, 1.8 + 0.65 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (y, x), scores in cells.items():
        colour = "white" if grid[y, x] < middle else "black"
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5 if narrow else 10.5}
        axes.text(x, y, f"{grid[y, x]:.1f}\n({len(scores)})", color=colour, **look)
    axes.set_xticks(range(len(columns)), [_broken(name, words) for name in columns])
    axes.set_yticks(range(len(rows)), [_broken(name, words) if narrow else level_text(name, words) for name in rows])
    axes.set(xlabel=_unit(b, words), ylabel=_unit(a, words))
    axes.grid(visible=False)
    bar = figure.colorbar(image, location="top" if narrow else "right")
    bar.set_label(words["fig_mean_best"])
    return figure


def draw_ranks(trials: Trials, words: Words, narrow: bool = False) -> Figure:
    """A line per trial from its rank at the early epoch to its last."""
    long = [curve for curve in trials.complete if len(curve.scores) > EARLY]
    then = np.argsort(np.argsort([-max(curve.scores[:EARLY]) for curve in long], kind="stable")) + 1
    last = np.argsort(np.argsort([-curve.best for curve in long], kind="stable")) + 1
    figure = Figure(figsize=(PHONE if narrow else 7, min(9.0, 2.5 + 0.16 * len(long))), layout="constrained")
    axes = figure.subplots()
    for a, b in zip(then, last, strict=True):
        colour, width = (VERMILION, 3.0) if b == 1 else (BLUE, 2.0) if b <= 5 else ("#B0B0B0", 1.0)
        axes.plot([0, 1], [a, b], color=colour, linewidth=width, marker="o", markersize=4, zorder=3 if b <= 5 else 1)
    axes.set_xticks([0, 1], [words["fig_at_epoch"].format(epoch=EARLY), words["fig_last"]])
    axes.set(ylabel=words["fig_rank"], xlim=(-0.1, 1.1))
    axes.set_ylim(len(long) + 1, 0)
    axes.set_yticks([1, *range(5, len(long) + 1, 5)])
    axes.grid(axis="x", visible=False)
    handles = [Line2D([], [], color=c, linewidth=w) for c, w in ((VERMILION, 3), (BLUE, 2), ("#B0B0B0", 1))]
    names = [words["fig_winner"], words["fig_five"], words["fig_others"]]
    figure.legend(handles, names, loc="outside lower left", ncols=3)
    return figure
