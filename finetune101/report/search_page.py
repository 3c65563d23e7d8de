"""The report of a search: what stands on its page, and its pictures; reads run directories only."""

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
from finetune101.experiments.space import text
from finetune101.report import effects
from finetune101.report.effects import EARLY, Seen, Variance, levels
from finetune101.report.figures import BLUE, GREY, VERMILION, save, style
from finetune101.report.page import Name, Page, number
from finetune101.report.page import text as shown

ACCURACY = "validation accuracy (%)"
UNITS = {"lr": "lr (learning rate)", "batch_size": "batch_size (images)", "step_size": "step_size (epochs)"}
UNITS |= {"size": "size (pixels)", "epochs": "epochs", "warmup_epochs": "warmup_epochs (epochs)"}


def report(folder: Path, pairs: Sequence[tuple[str, ...]] = (), out: Path | None = None, lang: str = "en") -> Path:
    """Writes the page of the search in ``folder`` to ``out`` (default: report/ in it); ``pairs`` are its heat maps.

    Raises Refused when ``folder`` is no search, or a pair is not two of its settings.
    """
    seen = effects.load(folder)
    found, importance = effects.variance(seen), effects.importance(seen)
    chosen, change = _pairs(seen, found, pairs), effects.rank_change(seen.complete)
    page = Page(out or folder / "report", lang)
    page.title = page.say("search", name=seen.name)
    if lang == "en":  # the whole story is told in English only
        page.headline = effects.words(seen, found, change, effects.pruning(seen))
    else:
        at = ", ".join(f"{name} {text(value)}" for name, value in seen.best.point.items())
        page.headline = page.say("search_headline", trials=len(seen.curves), best=seen.best.best, at=at)
    _best_trials(page, seen)

    def add(key: str, stem: str, draw: Callable[..., Figure], *arguments: Any, **content: Any) -> None:
        def drawn(file: Path) -> Path:
            with style():
                return save(draw(*arguments), file)

        page.picture(f"search_{key}", drawn, page.words[f"search_{key}"], stem=stem, **content)

    upto = page.say("search_upto", epoch=seen.common) if seen.common else ""
    first = max(found.main, key=lambda name: found.main[name], default=None)
    add("curves", "curves", draw_curves, seen, first)
    if seen.names:
        add("effects", "effects", draw_effects, seen, found, upto=upto)
        add("variance", "variance", draw_shares, found, importance)
    for a, b in chosen:
        add("heat", f"heat_{a}_{b}", draw_heat, seen, a, b, name=f"{a} × {b}", upto=upto)
    if change:
        add("ranks", "ranks", draw_ranks, seen, trials=change.trials, early=EARLY)
    return page.write()


def _best_trials(page: Page, seen: Seen) -> None:
    heads = (
        "search_rank",
        "search_accuracy",
        *map(Name, seen.best.point),
        "search_epochs",
        "search_steps",
        "search_end",
    )
    rows = [
        [
            number(rank, "d"),
            number(curve.best),
            *(shown(text(value)) for value in curve.point.values()),
            number(len(curve.scores), "d"),
            number(curve.steps[-1], "d"),
            shown(curve.state),
        ]
        for rank, curve in enumerate(sorted(seen.curves, key=lambda curve: -curve.best)[:15], 1)
    ]
    page.table("search_trials", heads, rows)


