"""The tables of a comparison: accuracy and cost, where each run started, differences, who reaches whom, classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune101.reports.comparison import Arm, Comparison, arm_notes
from finetune101.reports.groups import Group, mean_sd, proof
from finetune101.reports.page import Cell, Name, Page, minutes, number, p_cell, percent, spread, words


def add_arms(page: Page, arms: Sequence[Arm], groups: Sequence[Group], network: str = "", key: str = "arms") -> None:
    """Adds accuracy, and below it cost, with a column for each of ``arms`` of the runs in ``groups``."""
    columns = [_arm_cells(arm, group) for arm, group in zip(arms, groups, strict=True)]
    notes = page.join([note for arm in arms for note in arm_notes(arm, page.words)])
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    rows = [(label, cells) for label, cells in rows if any(cell[0] != "–" for cell in cells)]
    page.sheet(key, [arm.name for arm in arms], rows, network, notes=notes)


def _arm_cells(arm: Arm, group: Group) -> dict[str, Cell]:
    """Label -> cell of one arm."""
    steps, images = (float(np.mean([getattr(run, key) for run in arm.runs])) for key in ("steps", "images"))
    losses = [run.test["loss"] for run in group.runs if run.test.get("loss") is not None]
    loss, loss_sd = mean_sd(losses) if losses else (None, None)
    one = arm.top1_sd is None
    return {
        "top1": percent(arm.top1, arm.top1_interval, ".2f") if one else spread(arm.top1, arm.top1_sd),
        "mean_per_class": spread(arm.mean_per_class, arm.mean_per_class_sd),
        "test_loss": spread(loss, loss_sd, 3),
        "validation": number(arm.validation),
        "runs": number(len(arm.runs), "d"),
        "minutes": minutes(arm.seconds),
        "steps": number(steps, ",.0f"),
        "images_seen": number(images, ",.0f"),
    }


def add_result(page: Page, group: Group, key: str = "result") -> None:
    """Adds accuracy and cost of the one run in ``group``."""
    (run,) = group.runs
    test, cost = run.test, run.cost()
    kept = [record["val_top1"] for record in run.run.metrics() if record["best"]]
    values: dict[str, Cell] = {
        "top1": percent(test["top1"], tuple(test["top1_interval"]), ".2f"),
        "mean_per_class": number(test["mean_per_class"]),
        "test_loss": number(test.get("loss"), ".3f"),
        "validation": number(kept[-1] if kept else None),
        "minutes": minutes(cost["seconds"]),
        "steps": number(cost["steps"], ",.0f"),
        "images_seen": number(cost["images"], ",.0f"),
    }
    rows = [(label, [cell]) for label, cell in values.items() if cell[0] != "–"]
    page.sheet(key, [group.name], rows, notes="")


def add_starts(page: Page, groups: Sequence[Group], network: str = "") -> None:
    """Adds where each run started, and whether a random start is proven."""
    pretrained = {
        run.env["model"]["init_hash"]: run.run.name
        for group in groups
        for run in group.runs
        if run.config.model.pretrain
    }
    rows = []
    for group in groups:
        for run in group.runs:
            model = run.env["model"]
            start = model["init_source"] if run.config.model.pretrain else proof(run, pretrained, page.words)
            rows.append([words(group.name), number(run.config.system.seed, "d"), words(model["init_hash"][7:19]),
                         words(start)])  # fmt: skip
    page.table("starts", ("arm", "seed", "init_hash", "start"), rows, network)


def add_tests(page: Page, comparisons: Sequence[Comparison], network: str = "") -> None:
    """Adds the differences with their intervals, and McNemar's tests."""
    rows, pairs = [], []
    for c in comparisons:
        name = f"{c.a.name} – {c.b.name}"
        over_runs = c.crossed.interval if c.crossed else None
        spans = [
            words(f"{interval[0]:+.2f} – {interval[1]:+.2f}" if interval else "–")
            for interval in (c.difference_interval, over_runs, c.over_splits)
        ]
        p = p_cell(c.crossed.p if c.crossed else None)
        rows.append([words(name), number(c.difference, "+.2f"), *spans, p])
        pairs += [
            [words(p.a), words(p.b), number(p.only_a, "d"), number(p.only_b, "d"), p_cell(p.p)] for p in c.mcnemar
        ]
    over = [Name(f"95%: {page.words[key]}") for key in ("over_images", "over_images_and_runs", "over_splits")]
    page.table("differences", ("pair", "gain", *over, "p"), rows, network)
    page.table("mcnemar", ("run_a", "run_b", "only_a", "only_b", "p"), pairs, network)


def add_reach(page: Page, comparisons: Sequence[Comparison], network: str = "") -> None:
    """Adds who reaches whose validation accuracy after how many steps."""
    reach = []
    for c in comparisons:
        for arm, other in ((c.a, c.b), (c.b, c.a)):
            if other.validation is not None:
                after = [number(arm.steps_to_other, ",.0f"), minutes(arm.seconds_to_other)]
                reach.append([words(arm.name), words(other.name), number(other.validation), *after])
    if reach:
        page.table("reach", ("arm", "goal_of", "validation", "steps", "minutes"), reach, network)


def add_gains(page: Page, c: Comparison, network: str = "") -> None:
    """Adds the accuracy of both arms in every class."""
    rows = [
        [words(row.name), percent(row.a, row.a_interval), percent(row.b, row.b_interval), number(row.gain, "+.1f"),
         number(row.n, "d")]
        for row in c.classes
    ]  # fmt: skip
    page.table(
        "gains_table", ("class", Name(f"{c.a.name}, %"), Name(f"{c.b.name}, %"), "gain", "images"), rows, network
    )
