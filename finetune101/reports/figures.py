"""Every picture of runs, drawn with the Figure API: no window, no global state.

The colours are from M. Okabe and K. Ito's palette for colour-blind readers; line style repeats what colour says.
``lang`` is the language of a picture's words; ``narrow`` makes it one for a phone, with its panels below each other.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from finetune101.errors import Refused
from finetune101.reports.drawing import (
    ARMS,
    BLUE,
    GREY,
    LINES,
    PHONE,
    VERMILION,
    draw_band,
    picture_words,
    plot_style,
    save_figure,
    short,
)
from finetune101.reports.page import Words

Records = Sequence[Mapping[str, Any]]

COUNTED = 15  # classes of a matrix with room for numbers
CONFUSION = LinearSegmentedColormap.from_list("white to blue", ["#FFFFFF", "#9CC9E6", BLUE, "#00263B"])


def draw_curves(metrics: Records, out: Path, title: str, lang: str = "en", narrow: bool = False) -> Path:
    """Draws loss and accuracy of training and validation per epoch, with the kept epoch marked, as a PNG at ``out``.

    ``metrics`` are the records of metrics.jsonl; validation may be null. Raises Refused when there are none.
    """
    if not metrics:
        raise Refused(f"{title} has no finished epoch to draw; train it for at least one")
    words = picture_words(lang)
    # the epoch whose weights were kept is the last that was the best so far
    best = next((record for record in reversed(metrics) if record["best"]), None)
    kept, kept_colour = ("val", BLUE) if any(r["val_top1"] is not None for r in metrics) else ("train", VERMILION)
    with plot_style():
        figure = Figure(figsize=(PHONE, 7.4) if narrow else (10, 4.5), layout="constrained")
        figure.suptitle(short(title, 44 if narrow else 90), x=0.01, ha="left", fontweight="bold", fontsize=12)
        loss, accuracy = figure.subplots(*((2, 1) if narrow else (1, 2)))
        for axes, key in ((loss, "loss"), (accuracy, "top1")):
            _training(axes, metrics, key, words)
            if best is not None:
                axes.axvline(best["epoch"], color=GREY, linewidth=1, linestyle=":", zorder=1)
                star = {"color": kept_colour, "markersize": 15, "markeredgecolor": "white"}
                axes.plot(best["epoch"], best[f"{kept}_{key}"], "*", **star)
        loss.set(title=words["fig_loss"], ylabel=words["fig_cross"])
        accuracy.set(title=words["fig_accuracy"], ylabel=words["fig_percent"])
        if best is not None:
            label = words["fig_best"].format(epoch=best["epoch"], top1=best["val_top1"]) if kept == "val" else ""
            accuracy.plot([], [], "*", color=GREY, markersize=12, label=label or words["fig_kept"])
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower left", ncols=1 if narrow else 3)
        return save_figure(figure, out, narrow=narrow)


def _training(axes: Axes, metrics: Records, key: str, words: Words) -> None:
    """The "loss" or "top1" of training and validation images, epoch by epoch, from 0 on or up to 101."""
    lines = (("train", VERMILION, "--"), ("val", BLUE, "-"))
    for subset, colour, line in lines:
        points = [(r["epoch"], r[f"{subset}_{key}"]) for r in metrics if r[f"{subset}_{key}"] is not None]
        if points:
            look: dict[str, Any] = {"color": colour, "marker": "o" if len(points) <= 12 else "", "markersize": 4}
            axes.plot(*zip(*points, strict=True), line, label=words[f"fig_{subset}"], **look)
    axes.set(xlabel=words["fig_epoch"])
    axes.set_xlim(metrics[0]["epoch"] - 0.5, metrics[-1]["epoch"] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    if key == "loss":
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(top=min(101, axes.get_ylim()[1]))


def draw_losses(arms: Mapping[str, Records], out: Path, lang: str = "en", narrow: bool = False) -> Path:
    """Draws loss and accuracy of training and validation per epoch as a PNG, a column for each of ``arms`` by name.

    Losses share one scale, and so do accuracies.
    """
    words, columns = picture_words(lang), 1 if narrow else len(arms)
    with plot_style():
        size = (PHONE, 0.5 + 5.2 * len(arms)) if narrow else (max(6.5, min(12.5, 5 * columns)), 4.8)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(2 * len(arms) // columns, columns, squeeze=False)
        pairs = panels.reshape(len(arms), 2).tolist() if narrow else panels.T.tolist()
        for (name, metrics), (loss, accuracy) in zip(arms.items(), pairs, strict=True):
            for axes, key in ((loss, "loss"), (accuracy, "top1")):
                _training(axes, metrics, key, words)
            arm = short(name, 28)
            loss.set(title=words["fig_arm_loss"].format(arm=arm), ylabel=words["fig_cross"])
            accuracy.set(title=words["fig_arm_accuracy"].format(arm=arm), ylabel=words["fig_percent"])
        top = max(loss.get_ylim()[1] for loss, _ in pairs)
        for loss, accuracy in pairs:
            loss.set_ylim(0, top)
            accuracy.set_ylim(0, 101)
        handles = {
            label: line for _, axes in pairs for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend([*handles.values()], [*handles], loc="outside lower left", ncols=2)
        return save_figure(figure, out, narrow=narrow)


def draw_range_test(
    rates: Sequence[float], losses: Sequence[float], suggestion: float, lowest: float, out: Path
) -> Path:
    """Draws the smoothed training loss against the learning rate of the output layer, as a PNG at ``out``."""
    with plot_style():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(rates, losses, color=BLUE)
        for rate, colour, line, words in (
            (suggestion, VERMILION, "--", f"suggested: {suggestion:.2g}"),
            (lowest, GREY, ":", f"lowest loss: {lowest:.2g}"),
        ):
            axes.axvline(rate, color=colour, linestyle=line, label=words)
        axes.set_ylim(top=min(max(losses), 1.3 * losses[0]))
        axes.set(
            xscale="log",
            xlim=(rates[0], rates[-1]),
            title="Learning-rate range test",
            xlabel="learning rate of the output layer",
        )
        axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        axes.set_ylabel("training loss, smoothed")
        axes.legend()
        return save_figure(figure, out)


def draw_comparison(
    arms: Sequence[Mapping[str, Any]], out: Path, over: str = "images", lang: str = "en", narrow: bool = False
) -> Path:
    """Draws validation accuracy against steps and against time, and test accuracy, of two or more arms as a PNG.

    An arm holds ``name``, ``curve`` (points with step, seconds or None, mean, sd), ``top1``, ``interval`` and ``runs``
    (test accuracies of its runs), in percent; ``over`` is what the intervals are over: images, or splits.
    """
    words = picture_words(lang)
    with plot_style():
        trained = any(arm["curve"] for arm in arms)  # else no validation images: only the test is shown
        tall = 1.3 + 0.75 * len(arms)
        if not trained:
            figure = Figure(figsize=(PHONE, tall) if narrow else (6.5, 4.7), layout="constrained")
            _tests(figure.subplots(), arms, over, words)
            return save_figure(figure, out, narrow=narrow)
        figure = Figure(figsize=(PHONE, 7 + tall) if narrow else (12.5, 4.7), layout="constrained")
        if narrow:  # the result first: it is what a phone shows at once
            test, by_step, by_time = figure.subplots(3, 1, height_ratios=(tall, 3.3, 3.3))
        else:
            by_step, by_time, test = figure.subplots(1, 3, width_ratios=(1, 1, 0.72))
        _progress(by_step, by_time, arms, words)
        _tests(test, arms, over, words)
        columns = 1 if narrow else len(arms)
        figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower left", ncols=columns)
        return save_figure(figure, out, narrow=narrow)


def _progress(by_step: Axes, by_time: Axes, arms: Sequence[Mapping[str, Any]], words: Words) -> None:
    """Validation accuracy of each arm against steps and against time."""
    hours = max((point["seconds"] or 0 for arm in arms for point in arm["curve"]), default=0) >= 2 * 3600
    unit, seconds = ("fig_hours", 3600) if hours else ("fig_minutes", 60)
    for arm, colour, style in zip(arms, ARMS, LINES, strict=False):
        for axes, key, scale in ((by_step, "step", 1), (by_time, "seconds", seconds)):
            points = [point for point in arm["curve"] if point[key] is not None]  # no time where a cache spared it
            x = [point[key] / scale for point in points]
            mean, sd = ([point[k] for point in points] for k in ("mean", "sd"))
            look = {"color": colour, "linestyle": style, "marker": "o" if len(x) <= 12 else "", "markersize": 4}
            axes.plot(x, mean, label=short(arm["name"], 60), **look)
            draw_band(axes, x, mean, sd, colour)
    by_step.set(title=words["fig_by_step"], xlabel=words["fig_steps"])
    by_time.set(title=words["fig_by_time"], xlabel=words[unit])
    by_step.set_ylabel(words["fig_val_percent"])
    by_step.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    for axes in (by_step, by_time):
        axes.set_ylim(0, 101)
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])


def _tests(axes: Axes, arms: Sequence[Mapping[str, Any]], over: str, words: Words) -> None:
    """One bar per arm from 0 to its test accuracy, with its interval; name and numbers are written above it."""
    axes.set_title(words["fig_test"].format(over=words[f"over_{over}"]))
    for y, arm, colour in zip(range(len(arms) - 1, -1, -1), arms, ARMS, strict=False):
        top1, (low, high) = arm["top1"], arm["interval"]
        axes.barh(y, top1, height=0.3, color=colour)
        axes.errorbar(
            top1, y, xerr=[[max(0, top1 - low)], [max(0, high - top1)]], color="black", capsize=6, linewidth=1.5
        )
        if len(arm["runs"]) > 1:
            axes.plot(arm["runs"], [y] * len(arm["runs"]), "o", color="white", markeredgecolor="black", markersize=5)
        axes.text(1, y + 0.35, short(arm["name"], 28), color=colour, fontweight="bold")
        runs = words["fig_runs"].format(n=len(arm["runs"])) if len(arm["runs"]) > 1 else ""
        axes.text(1, y + 0.2, words["fig_bar"].format(top1=top1, low=low, high=high) + runs)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 101), ylim=(-0.35, len(arms) - 0.4), yticks=[], xlabel=words["fig_test_percent"])


def draw_gains(
    rows: Sequence[Mapping[str, Any]], names: tuple[str, str], out: Path, lang: str = "en", narrow: bool = False
) -> Path:
    """Draws the accuracy of both arms in the classes that gain most and least, sorted by gain, as a PNG at ``out``.

    ``rows`` hold ``name``, ``n``, ``a`` and ``b`` (percent), the greatest gain first.
    """
    words = picture_words(lang)
    pause = {"name": "…", "n": 0, "a": None, "b": None}  # stands for the classes between
    drawn = [*rows[:14], pause, *rows[-10:]] if len(rows) > 24 else rows
    with plot_style():
        height = 1.6 + 0.27 * len(drawn)
        figure = Figure(figsize=(PHONE, height + 0.3) if narrow else (8.5, height), layout="constrained")
        axes = figure.subplots()
        classes = [(y, row) for y, row in enumerate(reversed(drawn)) if row is not pause]
        y, a, b = [y for y, _ in classes], [row["a"] for _, row in classes], [row["b"] for _, row in classes]
        axes.hlines(y, b, a, color="#B5B5B5", linewidth=3, zorder=1)
        (second,) = axes.plot(b, y, "s", color=VERMILION, markersize=9, label=short(names[1], 40))
        (first,) = axes.plot(a, y, "o", color=BLUE, markersize=6.5, label=short(names[0], 40))
        long = 18 if narrow else 30
        labels = ["…" if row is pause else f"{short(row['name'], long)} ({row['n']})" for row in reversed(drawn)]
        if drawn is not rows:
            look: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY, "fontsize": 9}
            axes.text(50, labels.index("…"), words["fig_between"].format(n=len(rows) - 24), **look)
        axes.set_yticks(range(len(drawn)), labels)
        axes.set(xlim=(-3, 103), ylim=(-0.7, len(drawn) - 0.3), xlabel=words["fig_class_percent"])
        title = words["fig_gains"]
        if narrow:
            figure.suptitle(textwrap.fill(title, 42 if title.isascii() else 24), x=0.01, ha="left", fontsize=11.5)
        else:
            axes.set_title(title)
        figure.legend(handles=[first, second], loc="outside lower left", ncols=1 if narrow else 2)
        return save_figure(figure, out, narrow=narrow)


def draw_confusion(names: Sequence[str], counts: Any, blocks: Sequence[int], out: Path, lang: str = "en") -> Path:
    """Draws a matrix of ``counts`` [true, predicted] in the order given, as a PNG at ``out``.

    ``blocks`` are the lengths of the groups of classes that are taken for each other: each gets a frame. Colour is
    the share of the true class's images; a small matrix also says how many.
    """
    words = picture_words(lang)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    counted = len(names) <= COUNTED
    cell = max(0.3, 0.12 + 0.09 * len(str(np.max(counts)))) if counted else 0.19 if len(names) <= 40 else 0.135
    side = cell * len(names)  # inches
    with plot_style():
        figure = Figure(figsize=(side, side))
        axes = figure.add_axes(
            (0, 0, 1, 1)
        )  # names and scale stand outside: the picture is saved as large as all of it
        image = axes.imshow(100 * share, cmap=CONFUSION, norm=PowerNorm(0.5, 0, 100), interpolation="none")
        size = 10.0 if counted else 9.0 if len(names) <= 40 else 7.5
        labels = [short(name, 24) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), labels, fontsize=size)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for start, length in zip(np.cumsum([0, *blocks]), blocks, strict=False):
            if length > 1:
                box = (start - 0.5, start - 0.5)
                axes.add_patch(Rectangle(box, length, length, fill=False, edgecolor=VERMILION, linewidth=1.5))
        if counted:
            for (row, column), count in np.ndenumerate(counts):
                colour = "white" if share[row, column] > 0.4 else "black"
                axes.text(column, row, str(count or ""), ha="center", va="center", color=colour)
        axes.set(xlabel=words["fig_prediction"], ylabel=words["fig_true"])
        width = max(3.4, 0.4 * side) / side  # the least has room for the scale's own numbers
        scale = axes.inset_axes((max(0.5 - width / 2, 0), 1 + 0.18 / side, width, 0.09 / side))
        bar = figure.colorbar(image, cax=scale, orientation="horizontal", ticks=[0, 1, 5, 20, 50, 100])
        bar.ax.xaxis.set(ticks_position="top", label_position="top")
        bar.set_label(words["fig_share"])
        return save_figure(figure, out, whole=True)


def draw_reliability(
    lines: Mapping[str, Sequence[Mapping[str, Any]]], out: Path, lang: str = "en", narrow: bool = False
) -> Path:
    """Draws accuracy against confidence for each of ``lines`` (label -> bins), and how many images, as a PNG."""
    words = picture_words(lang)
    with plot_style():
        figure = Figure(figsize=(PHONE, 5.2) if narrow else (7.5, 5.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 100], [0, 100], color=GREY, linestyle=":", linewidth=1.5, label=words["fig_perfect"])
        for k, (label, bins) in enumerate(lines.items()):
            points = [(one["confidence"], one["top1"]) for one in bins if one["confidence"] and one["top1"] is not None]
            look = {"color": ARMS[k], "linestyle": LINES[k], "marker": "os"[k], "markersize": 5}
            upper.plot([x for x, _ in points], [y for _, y in points], label=label, **look)
            width = 100 / max(1, len(bins))
            x = [width * (i + 0.3 + 0.4 * k) for i in range(len(bins))]
            lower.bar(x, [one["n"] for one in bins], width=0.38 * width, color=ARMS[k])
        upper.set(ylim=(0, 102), ylabel=words["fig_percent"], title=words["fig_over"])
        figure.legend(loc="outside lower left")
        lower.set(xlim=(0, 101), xlabel=words["fig_confidence"], ylabel=words["fig_images"])
        lower.set_yscale("symlog", linthresh=10)
        most = max((one["n"] for bins in lines.values() for one in bins), default=0)
        ticks = [0, *(10**k for k in range(1, len(str(most))))]
        lower.set_yticks(ticks, [str(tick) for tick in ticks])  # the scale's own labels would need math text
        lower.yaxis.set_minor_locator(NullLocator())
        return save_figure(figure, out, narrow=narrow)


def draw_efficiency(
    arms: Mapping[str, Sequence[Mapping[str, Any]]], out: Path, title: str, lang: str = "en", narrow: bool = False
) -> Path:
    """Draws test accuracy against training images per class, one line per arm with its standard deviation, as a PNG.

    ``arms`` are lists of ``size``, ``top1``, ``top1_sd`` and ``n``, smallest size first.
    """
    words = picture_words(lang)
    with plot_style():
        figure = Figure(figsize=(PHONE, 4.8) if narrow else (8.5, 5.2), layout="constrained")
        axes = figure.subplots()
        for (name, cells), colour, line, marker in zip(arms.items(), ARMS, LINES, "os^", strict=False):
            x, mean = [c["size"] for c in cells], [c["top1"] for c in cells]
            runs = sorted({c["n"] for c in cells})
            counts = "–".join(str(n) for n in {runs[0]: 0, runs[-1]: 0})
            label = words["fig_runs_each_one" if counts == "1" else "fig_runs_each"].format(arm=name, runs=counts)
            axes.plot(x, mean, color=colour, linestyle=line, marker=marker, label=label)
            draw_band(axes, x, mean, [c["top1_sd"] or 0.0 for c in cells], colour)
        ends = sorted(
            (cells[-1]["top1"], cells[-1]["size"], colour) for cells, colour in zip(arms.values(), ARMS, strict=False)
        )
        y = -100.0
        for top1, size, colour in ends:
            y = max(top1, y + 4)  # labels keep clear of one another
            axes.annotate(f"{top1:.1f}%", (size, y), (8, 0), textcoords="offset points", color=colour, va="center")
        sizes = sorted({c["size"] for cells in arms.values() for c in cells})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlim=(sizes[0] * 0.9, sizes[-1] * 1.25), ylim=(0, 101), ylabel=words["fig_test_percent"])
        axes.set_xlabel(words["fig_size_short" if narrow else "fig_size"])
        axes.set_title(short(title, 44 if narrow else 90))
        figure.legend(loc="outside lower left", ncols=1 if narrow else 3)
        return save_figure(figure, out, narrow=narrow)
