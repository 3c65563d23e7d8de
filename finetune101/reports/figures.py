"""Pictures of runs, drawn with the Figure API: no window, no global state.

The colours are from M. Okabe and K. Ito's palette for colour-blind readers; line style repeats what colour says.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

from finetune101.errors import Refused, escaped
from finetune101.files import atomic

Records = Sequence[Mapping[str, Any]]

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
ARMS = (BLUE, VERMILION, GREEN, "#A0448A", "#7A5C00")  # one for each arm
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
COUNTED = 15  # classes of a matrix with room for numbers
CONFUSION = LinearSegmentedColormap.from_list("white to blue", ["#FFFFFF", "#9CC9E6", BLUE, "#00263B"])
# A style context rather than rcParams, so that a caller's own plots keep theirs; names may hold any character.
STYLE: Any = {
    "font.size": 10.5,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titlepad": 10,
    "grid.color": "#E3E3E3",
    "lines.linewidth": 2,
    "legend.frameon": False,
}


def draw_curves(metrics: Records, out: Path, title: str) -> Path:
    """Draws loss and accuracy of training and validation per epoch, with the kept epoch marked, as a PNG at ``out``.

    ``metrics`` are the records of metrics.jsonl; validation may be null. Raises Refused when there are none.
    """
    if not metrics:
        raise Refused(f"{title} has no finished epoch to draw; train it for at least one")
    # the epoch whose weights were kept is the last that was the best so far
    best = next((record for record in reversed(metrics) if record["best"]), None)
    kept, kept_colour = ("val", BLUE) if any(r["val_top1"] is not None for r in metrics) else ("train", VERMILION)
    lines = (("train", VERMILION, "--", "training images"), ("val", BLUE, "-", "validation images"))
    with plot_style():
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        figure.suptitle(_short(title, 90), x=0.01, ha="left", fontweight="bold", fontsize=12)
        loss, accuracy = figure.subplots(1, 2)
        for axes, key in ((loss, "loss"), (accuracy, "top1")):
            for subset, colour, line, label in lines:
                points = [(r["epoch"], r[f"{subset}_{key}"]) for r in metrics if r[f"{subset}_{key}"] is not None]
                if points:
                    marker = "o" if len(points) <= 12 else ""
                    axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=4, label=label)
            if best is not None:
                axes.axvline(best["epoch"], color=GREY, linewidth=1, linestyle=":", zorder=1)
                star = {"color": kept_colour, "markersize": 15, "markeredgecolor": "white"}
                axes.plot(best["epoch"], best[f"{kept}_{key}"], "*", **star)
            axes.set(xlabel="epoch (one pass over the training images)")
            axes.set_xlim(metrics[0]["epoch"] - 0.5, metrics[-1]["epoch"] + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
        loss.set(title="Loss (lower is better)", ylabel="cross-entropy")
        loss.set_ylim(bottom=0)
        accuracy.set(title="Accuracy (higher is better)", ylabel="right answers (%)")
        accuracy.set_ylim(top=min(101, accuracy.get_ylim()[1]))
        if best is not None:
            words = (
                f"best epoch: {best['epoch']}, validation accuracy {best['val_top1']:.1f} %" if kept == "val" else ""
            )
            accuracy.plot([], [], "*", color=GREY, markersize=12, label=words or "epoch kept")
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        return save_figure(figure, out)


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


def draw_comparison(arms: Sequence[Mapping[str, Any]], out: Path, over: str = "images") -> Path:
    """Draws validation accuracy against steps and against time, and test accuracy, of two or more arms as a PNG.

    An arm holds ``name``, ``curve`` (points with step, seconds or None, mean, sd), ``top1``, ``interval`` and ``runs``
    (test accuracies of its runs), in percent; ``over`` is what the intervals are over.
    """
    with plot_style():
        trained = any(arm["curve"] for arm in arms)  # else no validation images: only the test is shown
        figure = Figure(figsize=(12.5 if trained else 6.5, 4.7), layout="constrained")
        if not trained:
            _tests(figure.subplots(), arms, over)
            return save_figure(figure, out)
        by_step, by_time, test = figure.subplots(1, 3, width_ratios=(1, 1, 0.72))
        _progress(by_step, by_time, arms)
        _tests(test, arms, over)
        figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower left", ncols=len(arms))
        return save_figure(figure, out)


def _progress(by_step: Axes, by_time: Axes, arms: Sequence[Mapping[str, Any]]) -> None:
    """Validation accuracy of each arm against steps and against time."""
    hours = max((point["seconds"] or 0 for arm in arms for point in arm["curve"]), default=0) >= 2 * 3600
    unit, seconds = ("hours", 3600) if hours else ("minutes", 60)
    for arm, colour, style in zip(arms, ARMS, LINES, strict=False):
        for axes, key, scale in ((by_step, "step", 1), (by_time, "seconds", seconds)):
            points = [point for point in arm["curve"] if point[key] is not None]  # no time where a cache spared it
            x = [point[key] / scale for point in points]
            mean, sd = ([point[k] for point in points] for k in ("mean", "sd"))
            look = {"color": colour, "linestyle": style, "marker": "o" if len(x) <= 12 else "", "markersize": 4}
            axes.plot(x, mean, label=_short(arm["name"], 60), **look)
            _band(axes, x, mean, sd, colour)
    by_step.set(title="Accuracy against steps", xlabel="optimizer steps")
    by_time.set(title="Accuracy against time", xlabel=f"{unit} of training, on the machine that trained")
    by_step.set_ylabel("right answers on validation images (%)")
    by_step.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    for axes in (by_step, by_time):
        axes.set_ylim(0, 101)
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])


def _tests(axes: Axes, arms: Sequence[Mapping[str, Any]], over: str) -> None:
    """One bar per arm from 0 to its test accuracy, with its interval; name and numbers are written above it."""
    axes.set_title(f"Test accuracy, 95 % over {over}")
    for y, arm, colour in zip(range(len(arms) - 1, -1, -1), arms, ARMS, strict=False):
        top1, (low, high) = arm["top1"], arm["interval"]
        axes.barh(y, top1, height=0.3, color=colour)
        axes.errorbar(
            top1, y, xerr=[[max(0, top1 - low)], [max(0, high - top1)]], color="black", capsize=6, linewidth=1.5
        )
        if len(arm["runs"]) > 1:
            axes.plot(arm["runs"], [y] * len(arm["runs"]), "o", color="white", markeredgecolor="black", markersize=5)
        axes.text(0, y + 0.35, _short(arm["name"], 28), color=colour, fontweight="bold")
        runs = f", {len(arm['runs'])} runs" if len(arm["runs"]) > 1 else ""
        axes.text(0, y + 0.2, f"{top1:.1f} % ({low:.1f} to {high:.1f}){runs}")
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 101), ylim=(-0.35, len(arms) - 0.4), yticks=[], xlabel="right answers on test images (%)")


def draw_gains(rows: Sequence[Mapping[str, Any]], names: tuple[str, str], out: Path) -> Path:
    """Draws the accuracy of both arms in the classes that gain most and least, sorted by gain, as a PNG at ``out``.

    ``rows`` hold ``name``, ``n``, ``a`` and ``b`` (percent), the greatest gain first.
    """
    pause = {"name": "…", "n": 0, "a": None, "b": None}  # stands for the classes between
    drawn = [*rows[:14], pause, *rows[-10:]] if len(rows) > 24 else rows
    with plot_style():
        figure = Figure(figsize=(8.5, 1.6 + 0.27 * len(drawn)), layout="constrained")
        axes = figure.subplots()
        classes = [(y, row) for y, row in enumerate(reversed(drawn)) if row is not pause]
        y, a, b = [y for y, _ in classes], [row["a"] for _, row in classes], [row["b"] for _, row in classes]
        axes.hlines(y, b, a, color="#B5B5B5", linewidth=3, zorder=1)
        (second,) = axes.plot(b, y, "s", color=VERMILION, markersize=9, label=_short(names[1], 40))
        (first,) = axes.plot(a, y, "o", color=BLUE, markersize=6.5, label=_short(names[0], 40))
        labels = ["…" if row is pause else f"{_short(row['name'], 30)} ({row['n']})" for row in reversed(drawn)]
        if drawn is not rows:
            look: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY, "fontsize": 9}
            axes.text(50, labels.index("…"), f"{len(rows) - 24} classes between", **look)
        axes.set_yticks(range(len(drawn)), labels)
        axes.set(xlim=(-3, 103), ylim=(-0.7, len(drawn) - 0.3), xlabel="right answers on test images of the class (%)")
        axes.set_title("Classes that gain most (top) and least (bottom); number of test images in brackets")
        figure.legend(handles=[first, second], loc="outside lower left", ncols=2)
        return save_figure(figure, out)


def draw_confusion(names: Sequence[str], counts: Any, blocks: Sequence[int], out: Path) -> Path:
    """Draws a matrix of ``counts`` [true, predicted] in the order given, as a PNG at ``out``.

    ``blocks`` are the lengths of the groups of classes that are taken for each other: each gets a frame. Colour is
    the share of the true class's images; a small matrix also says how many.
    """
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
        short = [_short(name, 24) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), short, fontsize=size)
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
        axes.set(xlabel="prediction", ylabel="true class")
        width = max(3.4, 0.4 * side) / side  # the least has room for the scale's own numbers
        scale = axes.inset_axes((max(0.5 - width / 2, 0), 1 + 0.18 / side, width, 0.09 / side))
        bar = figure.colorbar(image, cax=scale, orientation="horizontal", ticks=[0, 1, 5, 20, 50, 100])
        bar.ax.xaxis.set(ticks_position="top", label_position="top")
        bar.set_label("images of the true class (%)")
        return save_figure(figure, out, whole=True)


def draw_reliability(lines: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> Path:
    """Draws accuracy against confidence for each of ``lines`` (label -> bins), and how many images, as a PNG."""
    with plot_style():
        figure = Figure(figsize=(7.5, 5.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 100], [0, 100], color=GREY, linestyle=":", linewidth=1.5, label="as sure as right")
        for k, (label, bins) in enumerate(lines.items()):
            points = [(one["confidence"], one["top1"]) for one in bins if one["confidence"] and one["top1"] is not None]
            look = {"color": ARMS[k], "linestyle": LINES[k], "marker": "os"[k], "markersize": 5}
            upper.plot([x for x, _ in points], [y for _, y in points], label=label, **look)
            width = 100 / max(1, len(bins))
            x = [width * (i + 0.3 + 0.4 * k) for i in range(len(bins))]
            lower.bar(x, [one["n"] for one in bins], width=0.38 * width, color=ARMS[k])
        upper.set(ylim=(0, 102), ylabel="right answers (%)")
        upper.set_title("Below the dotted line the network is surer than it is right")
        figure.legend(loc="outside lower left")
        lower.set(xlim=(0, 101), xlabel="confidence of the prediction (%)", ylabel="images")
        lower.set_yscale("symlog", linthresh=10)
        most = max((one["n"] for bins in lines.values() for one in bins), default=0)
        ticks = [0, *(10**k for k in range(1, len(str(most))))]
        lower.set_yticks(ticks, [str(tick) for tick in ticks])  # the scale's own labels would need math text
        lower.yaxis.set_minor_locator(NullLocator())
        return save_figure(figure, out)


def draw_efficiency(arms: Mapping[str, Sequence[Mapping[str, Any]]], out: Path, title: str) -> Path:
    """Draws test accuracy against training images per class, one line per arm with its standard deviation, as a PNG.

    ``arms`` are lists of ``size``, ``top1``, ``top1_sd`` and ``n``, smallest size first.
    """
    with plot_style():
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.subplots()
        for (name, cells), colour, line, marker in zip(arms.items(), ARMS, LINES, "os^", strict=False):
            x, mean = [c["size"] for c in cells], [c["top1"] for c in cells]
            runs = sorted({c["n"] for c in cells})
            label = f"{name} ({'–'.join(str(n) for n in {runs[0]: 0, runs[-1]: 0})} runs each)"
            axes.plot(x, mean, color=colour, linestyle=line, marker=marker, label=label)
            _band(axes, x, mean, [c["top1_sd"] or 0.0 for c in cells], colour)
        ends = sorted(
            (cells[-1]["top1"], cells[-1]["size"], colour) for cells, colour in zip(arms.values(), ARMS, strict=False)
        )
        y = -100.0
        for top1, size, colour in ends:
            y = max(top1, y + 4)  # labels keep clear of one another
            axes.annotate(f"{top1:.1f} %", (size, y), (8, 0), textcoords="offset points", color=colour, va="center")
        sizes = sorted({c["size"] for cells in arms.values() for c in cells})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlim=(sizes[0] * 0.9, sizes[-1] * 1.25), ylim=(0, 101), ylabel="right answers on test images (%)")
        axes.set_xlabel(
            "training images per class (the same test images and, to a whole epoch, the same steps everywhere)"
        )
        axes.set_title(_short(title, 90))
        figure.legend(loc="outside lower left", ncols=3)
        return save_figure(figure, out)


def _band(axes: Axes, x: Sequence[float], mean: Sequence[float], sd: Sequence[float], colour: str) -> None:
    """One standard deviation around a line."""
    if any(sd):
        low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _short(text: str, length: int) -> str:
    """At most ``length`` characters; the middle is left out, as names of runs often differ at the end."""
    half, text = length // 2, escaped(text)
    return text if len(text) <= length else f"{text[: half - 1]}…{text[-half:]}"


def plot_style() -> Any:
    """The style, with the fonts for Chinese names that this machine has behind matplotlib's own."""
    wanted = ("DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei")
    return matplotlib.rc_context({**STYLE, "font.family": [f for f in wanted if f in font_manager.get_font_names()]})


@contextlib.contextmanager
def _any_script() -> Iterator[None]:
    """A name in a script that no font here can draw shows as boxes, which is no reason to fail."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save_figure(figure: Figure, out: Path, whole: bool = False) -> Path:
    """Writes the picture completely or not at all; no library version in it, so that equal runs give equal files.

    ``whole`` makes the picture as large as all that is drawn. 256 colours make the file a third as large and no picture
    here different to the eye. Raises Refused where ``out`` cannot be written.
    """
    png = BytesIO()
    with _any_script(), atomic(out) as part:
        box: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.1} if whole else {}
        FigureCanvasAgg(figure).print_figure(png, format="png", dpi=100, **box)
        with Image.open(png) as image:
            small = image.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)  # kmeans keeps rare colours
        small.save(part, format="PNG", optimize=True)
    return out
