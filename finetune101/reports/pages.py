"""The page of a run, a comparison or a study: its sections; reads run folders only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune101.errors import Refused
from finetune101.evaluation import metrics
from finetune101.evaluation.tested import confused_pairs, evaluate_command, is_inside
from finetune101.models.table import lookup
from finetune101.redaction import redacted
from finetune101.reports import compare, figures, groups, mistakes
from finetune101.reports.comparison import Arm, Comparison, arm_notes
from finetune101.reports.groups import Group, Tested
from finetune101.reports.page import (
    Cell,
    Name,
    Page,
    decision_cells,
    file_stem,
    minutes,
    number,
    percent,
    spread,
    words,
)
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
    page.explains = explain
    if folder := study_folder(target, runs):
        _study(page, folder, gallery, data)
    elif (Path(target) / "comparison.json").is_file():
        _comparison(page, compare.read_groups(Path(target)), gallery, data)
    else:
        _run(page, groups.read_tested(open_run(target, runs)), gallery, data)
    return page.write()


def _run(page: Page, run: Tested, gallery: bool, data: str | None) -> None:
    low, high = run.test["top1_interval"]
    page.title = f"{run.config.exp}: {run.config.model.name}"
    page.headline = page.say("run_headline", top1=run.test["top1"], n=run.test["n"], low=low, high=high)
    page.headline += f" {page.words['frozen']}" if run.frozen else ""
    page.headline += f" {page.say('random_layers', layers=layers)}" if (layers := run.random_layers) else ""
    _decisions(page, run.run)
    alt = page.say("curves_alt", epoch=run.test.get("epoch", 0))
    page.picture("curves", lambda out: figures.draw_curves(run.run.metrics(), out, page.title), alt)
    _class_table(page, run)
    _details(page, run, "", mistakes.image_root([run], data) if gallery else None)
    _facts(page, [run])


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
        _details(page, group.runs[0], group.name + first_run, root)
    _facts(page, [run for group in arms for run in group.runs])


def _compared(page: Page, sides: Sequence[Group], network: str = "") -> str:
    """Adds what the groups ``sides`` differ by, with ``network`` in the titles; returns the headline."""
    comparisons = compare.all_pairs(sides)
    first = comparisons[0]
    (low, high), over = first.interval, page.words[f"over_{first.over.replace(' ', '_')}"]
    values = {"a": first.a.name, "b": first.b.name, "top1_a": first.a.top1, "top1_b": first.b.top1, "low": low}
    headline = page.say("compare_headline", **values, gain=first.difference, high=high, over=over)
    if lone := [group.name for group in sides if len(group.runs) == 1]:
        headline += " " + page.say("single", arms=", ".join(lone))
    arms = arms_of(comparisons, sides)
    # trained on all their images, runs have no validation and the picture shows the test alone
    key = "progress" if any(group.curve() for group in sides) else "tested"
    alt = page.say(f"{key}_alt", tests="; ".join(f"{arm.name} {arm.top1:.1f} %" for arm in arms))
    page.picture(key, lambda out: draw_groups(comparisons, sides, out), alt, network)
    _arms_table(page, arms, sides, network)
    _reach_table(page, comparisons, network)
    rows = [vars(row) for row in first.classes]
    best = ", ".join(f"{row['name']} {row['gain']:+.0f}" for row in rows[:3])
    names = first.a.name, first.b.name
    alt = page.say("gains_alt", best=best)
    page.picture("gains", lambda out: figures.draw_gains(rows, names, out), alt, network)
    _gains_table(page, first, network)
    _tests_tables(page, comparisons, network)
    _starts_table(page, arms, network)
    return headline


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
        ends = "; ".join(f"{arm} {line[0]['top1']:.0f} → {line[-1]['top1']:.0f} %" for arm, line in lines.items())
        page.picture(
            "efficiency",
            partial(figures.draw_efficiency, lines, title=model),
            page.say("efficiency_alt", ends=ends),
            model,
        )
    heads = ("network", "arm", "size", "runs", "top1", "mean_per_class", "minutes")
    page.table("cells", heads, [_cell_row(cell) for cell in cells])
    page.sections += rest
    first, *others = dict.fromkeys(cell["model"] for cell in cells)
    page.headline = _about(page, cells, first, bool(others)) + page.headline
    for model in others:
        arms = study_groups(folder, model)
        if len(arms) > 1:
            page.headline += f" {_about(page, cells, model, True)}{_compared(page, arms, model)}"
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
        (f"{cell['n']} / {cell['planned']}", cell["n"]),
        *accuracies,
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


def draw_groups(comparisons: Sequence[Comparison], sides: Sequence[Group], out: Path) -> Path:
    """Draws the picture of a comparison to ``out``: curves and test accuracy of each group of ``sides``."""
    arms = [
        {"name": arm.name, "curve": group.curve(), "top1": arm.top1, "interval": arm.top1_interval,
         "runs": [run.top1 for run in arm.runs]}
        for arm, group in zip(arms_of(comparisons, sides), groups.with_costs(sides), strict=True)
    ]  # fmt: skip
    return figures.draw_comparison(arms, out, "splits" if comparisons[0].splits > 1 else "images")


def _class_table(page: Page, run: Tested) -> None:
    rows: list[list[Cell]] = []
    for name, share in run.by_class().items():
        predictions = Counter(answer.prediction for answer in run.answers.values() if answer.label == name)
        n, right = predictions.total(), predictions.pop(name, 0)
        often = min(predictions, key=lambda other: (-predictions[other], other), default="")
        taken = f"{often} ({predictions[often]})" if often else ""
        interval = metrics.wilson(right, n)
        rows.append([words(name), number(n, "d"), number(right, "d"), percent(share, interval), words(taken)])
    rows.sort(key=lambda row: row[3][1])
    page.table("classes", ("class", "images", "right", "share", "mistaken"), rows)


def _gains_table(page: Page, c: Comparison, network: str) -> None:
    rows = [
        [words(row.name), number(row.n, "d"), percent(row.a, row.a_interval), percent(row.b, row.b_interval),
         number(row.gain, "+.1f")]
        for row in c.classes
    ]  # fmt: skip
    page.table(
        "gains_table", ("class", "images", Name(f"{c.a.name}, %"), Name(f"{c.b.name}, %"), "gain"), rows, network
    )


def _arms_table(page: Page, arms: Sequence[Arm], sides: Sequence[Group], network: str) -> None:
    heads = ("arm", "network", "recipe", "pixels", "search_epochs", "runs", "top1", "mean_per_class", "validation",
             "minutes", "steps", "images_seen")  # fmt: skip
    rows = []
    for arm, group in zip(arms, sides, strict=True):
        config = group.runs[0].config
        sizes = dict.fromkeys(
            (*config.augment.train_sizes, config.model.size or lookup(arm.network).preprocessing.size)
        )
        settings = [words(config.recipe or "–"), words(" → ".join(map(str, sizes))), number(config.optim.epochs, "d")]
        steps, images = (float(np.mean([getattr(run, key) for run in arm.runs])) for key in ("steps", "images"))
        top1 = percent(arm.top1, arm.top1_interval, ".2f") if arm.top1_sd is None else spread(arm.top1, arm.top1_sd)
        scores = [top1, spread(arm.mean_per_class, arm.mean_per_class_sd), number(arm.validation)]
        costs = [minutes(arm.seconds), number(steps, ",.0f"), number(images, ",.0f")]
        rows.append([words(arm.name), words(arm.network), *settings, number(len(arm.runs), "d"), *scores, *costs])
    notes = " ".join(note for arm in arms for note in arm_notes(arm, page.words))
    page.table("arms", heads, rows, network, notes=notes)


def _starts_table(page: Page, arms: Sequence[Arm], network: str) -> None:
    started = [
        [words(arm.name), number(run.seed, "d"), words(run.init_hash[7:19]),
         words(arm.init_source if run.start == "pretrained" else run.start)]
        for arm in arms
        for run in arm.runs
    ]  # fmt: skip
    page.table("starts", ("arm", "seed", "init_hash", "start"), started, network)


def _tests_tables(page: Page, comparisons: Sequence[Comparison], network: str) -> None:
    """The differences with their intervals, and McNemar's tests."""
    rows, pairs = [], []
    for c in comparisons:
        name = f"{c.a.name} – {c.b.name}"
        over_runs = c.crossed.interval if c.crossed else None
        spans = [
            words(f"{interval[0]:+.2f} – {interval[1]:+.2f}" if interval else "–")
            for interval in (c.difference_interval, over_runs, c.over_splits)
        ]
        p = number(c.crossed.p if c.crossed else None, ".2g")
        rows.append([words(name), number(c.difference, "+.2f"), *spans, p])
        pairs += [
            [words(p.a), words(p.b), number(p.only_a, "d"), number(p.only_b, "d"), number(p.p, ".2g")]
            for p in c.mcnemar
        ]
    over = [Name(f"95 %: {page.words[key]}") for key in ("over_images", "over_images_and_runs", "over_splits")]
    page.table("differences", ("pair", "gain", *over, "p"), rows, network)
    page.table("mcnemar", ("run_a", "run_b", "only_a", "only_b", "p"), pairs, network)


