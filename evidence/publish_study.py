"""Copies the evidence of a finished study to results/, with its page, its comparison and the claims that stand on it.

python evidence/publish_study.py RUNS/EXP --command "finetune101 study --exp EXP ..." [--best ARM ...]
python evidence/publish_study.py RUNS/EXP --restore     puts them back, so that the study goes on from there
python evidence/publish_study.py RUNS/EXP --again       makes times, comparison and page of results/study_EXP anew
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from publish import RESULTS, enter, keep_run

from finetune101.evaluation.tested import read_manifest
from finetune101.experiments.costs import features_cached, mean_seconds
from finetune101.experiments.plan import split_file
from finetune101.files import write_json
from finetune101.many_runs import run_comparison
from finetune101.reports.compare import over_splits
from finetune101.reports.comparison import Comparison
from finetune101.reports.groups import Group, mean_sd
from finetune101.reports.pages import draw_study, study_groups, write_report
from finetune101.run import Run


def publish(study: Path, command: str, best: Sequence[str] = ()) -> Path:
    """Copies ``study`` to results/study_<its name>/, so that ``compare`` and ``report`` work there.

    The claims of the arms ``best`` begin with best, those of the others with study.
    """
    folder = RESULTS / f"study_{study.name}"
    saved = Run(study).read_json("study.json")
    for cell in saved["cells"]:
        for test in sorted((study / cell["folder"]).glob("*/test.json")):
            target = folder / cell["folder"] / test.parent.name
            keep_run(test.parent, target, command)
            (target / "curves.png").unlink(missing_ok=True)  # the page has them
    settings = {**saved["settings"], "runs": "runs", "data": None}
    write_json(folder / "study.json", {**saved, "settings": settings})
    comparison, groups = publish_page(folder)
    for cell in saved["cells"]:
        prefix = "best" if cell["arm"] in best else "study"
        enter(list(accuracies(cell, settings["protocol"], prefix)), command, f"{folder.name}/{cell['folder']}")
        if prefix == "best" and cell["arm"] == "finetune" and cell["size"] is None:
            enter([calibration(folder / cell["folder"])], command, f"{folder.name}/{cell['folder']}", 4)
    if comparison and (comparison.a.name, comparison.b.name) == (
        "finetune",
        "scratch",
    ):  # else it is not what pretraining gained
        size = max(cell["size"] or 0 for cell in saved["cells"])
        where = f"per_class_{size}." if size else "" if comparison.splits == 1 else f"{settings['protocol']}."
        if not {"finetune", "scratch"} <= set(best):
            where = f"study.{where}"
        enter(list(gains(groups, comparison, where)), command, folder.name)
    if len(saved["settings"]["train_per_class"]) > 1:
        enter(list(curve(saved["cells"])), command, folder.name)
    return folder


def publish_page(folder: Path) -> tuple[Comparison | None, list[Group]]:
    """Writes times, pictures, comparison and page of the published study in ``folder``.

    Returns the first two arms' comparison, None with one arm, and the arms.
    """
    saved = Run(folder).read_json("study.json")
    runs = {cell["folder"]: _runs_in(folder / cell["folder"]) for cell in saved["cells"]}
    cached = features_cached(run for own in runs.values() for run in own)
    for cell in saved["cells"]:
        cell["seconds"] = mean_seconds(runs[cell["folder"]], cached)
    write_json(folder / "study.json", saved)
    groups = study_groups(folder) if len(saved["cells"]) > 1 else []
    comparison = run_comparison(groups, folder) if groups else None
    draw_study(folder)
    page = write_report(str(folder), folder / "report", gallery=False)
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")
    return comparison, groups


def _runs_in(folder: Path) -> list[Run]:
    return [Run(test.parent) for test in sorted(folder.glob("*/test.json"))]


def restore(study: Path) -> None:
    """Puts the published runs of ``study`` where it looks for them, without weights; those there already stay."""
    folder = RESULTS / f"study_{study.name}"
    for cell in Run(folder).read_json("study.json")["cells"]:
        for test in sorted((folder / cell["folder"]).glob("*/test.json")):
            run = study / cell["folder"] / test.parent.name
            if run.exists():
                continue
            shutil.copytree(test.parent, run)
            manifest, config = read_manifest(Run(test.parent)), Run(run).read_json("config.json")
            if cell["size"] is not None:
                file = split_file(study, manifest.seed, cell["size"])
                config["data"]["split"] = str(file)
                write_json(file, manifest.to_json())
            write_json(run / "split.json", manifest.to_json())
            write_json(run / "config.json", {**config, "runs": str(study.parent)})
            print(run)


def accuracies(cell: dict[str, Any], protocol: str, prefix: str) -> Iterator[dict[str, Any]]:
    """The claims of one cell of a study: its arm's accuracies, and the standard deviation over its runs."""
    where = protocol if cell["size"] is None else f"per_class_{cell['size']}"
    for metric in ("top1", "mean_per_class"):
        name = f"{prefix}.{cell['arm']}.{cell['model']}.{where}.{metric}"
        yield {"id": name, "value": cell[metric], "unit": "%", "n": cell["n"], "spread": cell[f"{metric}_sd"]}


