"""Pictures drawn for real: what is in them before they are drawn, and the files read back with Pillow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from finetune101.reports import figures
from finetune101.reports.drawing import BLUE, VERMILION


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, in their order; they are written as always."""
    kept: list[Figure] = []
    save_figure = figures.save_figure

    def keep(figure: Figure, *rest: Any, **options: Any) -> Path:
        kept.append(figure)
        return save_figure(figure, *rest, **options)

    monkeypatch.setattr(figures, "save_figure", keep)
    return kept


def lines(axes: Axes, colour: str) -> list[list[tuple[float, float]]]:
    """The points of each line of that colour in ``axes``; the legend is not in it."""
    return [
        list(zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist(), strict=True))
        for line in axes.get_lines()
        if to_hex(line.get_color()) == colour.lower()
    ]


def records(epochs: int, *, validation: bool = True, floor: float = 0.2) -> list[dict[str, Any]]:
    """A run that converges: as metrics.jsonl holds it."""
    return [
        {
            "epoch": e,
            "train_loss": 3 / e,
            "train_top1": 100 - 60 / e,
            "val_loss": 2 / e + floor if validation else None,
            "val_top1": 95 - 40 / e if validation else None,
            "best": True,
        }
        for e in range(1, epochs + 1)
    ]


def pixels(path: Path) -> np.ndarray:
    """The picture as uint8 (H, W, 3), checked to be a small PNG."""
    assert path.stat().st_size < 300_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("epochs", [1, 2, 30, 300])
def test_curves_show_training_and_validation(tmp_path: Path, drawn: list[Figure], epochs: int) -> None:
    picture = pixels(figures.draw_curves(records(epochs), tmp_path / "curves.png", "a run"))
    assert picture.shape[1] >= 1000
    loss, accuracy = drawn[0].axes
    assert lines(loss, VERMILION) == [[(e, 3 / e) for e in range(1, epochs + 1)]]
    assert lines(loss, BLUE)[0] == [(e, 2 / e + 0.2) for e in range(1, epochs + 1)]
    assert lines(accuracy, VERMILION) == [[(e, 100 - 60 / e) for e in range(1, epochs + 1)]]
    assert lines(accuracy, BLUE)[0] == [(e, 95 - 40 / e) for e in range(1, epochs + 1)]


def test_curves_without_validation(tmp_path: Path, drawn: list[Figure]) -> None:
    pixels(figures.draw_curves(records(5, validation=False), tmp_path / "curves.png", "a run"))
    loss, accuracy = drawn[0].axes
    assert len(lines(accuracy, VERMILION)[0]) == 5
    assert not lines(loss, BLUE) and not lines(accuracy, BLUE)


def test_best_epoch_is_the_last_that_was_best_so_far(tmp_path: Path, drawn: list[Figure]) -> None:
    early = records(10)
    for record in early[4:]:
        record["best"] = False
    figures.draw_curves(early, tmp_path / "early.png", "a run")
    figures.draw_curves(records(10), tmp_path / "late.png", "a run")
    assert [lines(figure.axes[1], BLUE)[-1] for figure in drawn] == [[(4, 95 - 40 / 4)], [(10, 95 - 40 / 10)]]


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    one = figures.draw_curves(records(5), tmp_path / "one.png", "a run").read_bytes()
    assert figures.draw_curves(records(5), tmp_path / "two.png", "a run").read_bytes() == one


def arm(name: str, epochs: int, runs: Sequence[float] = (70.2,), sd: float = 0.0, paid: bool = True) -> dict[str, Any]:
    """What the picture of a comparison needs of one arm."""
    curve = [
        {"step": 9 * e, "seconds": 60.0 * e if paid else None, "mean": 95 - 40 / e, "sd": sd}
        for e in range(1, epochs + 1)
    ]
    return {"name": name, "curve": curve, "top1": 70.2, "interval": [68.1, 72.3], "runs": list(runs)}


@pytest.mark.parametrize("arms", [2, 3])
def test_comparison_shows_every_arm(tmp_path: Path, drawn: list[Figure], arms: int) -> None:
    sides = [arm("tuned", 20), arm("scratch", 30, (69.0, 70.2, 71.4), 2.0), arm("probe", 1)][:arms]
    pixels(figures.draw_comparison(sides, tmp_path / "both.png"))
    by_step, by_time, test = drawn[0].axes
    for k, one in enumerate(sides):
        points = one["curve"]
        assert lines(by_step, figures.ARMS[k]) == [[(p["step"], p["mean"]) for p in points]]
        assert lines(by_time, figures.ARMS[k]) == [[(p["seconds"] / 60, p["mean"]) for p in points]]
    bars = [patch for patch in test.patches if isinstance(patch, Rectangle)]
    assert [bar.get_width() for bar in bars] == [70.2] * arms
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [colour.lower() for colour in figures.ARMS[:arms]]


