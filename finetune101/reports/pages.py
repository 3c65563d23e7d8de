"""The page of a run, a comparison or a study: its sections; reads run folders only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finetune101.errors import Refused
from finetune101.evaluation.tested import is_inside
from finetune101.reports import compare, figures, groups, mistakes
from finetune101.reports.arm_tables import add_arms, add_gains, add_reach, add_result, add_starts, add_tests
from finetune101.reports.comparison import Arm, Comparison, cut_note
from finetune101.reports.drawing import font_remark
from finetune101.reports.groups import Group, Tested
from finetune101.reports.hyperparameters import add_settings, add_setup
from finetune101.reports.page import Cell, Page, decision_cells, file_stem, minutes, number, spread, words
from finetune101.reports.run_sections import add_classes, add_details, add_facts
from finetune101.run import Run, open_run

Cells = Sequence[dict[str, Any]]  # of a study: one per network, arm and size


def write_report(
    target: str,
    out: Path,
    *,
    runs: str = "runs",
    lang: str = "en",
    gallery: bool = True,
    data: str | None = None,
    explain: bool = True,
) -> Path:
    """Writes the report of a tested run, or of the folder of a comparison or of a study, to ``out``; returns the page.

    ``gallery`` shows example images, read from ``data`` or from where the run found them; ``explain`` adds to the
    mistakes where the network looked and the nearest training images, which takes a pass of all training images.
    Raises Refused when the target is none of these or not finished, or the images are not there.
    """
    page = Page(out, lang)
    page.explains, page.remark = explain, font_remark(lang)
    if folder := study_folder(target, runs):
        _study(page, folder, gallery, data)
    elif (Path(target) / "comparison.json").is_file():
        _comparison(page, compare.read_groups(Path(target)), gallery, data)
    else:
        _run(page, groups.read_tested(open_run(target, runs)), gallery, data)
    return page.write()


def _run(page: Page, run: Tested, gallery: bool, data: str | None) -> None:
    page.title = f"{run.config.exp}: {run.config.model.name}"
    page.headline = run_headline(page, run)
    _decisions(page, run.run)
    group = Group(name=run.config.exp, runs=(run,))
    add_result(page, group)
    if group.records():
        alt = page.say("curves_alt", epoch=run.test.get("epoch", 0))
        draw = partial(figures.draw_curves, run.run.metrics(), title=page.title, lang=page.lang)
        page.picture("curves", draw, alt)
    add_setup(page, [group])
    add_settings(page, [group])
    add_classes(page, run)
    add_details(page, run, "", mistakes.image_root([run], data) if gallery else None)
    add_facts(page, [run])


def run_headline(page: Page, run: Tested) -> str:
    """The test accuracy of ``run`` in a sentence, whether its backbone was frozen, and what started at random."""
    low, high = run.test["top1_interval"]
    accuracy = page.say("run_headline", top1=run.test["top1"], n=run.test["n"], low=low, high=high)
    frozen = page.words["frozen"] if run.frozen else ""
    layers = run.random_layers
    return page.join([accuracy, frozen, page.say("random_layers", layers=layers) if layers else ""])


def _decisions(page: Page, run: Run) -> None:
    """What ``auto`` decided, where it made the run. Raises Refused for a damaged auto.json."""
    if not run.has("auto.json"):
        return
    try:
        rows = [decision_cells(decision, page.lang) for decision in run.read_json("auto.json")["decisions"]]
        page.table("auto", ("auto_decision", "auto_value", "auto_reason"), [list(map(words, row)) for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{run.path / 'auto.json'} is damaged; remove it, and the page leaves its part out") from error


def _comparison(page: Page, arms: Sequence[Group], gallery: bool, data: str | None) -> None:
    arms = groups.shortened(arms)
    page.title = " – ".join(group.name for group in arms)
    page.headline = _compared(page, arms)
    root = mistakes.image_root(arms[0].runs, data) if gallery else None
    for group in arms:
        first_run = f", {group.runs[0].run.name}" if len(group.runs) > 1 else ""
        add_details(page, group.runs[0], group.name + first_run, root)
    add_facts(page, [run for group in arms for run in group.runs])


def comparison_headline(page: Page, first: Comparison, sides: Sequence[Group]) -> str:
    """The difference of the first two arms in a sentence, and which arms were trained once only."""
    (low, high), over = first.interval, page.words[f"over_{first.over.replace(' ', '_')}"]
    values = {"a": first.a.name, "b": first.b.name, "top1_a": first.a.top1, "top1_b": first.b.top1, "low": low}
    headline = page.say("compare_headline", **values, gain=first.difference, high=high, over=over)
    lone = [group.name for group in sides if len(group.runs) == 1]
    cut = [cut_note(arm, page.words) for arm in (first.a, first.b) if arm.whole_epochs]
    return page.join([headline, *cut, page.say("single", arms=page.words["comma"].join(lone)) if lone else ""])


def _compared(page: Page, sides: Sequence[Group], network: str = "") -> str:
    """Adds what the groups ``sides`` differ by, with ``network`` in the titles; returns the headline."""
    comparisons = compare.all_pairs(sides)
    first, arms = comparisons[0], arms_of(comparisons, sides)
    # trained on all their images, runs have no validation and the picture shows the test alone
    key = "progress" if any(group.curve() for group in sides) else "tested"
    alt = page.say(f"{key}_alt", tests=page.words["stop"].join(f"{arm.name} {arm.top1:.1f}%" for arm in arms))
    page.picture(key, partial(draw_groups, comparisons, sides, lang=page.lang), alt, network)
    add_arms(page, arms, sides, network)
    add_setup(page, sides, network)
    add_settings(page, sides, network)
    add_losses(page, sides, network)
    add_reach(page, comparisons, network)
    rows = [vars(row) for row in first.classes]
    best = page.words["comma"].join(f"{row['name']} {round(row['gain']):+d}" for row in rows[:3])
    draw = partial(figures.draw_gains, rows, (first.a.name, first.b.name), lang=page.lang)
    page.picture("gains", draw, page.say("gains_alt", best=best), network)
    add_gains(page, first, network)
    add_tests(page, comparisons, network)
    add_starts(page, sides, network)
    return comparison_headline(page, first, sides)


def add_losses(page: Page, sides: Sequence[Group], network: str = "", key: str = "losses") -> None:
    """Adds the curves of training and validation of each arm; an arm that only solved an output layer has none."""
    lines = {group.name: group.records() for group in sides}
    curves = {name: records for name, records in lines.items() if records}
    without = page.join([page.say("losses_without", arm=name) for name in lines.keys() - curves.keys()])
    if not curves:
        return
    ends = page.words["stop"].join(
        f"{name} {records[0]['train_loss']:.2f} → {records[-1]['train_loss']:.2f}" for name, records in curves.items()
    )
    draw = partial(figures.draw_losses, curves, lang=page.lang)
    page.picture(key, draw, page.say("losses_alt", ends=ends), network, without=without)


def _study(page: Page, folder: Path, gallery: bool, data: str | None) -> None:
    """The study's curves and cells, then the comparison of its arms at the largest size, network by network."""
    cells, arms = finished_cells(folder), study_groups(folder)
    if len(arms) > 1:
        _comparison(page, arms, gallery, data)
    else:
        _run(page, arms[0].runs[0], gallery, data)
    page.title, rest = folder.name, page.sections
    page.sections = []
    for model, lines in lines_of(cells).items():
        ends = page.words["stop"].join(
            f"{arm} {line[0]['top1']:.0f} → {line[-1]['top1']:.0f}%" for arm, line in lines.items()
        )
        page.picture(
            "efficiency",
            partial(figures.draw_efficiency, lines, title=model, lang=page.lang),
            page.say("efficiency_alt", ends=ends),
            model,
        )
    heads = ["network", "arm", "size", "top1", "mean_per_class", "runs", "minutes"]
    rows = [_cell_row(cell) for cell in cells]
    if all(
        cell["size"] is None for cell in cells
    ):  # every arm has all images: the table fits a page without the column
        heads, rows = heads[:2] + heads[3:], [row[:2] + row[3:] for row in rows]
    page.table("cells", heads, rows)
    page.sections += rest
    first, *others = dict.fromkeys(cell["model"] for cell in cells)
    page.headline = _about(page, cells, first, bool(others)) + page.headline
    for model in others:
        arms = study_groups(folder, model)
        if len(arms) > 1:
            page.headline += f"{page.words['gap']}{_about(page, cells, model, True)}{_compared(page, arms, model)}"
    done, planned = progress_of(folder)
    failures = failures_of(folder)
    if failures:
        page.headline = page.say("some_failed", n=len(failures)) + page.headline
        page.add("facts", "failed", facts=failures)
    if done < planned:
        page.headline = page.say("partial", done=done, planned=planned) + page.headline