def calibration(folder: Path) -> dict[str, Any]:
    """The claim of the expected calibration error after temperature scaling, mean over the runs in ``folder``."""
    tests = [Run(file.parent).read_json("test.json") for file in sorted(folder.glob("*/test.json"))]
    mean, sd = mean_sd([test["calibration_scaled"]["ece"] for test in tests])
    unit = "ECE, 15 bins, after temperature scaling"
    return {"id": "report.ece", "value": mean, "unit": unit, "n": len(tests), "spread": sd}


def gains(groups: Sequence[Group], comparison: Comparison, where: str) -> Iterator[dict[str, Any]]:
    """The claims of the first two arms' differences: top-1 with its interval, mean per class with one over splits.

    ``where`` tells studies apart in the claims' names; that of the best arms on the reference split has none.
    """
    name = f"compare.gain.{comparison.a.network}." + where
    claim = {"unit": "points", "n": min(len(comparison.a.runs), len(comparison.b.runs))}
    yield claim | {"id": f"{name}top1", "value": comparison.difference, "spread": list(comparison.interval)}
    value, interval = comparison.a.mean_per_class - comparison.b.mean_per_class, None
    if comparison.splits > 1:
        seeds = sorted({run.split_seed for run in comparison.a.runs})
        sides = [
            [fmean(run.mean_per_class for run in arm.runs if run.split_seed == seed) for seed in seeds]
            for arm in (comparison.a, comparison.b)
        ]
        interval = list(over_splits([a - b for a, b in zip(*sides, strict=True)], groups[0].runs[0].test_to_train))
    yield claim | {"id": f"{name}mean_per_class", "value": value, "spread": interval}


def curve(cells: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The claim of the first network's curve: with how few images per class fine-tuning reaches what random
    initialisation has with the most, by mean accuracy per class; none where it never does."""
    sizes: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        if cell["model"] == cells[0]["model"] and cell["n"]:
            sizes.setdefault(cell["arm"], {})[cell["size"]] = cell
    if {"finetune", "scratch"} <= sizes.keys():
        most = max(sizes["scratch"])
        goal = sizes["scratch"][most]
        enough = [n for n, cell in sizes["finetune"].items() if cell["mean_per_class"] >= goal["mean_per_class"]]
        if enough:
            unit = f"images per class with which fine-tuning reaches what random initialisation has with {most}"
            n = min(goal["n"], sizes["finetune"][min(enough)]["n"])
            yield {"id": "compare.curve", "value": min(enough), "unit": unit, "n": n, "spread": None}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--command", default="")
    parser.add_argument("--restore", action="store_true", help="from results/ to RUNS/EXP")
    parser.add_argument("--again", action="store_true", help="page and times of results/study_EXP")
    parser.add_argument("--best", nargs="+", default=(), metavar="ARM", help="arms that have the best recipe there is")
    arguments = parser.parse_args()
    if arguments.restore:
        restore(arguments.study)
    elif arguments.again:
        publish_page(RESULTS / f"study_{arguments.study.name}")
    elif arguments.command:
        publish(arguments.study, arguments.command, arguments.best)
    else:
        parser.error("give the study's --command")