def _pairs(seen: Seen, found: Variance, asked: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    for pair in asked:
        if len(pair) != 2 or not set(pair) <= set(seen.names) or pair[0] == pair[1]:
            raise Refused(f"--pair {','.join(pair)} cannot be drawn; give two of {', '.join(seen.names) or 'none'}")
    if asked:
        return [(a, b) for a, b in asked]
    pairs = [("lr", "batch_size")] if {"lr", "batch_size"} <= set(seen.names) else []
    if found.pairs:
        most = max(found.pairs, key=lambda pair: found.pairs[pair])
        pairs += [most] if set(most) != {"lr", "batch_size"} else []
    return pairs


def _colours(count: int) -> list[Any]:
    """``count`` colours in order from cividis, which colour-blind people read like all others; no pale yellow."""
    return [matplotlib.colormaps["cividis"](0.85 * k / max(1, count - 1)) for k in range(count)]


def draw_curves(seen: Seen, name: str | None) -> Figure:
    """Best accuracy so far against training steps, a line per trial."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    values, which = levels(seen, name) if name else (["all"], [0] * len(seen.curves))
    colours, dashes = _colours(len(values)), list[Any](["-", "--", "-.", ":"])
    for curve, k in zip(seen.curves, which, strict=True):
        best = curve is seen.best
        line: dict[str, Any] = {"color": VERMILION, "linewidth": 3, "zorder": 5} if best else {"color": colours[k]}
        style_ = "-" if best else dashes[k % 4]
        line |= {"marker": "o", "markersize": 3} if len(curve.steps) <= 12 else {}
        axes.plot(curve.steps, np.maximum.accumulate(curve.scores), style_, **{"linewidth": 1.2, "alpha": 0.9, **line})
        if curve.state == "pruned":
            axes.plot(curve.steps[-1], curve.best, "x", color=colours[k], markersize=7)
    handles = [Line2D([], [], color=colours[k], linestyle=dashes[k % 4]) for k in range(len(values))]
    words = [f"{name} {value}" for value in values] if name else ["trial"]
    handles.append(Line2D([], [], color=VERMILION, linewidth=3))
    axes.legend(
        handles,
        [*words, "winner"],
        loc="lower right",
    )
    axes.set(xlabel="training steps (batches)", ylabel=f"best {ACCURACY} so far")
    axes.set_xlim(left=0)
    return figure


def draw_effects(seen: Seen, found: Variance) -> Figure:
    """A panel per setting: mean accuracy of each value with its interval."""
    columns = min(3, len(seen.names))
    rows = math.ceil(len(seen.names) / columns)
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, name in zip(panels, seen.names, strict=False):
        effect = found.effects[name]
        at = range(len(effect))
        axes.plot(at, [level.mean for level in effect], color=BLUE, marker="o", linewidth=1)
        for x, level in zip(at, effect, strict=True):
            if level.low is not None and level.high is not None:
                axes.plot([x, x], [level.low, level.high], color=BLUE, linewidth=2.5, alpha=0.6)
        many = max(len(level.value) for level in effect) * len(effect) > 28
        values = [e.value.replace(" to ", " to\n") if many else e.value for e in effect]
        axes.set_xticks(list(at), [f"{v}\n({e.trials})" for v, e in zip(values, effect, strict=True)], fontsize=9)
        axes.set(xlabel=UNITS.get(name, name), title=f"{100 * found.main[name]:.0f} % of variance")
        axes.margins(x=0.2)
    for axes in panels[len(seen.names) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(ACCURACY)
    return figure


def draw_shares(found: Variance, importance: dict[str, dict[str, float]]) -> Figure:
    """Bars: shares of variance on the left, Optuna's importance on the right."""
    shares = {**found.main, **{f"{a} × {b}": share for (a, b), share in found.pairs.items()}}
    strongest = sorted(shares.items(), key=lambda item: -item[1])[:9]
    bars = [*strongest, ("the rest", max(0.0, 1 - sum(share for _, share in strongest)))][::-1]
    figure = Figure(figsize=(10, 0.8 + 0.42 * max(len(bars), 6)), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = [GREY if name == "the rest" else VERMILION if "×" in name else BLUE for name, _ in bars]
    left.barh([name for name, _ in bars], [100 * share for _, share in bars], color=colours, height=0.6)
    for y, (_, share) in enumerate(bars):
        left.text(100 * share + 1, y, f"{100 * share:.0f}", va="center", fontsize=9)
    left.set(xlabel="share of variance (%)", xlim=(0, 112), title="Analysis of variance")
    left.grid(axis="y", visible=False)
    names = list(found.main)[::-1]
    for k, (title, colour) in enumerate((("PED-ANOVA", BLUE), ("fANOVA", VERMILION))):
        if title in importance:
            values = [importance[title].get(name, 0) for name in names]
            right.barh(np.arange(len(names)) + 0.2 - 0.4 * k, values, height=0.36, color=colour, label=title)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="importance (share of 1)", xlim=(0, 1), title="Optuna's importance")
    right.grid(axis="y", visible=False)
    if importance:
        right.legend(loc="lower right")
    return figure


def draw_heat(seen: Seen, a: str, b: str) -> Figure:
    """Mean best accuracy for each pair of values of ``a`` (upwards) and ``b`` (to the right)."""
    rows, row = levels(seen, a)
    columns, column = levels(seen, b)
    cells: dict[tuple[int, int], list[float]] = {}
    for curve, y, x in zip(seen.curves, row, column, strict=True):
        cells.setdefault((y, x), []).append(seen.score(curve))
    grid = np.full((len(rows), len(columns)), np.nan)
    for cell, scores in cells.items():
        grid[cell] = np.mean(scores)
    figure = Figure(figsize=(2.6 + 1.5 * len(columns), 1.8 + 0.8 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (y, x), scores in cells.items():
        colour = "white" if grid[y, x] < middle else "black"
        axes.text(x, y, f"{grid[y, x]:.1f}\n({len(scores)})", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), [column.replace(" to ", " to\n") for column in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=UNITS.get(b, b), ylabel=UNITS.get(a, a))
    axes.grid(visible=False)
    figure.colorbar(image, label="mean best accuracy (%)")
    return figure


def draw_ranks(seen: Seen) -> Figure:
    """A line per trial from its rank at the early epoch to its last."""
    long = [curve for curve in seen.complete if len(curve.scores) > EARLY]
    then = np.argsort(np.argsort([-max(curve.scores[:EARLY]) for curve in long], kind="stable")) + 1
    last = np.argsort(np.argsort([-curve.best for curve in long], kind="stable")) + 1
    figure = Figure(figsize=(7, min(9.0, 2.5 + 0.16 * len(long))), layout="constrained")
    axes = figure.subplots()
    for a, b in zip(then, last, strict=True):
        colour, width = (VERMILION, 3.0) if b == 1 else (BLUE, 2.0) if b <= 5 else ("#B0B0B0", 1.0)
        axes.plot([0, 1], [a, b], color=colour, linewidth=width, marker="o", markersize=4, zorder=3 if b <= 5 else 1)
    axes.set_xticks([0, 1], [f"epoch {EARLY}", "last epoch"])
    axes.set(ylabel="rank (1 = best)", xlim=(-0.1, 1.1))
    axes.set_ylim(len(long) + 1, 0)
    axes.set_yticks([1, *range(5, len(long) + 1, 5)])
    axes.grid(axis="x", visible=False)
    handles = [Line2D([], [], color=c, linewidth=w) for c, w in ((VERMILION, 3), (BLUE, 2), ("#B0B0B0", 1))]
    figure.legend(handles, ["winner", "best five", "others"], loc="outside lower left", ncols=3)
    return figure