def _about(page: Page, cells: Cells, model: str, named: bool) -> str:
    """What a sentence on a study's network is about: its name where there are several, and the size compared."""
    size = max(cell["size"] or 0 for cell in cells if cell["model"] == model)
    return (f"{model}: " if named else "") + (page.say("per_class", size=size) if size else "")


def _cell_row(cell: dict[str, Any]) -> list[Cell]:
    accuracies = [spread(cell[key], cell[f"{key}_sd"]) for key in ("top1", "mean_per_class")]
    size = number(cell["size"], "d")
    return [
        words(cell["model"]),
        words(cell["arm"]),
        size,
        *accuracies,
        (f"{cell['n']} / {cell['planned']}", cell["n"]),
        minutes(cell["seconds"]),
    ]


def study_folder(name: str, runs: str) -> Path | None:
    """The folder of the study ``name``, if there is one."""
    return next((path for path in (Path(name), Path(runs) / name) if (path / "study.json").is_file()), None)


def finished_cells(folder: Path) -> list[dict[str, Any]]:
    """The cells of a study that have runs. Raises Refused when none has."""
    all_cells = Run(folder).read_json("study.json")["cells"]
    cells = [cell for cell in all_cells if cell["n"] and cell["top1"] is not None]
    if not cells:
        failed = "".join(f"; {name} failed: {reason}" for name, reason in failures_of(folder)[:1])
        raise Refused(f"{folder} has no finished run yet; continue the study first{failed}")
    if outside := next((cell for cell in all_cells if not is_inside(cell["folder"])), None):
        raise Refused(f"{folder / 'study.json'} has the folder {outside['folder']}, which is outside of the study")
    return cells


