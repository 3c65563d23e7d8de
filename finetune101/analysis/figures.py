"""Pictures of runs, drawn with the Figure API: no window, no global state.

The colours are from M. Okabe and K. Ito's palette for colour-blind readers; line style repeats what colour says.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from finetune101.runs import atomic

Records = Sequence[Mapping[str, Any]]

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#595959"
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


def curves(metrics: Records, out: Path, title: str) -> Path:
    """Draws loss and accuracy of training and validation per epoch, with the kept epoch marked, as a PNG at ``out``.

    ``metrics`` are the records of metrics.jsonl; validation may be null. Raises ValueError when there are none.
    """
    _check(metrics, title)
    with style():
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        figure.suptitle(_short(title, 90), x=0.01, ha="left", fontweight="bold", fontsize=12)
        loss, accuracy = figure.subplots(1, 2)
        best, validated = _best(metrics), any(r["val_top1"] is not None for r in metrics)
        for axes, key in ((loss, "loss"), (accuracy, "top1")):
            _line(axes, metrics, f"train_{key}", VERMILION, dashed=True)
            _line(axes, metrics, f"val_{key}", BLUE)
            if best is not None:
                axes.axvline(best["epoch"], color=GREY, linewidth=1, linestyle=":", zorder=1)
                _star(
                    axes,
                    best["epoch"],
                    best[f"{'val' if validated else 'train'}_{key}"],
                    BLUE if validated else VERMILION,
                )
        _finish(loss, accuracy, [metrics])
        legend = [(Line2D([], [], color=VERMILION, linestyle="--"), "training images")]
        if validated:
            legend.append((Line2D([], [], color=BLUE), "validation images"))
        if best is not None:
            words = (
                f"best epoch: {best['epoch']}, validation accuracy {best['val_top1']:.1f} %"
                if validated
                else "epoch kept"
            )
            legend.append((_star_key(), words))
        figure.legend(*zip(*legend, strict=True), loc="outside lower left", ncols=3)
        return save(figure, out)


def comparison(
    metrics_a: Records,
    metrics_b: Records,
    names: tuple[str, str],
    tests: tuple[Mapping[str, Any], Mapping[str, Any]],
    out: Path,
) -> Path:
    """Draws the curves of two runs in one picture, with their test accuracies and 95 % intervals, as a PNG at ``out``.

    ``tests`` are the two test.json (``top1`` and ``top1_interval`` in percent). Raises ValueError without records.
    """
    arms = list(zip((metrics_a, metrics_b), names, (BLUE, VERMILION), strict=True))
    with style():
        figure = Figure(figsize=(12.5, 4.7), layout="constrained")
        loss, accuracy, test = figure.subplots(1, 3, width_ratios=(1, 1, 0.72))
        for metrics, name, colour in arms:
            _check(metrics, name)
            for axes, key in ((loss, "loss"), (accuracy, "top1")):
                _line(axes, metrics, f"train_{key}", colour, dashed=True)
                _line(axes, metrics, f"val_{key}", colour)
            best = _best(metrics)
            if best is not None and best["val_top1"] is not None:
                _star(accuracy, best["epoch"], best["val_top1"], colour)
        _finish(loss, accuracy, [metrics_a, metrics_b])
        accuracy.set_ylim(0, 101)
        _tests(test, names, tests)
        legend = [(Line2D([], [], color=colour), f"{_short(name, 36)}: validation") for _, name, colour in arms]
        legend += [
            (Line2D([], [], color=colour, linestyle="--"), f"{_short(name, 36)}: training") for _, name, colour in arms
        ]
        legend.append((_star_key(), "best epoch"))
        figure.legend(*zip(*legend, strict=True), loc="outside lower left", ncols=3)
        return save(figure, out)


def _tests(axes: Axes, names: tuple[str, str], tests: tuple[Mapping[str, Any], Mapping[str, Any]]) -> None:
    """One bar per run from 0 to its test accuracy, with its interval; name and numbers are written above it."""
    axes.set_title("Test accuracy with 95 % interval")
    for y, name, result, colour in zip((1, 0), names, tests, (BLUE, VERMILION), strict=True):
        top1, (low, high) = result["top1"], result["top1_interval"]
        axes.barh(y, top1, height=0.3, color=colour)
        axes.errorbar(top1, y, xerr=[[top1 - low], [high - top1]], color="black", capsize=6, linewidth=1.5)
        axes.text(0, y + 0.35, _short(name, 28), color=colour, fontweight="bold")
        axes.text(0, y + 0.2, f"{top1:.1f} % ({low:.1f} to {high:.1f})")
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 101), ylim=(-0.35, 1.6), yticks=[], xlabel="right answers on test images (%)")


def _star(axes: Axes, epoch: int, value: float, colour: str) -> None:
    axes.plot(epoch, value, "*", color=colour, markersize=15, markeredgecolor="white")


def _star_key() -> Line2D:
    return Line2D([], [], color=GREY, marker="*", linestyle="", markersize=12)


def _line(axes: Axes, metrics: Records, key: str, colour: str, dashed: bool = False) -> None:
    """One curve over epochs; records without ``key`` are left out, short runs show their points."""
    points = [(r["epoch"], r[key]) for r in metrics if r[key] is not None]
    if points:
        marker = "o" if len(points) <= 12 else ""
        style = "--" if dashed else "-"
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=marker, markersize=4)


def _finish(loss: Axes, accuracy: Axes, runs: Sequence[Records]) -> None:
    """Titles, axis labels and limits that both pictures share."""
    loss.set_title("Loss (lower is better)")
    accuracy.set_title("Accuracy (higher is better)")
    first = min(r["epoch"] for metrics in runs for r in metrics)
    last = max(r["epoch"] for metrics in runs for r in metrics)
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch (one pass over the training images)")
        axes.set_xlim(first - 0.5, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    loss.set_ylabel("cross-entropy")
    loss.set_ylim(bottom=0)
    accuracy.set_ylabel("right answers (%)")
    accuracy.set_ylim(top=min(101, accuracy.get_ylim()[1]))


def _best(metrics: Records) -> Mapping[str, Any] | None:
    """The record of the epoch whose weights were kept: the last one that was the best so far."""
    return next((record for record in reversed(metrics) if record["best"]), None)


def _check(metrics: Records, name: str) -> None:
    if not metrics:
        raise ValueError(f"{name} has no finished epoch to draw; train it for at least one")


def _short(text: str, length: int) -> str:
    """At most ``length`` characters; the middle is left out, as names of runs often differ at the end."""
    half = length // 2
    return text if len(text) <= length else f"{text[: half - 1]}…{text[-half:]}"


def style() -> Any:
    """The style, with the fonts for Chinese names that this machine has behind matplotlib's own."""
    wanted = ("DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei")
    return matplotlib.rc_context({**STYLE, "font.family": [f for f in wanted if f in font_manager.get_font_names()]})


def save(figure: Figure, out: Path) -> Path:
    """Writes the picture whole or not at all; no library version in it, so that equal runs give equal files."""
    with warnings.catch_warnings(), atomic(out) as part:
        # a name in a script that no font here can draw shows as boxes, which is no reason to fail
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(figure).print_figure(part, format="png", dpi=100, metadata={"Software": None})
    return out