def _reach_table(page: Page, comparisons: Sequence[Comparison], network: str) -> None:
    """Who reaches whose validation accuracy after how many steps."""
    reach = []
    for c in comparisons:
        for arm, other in ((c.a, c.b), (c.b, c.a)):
            if other.validation is not None:
                after = [number(arm.steps_to_other, ",.0f"), minutes(arm.seconds_to_other)]
                reach.append([words(arm.name), words(other.name), number(other.validation), *after])
    if reach:
        page.table("reach", ("arm", "goal_of", "validation", "steps", "minutes"), reach, network)


def _details(page: Page, run: Tested, name: str, root: Path | None) -> None:
    """Confusions, examples and calibration of one run; with ``root`` also the images."""
    matrix = mistakes.confusion_of(run.answers)
    pairs = confused_pairs(run.answers)
    alt = page.say("confusion_alt", pairs="; ".join(f"{a} → {b} ({n})" for a, b, n in pairs[:3]))
    total = len(matrix.names) + matrix.hidden
    hidden = page.say("confusion_hidden", shown=len(matrix.names), total=total) if matrix.hidden else ""
    draw = partial(figures.draw_confusion, matrix.names, matrix.counts, matrix.blocks)
    page.picture("confusion", draw, alt, name, wide=total > mistakes.MAY_HIDE, hidden=hidden)
    if root:
        examples = mistakes.pair_examples(run, root)
        unread = sum(image is None for pair in examples for image in pair["images"])
        page.add("pairs", "pairs", name, pairs=examples, unread=page.say("unread", n=unread) if unread else "")
    else:
        rows = [[words(label), words(prediction), number(count, "d")] for label, prediction, count in pairs]
        page.table("pairs_table", ("class", "prediction", "images"), rows, name)
    for key, right in (("mistakes", False), ("hits", True)):
        chosen = mistakes.examples(run.answers, right, root)
        unread = sum(one["image"] is None for one in chosen) if root else 0
        notes = [page.say("unread", n=unread)] if unread else []
        if root and page.explains and not right:
            notes.append(mistakes.add_reasons(run.run, root, chosen, page.words))
        page.add("gallery", key, name, examples=chosen)
        page.sections[-1]["note"] += " ".join(notes)
    if "calibration" in run.test:
        _calibration(page, run, name)