def test_an_arm_whose_features_came_from_a_cache_has_no_time(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.draw_comparison([arm("tuned", 20), arm("probe", 3, paid=False)], tmp_path / "both.png")
    by_step, by_time, _ = drawn[0].axes
    assert len(lines(by_step, VERMILION)[0]) == 3 and lines(by_time, VERMILION) == [[]]


def test_comparison_without_validation(tmp_path: Path, drawn: list[Figure]) -> None:
    pixels(figures.draw_comparison([arm("a", 0), arm("b", 0)], tmp_path / "both.png"))
    assert [len(axes.patches) for axes in drawn[0].axes] == [2]


@pytest.mark.parametrize("classes", [2, 60])
def test_gains(tmp_path: Path, drawn: list[Figure], classes: int) -> None:
    rows = [{"name": f"class {k}", "n": 9, "a": 90.0, "b": 90.0 - k} for k in range(classes, 0, -1)]
    picture = pixels(figures.draw_gains(rows, ("tuned", "scratch"), tmp_path / "gains.png"))
    extremes = rows if classes == 2 else [*rows[:14], *rows[-10:]]
    (axes,) = drawn[0].axes
    assert [x for x, _ in lines(axes, BLUE)[0]] == [row["a"] for row in reversed(extremes)]
    assert [x for x, _ in lines(axes, VERMILION)[0]] == [row["b"] for row in reversed(extremes)]
    assert picture.shape[0] < 1200


@pytest.mark.parametrize("classes", [2, 101])
def test_confusion_frames_its_blocks(tmp_path: Path, drawn: list[Figure], classes: int) -> None:
    counts = np.eye(classes, dtype=int) * 5
    blocks = [2] + [1] * (classes - 2)
    pixels(figures.draw_confusion([f"class {k}" for k in range(classes)], counts, blocks, tmp_path / "c.png"))
    frames = [p for p in drawn[0].axes[0].patches if isinstance(p, Rectangle)]
    assert [(p.get_xy(), p.get_width(), p.get_height()) for p in frames] == [((-0.5, -0.5), 2, 2)]


@pytest.mark.parametrize("classes", [1, 2, 15, 16, 40, 41, 101])
def test_a_confusion_matrix_is_legible_with_long_names(tmp_path: Path, drawn: list[Figure], classes: int) -> None:
    names = [f"a_rather_long_name_of_class_{k}" for k in range(classes)]
    counts = 100 * np.eye(classes, dtype=int) + 120
    height, width, _ = pixels(figures.draw_confusion(names, counts, [1] * classes, tmp_path / "c.png")).shape
    axes, (scale,) = drawn[0].axes[0], drawn[0].axes[0].child_axes
    whole = drawn[0].get_tightbbox().transformed(drawn[0].dpi_scale_trans)
    assert (width, height) == pytest.approx((whole.width + 20, whole.height + 20), abs=2)
    words = [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts, *scale.get_xticklabels()]
    boxes = [word.get_window_extent() for word in words if word.get_text()]
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 for box in boxes)
    for labels, axis in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1), (scale.get_xticklabels(), 0)):
        ends = [label.get_window_extent().get_points()[:, axis] for label in labels]
        centres = sorted((low + high) / 2 for low, high in ends)
        assert all(b - a >= 9 for a, b in itertools.pairwise(centres))
    for row in range(min(classes, figures.COUNTED)):  # no number reaches into the next one's cell
        own = [t.get_window_extent() for t in axes.texts if t.get_position()[1] == row]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(own))


def test_reliability(tmp_path: Path, drawn: list[Figure]) -> None:
    bins = [{"n": 0, "confidence": None, "top1": None}, {"n": 5, "confidence": 80.0, "top1": 60.0}]
    pixels(figures.draw_reliability({"before": bins, "after": []}, tmp_path / "r.png"))
    assert lines(drawn[0].axes[0], BLUE) == [[(80.0, 60.0)]] and lines(drawn[0].axes[0], VERMILION) == [[]]


def test_efficiency(tmp_path: Path, drawn: list[Figure]) -> None:
    cells = [{"size": size, "top1": 9.0 * size, "top1_sd": sd, "n": 3} for size, sd in ((1, None), (5, 2.0), (10, 1.0))]
    pixels(figures.draw_efficiency({"finetune": cells, "scratch": cells[:2]}, tmp_path / "e.png", "a network"))
    (axes,) = drawn[0].axes
    assert lines(axes, BLUE) == [[(1, 9.0), (5, 45.0), (10, 90.0)]]
    assert lines(axes, VERMILION) == [[(1, 9.0), (5, 45.0)]]


@pytest.mark.parametrize("name", ["_hidden", "a$b$c", r"\frac{", "x" * 200, "微调", "bell\x07", "not UTF-8 \udcff"])
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    pixels(figures.draw_curves(records(2), tmp_path / "curves.png", name))
    pixels(figures.draw_comparison([arm(name, 2), arm(name, 1)], tmp_path / "both.png"))
    pixels(figures.draw_confusion([name, "other"], np.eye(2, dtype=int), [1, 1], tmp_path / "confusion.png"))


def test_nothing_to_draw_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished epoch"):
        figures.draw_curves([], tmp_path / "curves.png", "a run")
    assert not list(tmp_path.iterdir())


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        figures.draw_curves(records(1), target, "a run")
    assert list(tmp_path.iterdir()) == [target]


def test_own_plots_keep_their_style(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.draw_curves(records(1), tmp_path / "curves.png", "a run")
    assert dict(matplotlib.rcParams) == before