def progress_of(folder: Path) -> tuple[int, int]:
    """How many runs of a study are done, and how many it has."""
    cells = Run(folder).read_json("study.json")["cells"]
    return sum(cell["n"] for cell in cells), sum(cell["planned"] for cell in cells)


def failures_of(folder: Path) -> list[tuple[str, str]]:
    """(cell, reason) of each run of a study that failed."""
    cells = Run(folder).read_json("study.json")["cells"]
    return [(cell["folder"], reason) for cell in cells for reason in cell["errors"]]


def study_groups(folder: Path, model: str | None = None) -> list[Group]:
    """The arms of a study's network (default: its first) at the largest size, on the splits that all of them have."""
    cells = finished_cells(folder)
    cells = [cell for cell in cells if cell["model"] == (model or cells[0]["model"])]
    largest = max(cell["size"] or 0 for cell in cells)
    chosen = [cell for cell in cells if (cell["size"] or 0) == largest]
    arms = []
    for cell in chosen[:3]:
        group = groups.open_group((folder / cell["folder"]).as_posix(), unfinished=False)
        arms.append(Group(name=cell["arm"], runs=group.runs))
    return groups.on_common_splits(arms)


def lines_of(cells: Cells) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By network and arm, the cells with a size, smallest first; networks with one size only are left out."""
    lines: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in sorted((c for c in cells if c["size"]), key=lambda c: int(c["size"])):
        lines.setdefault(cell["model"], {}).setdefault(cell["arm"], []).append(cell)
    return {model: arms for model, arms in lines.items() if any(len(line) > 1 for line in arms.values())}


def draw_study(folder: Path) -> list[Path]:
    """Draws accuracy against training images per class, a picture for each network, into the study's folder."""
    return [
        figures.draw_efficiency(arms, folder / f"{file_stem(model.replace(':', '_'))}.png", model)
        for model, arms in lines_of(finished_cells(folder)).items()
    ]


def arms_of(comparisons: Sequence[Comparison], sides: Sequence[Group]) -> list[Arm]:
    """The arm of each group of ``sides``, from ``compare.all_pairs`` of them."""
    return [comparisons[0].a, *(pair.b for pair, _ in zip(comparisons, sides[1:], strict=False))]


def draw_groups(
    comparisons: Sequence[Comparison], sides: Sequence[Group], out: Path, lang: str = "en", narrow: bool = False
) -> Path:
    """Draws the picture of a comparison to ``out``: curves and test accuracy of each group of ``sides``."""
    arms = [
        {"name": arm.name, "curve": group.curve(), "top1": arm.top1, "interval": arm.top1_interval,
         "runs": [run.top1 for run in arm.runs]}
        for arm, group in zip(arms_of(comparisons, sides), groups.with_costs(sides), strict=True)
    ]  # fmt: skip
    over = "splits" if comparisons[0].splits > 1 else "images"
    return figures.draw_comparison(arms, out, over, lang, narrow)