def _calibration(page: Page, run: Tested, name: str) -> None:
    """Whether the confidence is right, and whether the temperature made it better."""
    before, after = run.test["calibration"], run.test.get("calibration_scaled") or {}
    t, ece = after.get("temperature"), after.get("ece")
    lines = {f"as trained (ECE {before['ece']:.3f})": before["bins"]}
    if t is None or t == 1:
        scaled = page.words["unscaled" if t is None else "unhelpful"]
    else:
        lines[f"with temperature {t:.2f} (ECE {ece:.3f})"] = after["bins"]
        scaled = page.say("scaled" if ece < before["ece"] else "scaled_worse", t=t, ece=ece)
    values = {"ece": before["ece"], "scaled": scaled}
    alt = page.say("reliability_text", name=name, **values)
    page.picture("reliability", lambda out: figures.draw_reliability(lines, out), alt, name, **values)


def _facts(page: Page, runs: Sequence[Tested]) -> None:
    """Split, environment and the commands that make it all again."""
    first = runs[0]
    sizes = " / ".join(f"{len(first.manifest.subsets[name]):,}" for name in ("train", "val", "test"))
    splits = dict.fromkeys((run.split, run.manifest.seed) for run in runs)
    facts = [("protocol", first.manifest.protocol), ("sizes", sizes)]
    facts += [("manifest", f"{split} (seed {seed})") for split, seed in splits]
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in run.env.get("versions", {}).items()) for run in runs)
    facts += [("versions", line) for line in versions if line]
    machines = [{**run.env.get("world", {}), **run.env.get("machine", {})} for run in runs]
    lines = dict.fromkeys(", ".join(f"{key} {value}" for key, value in machine.items()) for machine in machines)
    facts += [("machine", line) for line in lines]
    facts.append(("times_scored", ", ".join(str(run.test.get("times_scored", 1)) for run in runs)))
    page.add("facts", "protocol_title", facts=[(page.words[key], value) for key, value in facts])
    commands = [redacted(run.env["command"]) for run in runs if run.env.get("command")]  # old ones have secrets
    commands += [evaluate_command(run.run) for run in runs if run.run.best.is_file()]
    page.add("code", "commands", lines=list(dict.fromkeys(commands)))
