"""Verbs beyond one run: ``study`` makes several, ``compare`` and ``report`` read them; and what comes before."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune101.cli.console import watched
from finetune101.cli.main import ensure_data, recipe_line, score_text
from finetune101.cli.parse import (
    BenchmarkArguments,
    CacheArguments,
    CompareArguments,
    EnsembleArguments,
    LrFindArguments,
    RecipesArguments,
    ReportArguments,
    StudyArguments,
    parse,
    parse_train,
)
from finetune101.config import DataConfig, ModelConfig, StudyConfig, TrainConfig, check_bounds, check_name
from finetune101.errors import Refused

if TYPE_CHECKING:
    from finetune101.report.compare import Comparison
    from finetune101.report.groups import Group


def ensemble(argv: Sequence[str]) -> int:
    """``finetune101 ensemble``."""
    a = parse(EnsembleArguments, argv, prog="finetune101 ensemble")
    from finetune101.evaluation.ensemble import ensemble as score
    from finetune101.run import open_run

    runs = [open_run(name, a.runs) for name in a.members]
    result = score(runs, Path(a.out), subset=a.subset, data=a.data, batch_size=a.batch_size, mirror=a.mirror)
    print(score_text(result, a.subset))
    if a.subset == "test":
        print(f"Every prediction: {Path(a.out) / 'predictions.csv'}")
    return 0


def lr_find(argv: Sequence[str]) -> int:
    """``finetune101 lr-find``."""
    arguments = parse_train(["--exp", "lr-find", *argv], prog="finetune101 lr-find", kind=LrFindArguments)
    from tempfile import TemporaryDirectory

    from finetune101.report.figures import range_test as draw
    from finetune101.training.job import elsewhere, prepare
    from finetune101.training.lr_find import range_test

    ensure_data(arguments.config)
    with TemporaryDirectory() as runs:  # a job has a run, which nobody needs afterwards
        job = prepare(elsewhere(arguments.config, runs))
        found = range_test(job, arguments.low, arguments.high, arguments.steps)
    print(f"Picture: {draw(found.rates, found.losses, found.suggestion, found.lowest, Path(arguments.out))}")
    print(f"--lr {found.suggestion:.2g}: {found.reason}.")
    return 0


def compare(argv: Sequence[str]) -> int:
    """``finetune101 compare``."""
    arguments = parse(CompareArguments, argv, prog="finetune101 compare")
    from finetune101.report.groups import open_group
    from finetune101.report.pages import failures_of, finished, progress_of, study_folder, study_groups
    from finetune101.run import check_folder

    check_folder(Path(arguments.out))
    names = arguments.groups
    folder = study_folder(names[0], arguments.runs) if len(names) == 1 else None
    if folder:
        cells, (done, planned) = finished(folder), progress_of(folder)
        network, *others = dict.fromkeys(cell["model"] for cell in cells)
        size = max(cell["size"] or 0 for cell in cells)
        page = shlex.join(["finetune101", "report", str(folder)])
        also = f"; {', '.join(others)}: {page}" if others else ""
        print(f"{network}{f', {size} training images per class' if size else ''}{also}")
        if done < planned:
            print(f"{done} of {planned} runs are done")
        for cell, reason in failures_of(folder):
            print(f"failed in {cell}: {reason}")
        print()
    found = study_groups(folder) if folder else [open_group(name, arguments.runs) for name in names]
    run_comparison(found, Path(arguments.out))
    return 0


def run_comparison(groups: Sequence[Group], out: Path) -> Comparison:
    """Prints the comparisons of every two groups, writes comparison.json and comparison.png; returns the first."""
    from finetune101.files import write_json
    from finetune101.report import compare as comparing
    from finetune101.report.compare_text import text
    from finetune101.report.pages import progress

    found = comparing.all_pairs(groups)
    print("\n\n".join(text(one) for one in found))
    progress(found, groups, out / "comparison.png")
    write_json(out / "comparison.json", comparing.to_json(found, out))
    page = shlex.join(["finetune101", "report", str(out)])
    print(f"Picture: {out / 'comparison.png'}. A page with all of it: {page}")
    return found[0]


def report(argv: Sequence[str]) -> int:
    """``finetune101 report``."""
    a = parse(ReportArguments, argv, prog="finetune101 report")
    search = next((p for p in (Path(a.target), Path(a.runs) / a.target) if (p / "search.json").is_file()), None)
    if search:
        from finetune101.report.search_page import report as explain

        page = explain(search, out=Path(a.out), lang=a.lang)
    else:
        from finetune101.report.pages import report as make

        page = make(a.target, Path(a.out), runs=a.runs, lang=a.lang, gallery=a.gallery, data=a.data)
    print(f"Report: {page} ({page.stat().st_size / 1e6:.2f} MB), also as {page.with_suffix('.md')}")
    return 0


def study(argv: Sequence[str]) -> int:
    """``finetune101 study``; 1 when a run failed."""
    arguments = parse(StudyArguments, _lists(argv), prog="finetune101 study")
    config: StudyConfig = arguments.study
    if arguments.jobs < 1:
        raise Refused(f"--jobs is {arguments.jobs}; give at least 1")
    from finetune101.data.images import find_data, index_images, index_notes
    from finetune101.experiments import study as experiment
    from finetune101.experiments.processes import check_kind
    from finetune101.report.pages import draw_study
    from finetune101.training.duration import nothing_kept

    check_name(config.exp)
    folder = Path(config.runs) / config.exp
    check_kind(folder, "study")
    config = dataclasses.replace(config, scratch_recipe=_scratch_recipe(config, folder))
    ensure_data(TrainConfig(exp=config.exp, data=DataConfig(root=config.data)))
    layout: Literal["classes", "folders"] = "folders" if config.protocol == "folders" else "classes"
    with nothing_kept() if arguments.dry_run else contextlib.nullcontext():
        index = index_images(find_data(config.data), layout, ours=[config.runs])
    for line in index_notes(index):
        print(line)
    cells = experiment.plan(config, index)
    with nothing_kept() if arguments.dry_run else contextlib.nullcontext():
        print(experiment.estimate(index, cells, arguments.jobs, 10 if arguments.dry_run else 15), flush=True)
    if "scratch" in config.arms and config.scratch_recipe:
        print(f"Arm scratch: recipe {recipe_line(config.scratch_recipe)}")
    failed = False
    if not arguments.dry_run:
        with watched(folder, lambda: "the same command goes on from the last epochs"):
            summary = experiment.run(config, index, cells, arguments.jobs)
        print(experiment.text(summary))
        if any(cell["n"] for cell in summary["cells"]):
            for picture in draw_study(folder):
                print(f"Picture: {picture}")
            print(f"A page with all of it: {shlex.join(['finetune101', 'report', str(folder)])}")
        failed = any(cell["errors"] for cell in summary["cells"])
    return int(failed)


def _scratch_recipe(config: StudyConfig, folder: Path) -> str | None:
    """The recipe of the arm scratch: the one given, the one that the study began with, or what suits the machine."""
    from finetune101.recipes import usual_scratch
    from finetune101.run import Run

    if config.scratch_recipe or "scratch" not in config.arms:
        return config.scratch_recipe
    begun = Run(folder).read_json("study.json")["settings"] if (folder / "study.json").is_file() else {}
    names = {usual_scratch(model) for model in config.models}
    return begun.get("scratch_recipe") or (names.pop() if len(names) == 1 else None)


def _lists(argv: Sequence[str]) -> list[str]:
    """Lists may have commas: --train-per-class 1,2,5 (or =1,2,5) is --train-per-class 1 2 5."""
    words: list[str] = []
    flag = ""
    for word in argv:
        given, sign, values = word.partition("=")
        flag = given if word.startswith("--") else flag
        listed = flag.replace("_", "-") in ("--train-per-class", "--models", "--arms")
        if listed and word.startswith("--"):
            words += [given, *(part for part in values.split(",") if part)] if sign else [word]
        else:
            words += [part for part in word.split(",") if part] if listed else [word]
    return words


def cache(argv: Sequence[str]) -> int:
    """``finetune101 cache``."""
    arguments = parse(CacheArguments, argv, prog="finetune101 cache")
    from finetune101.data import store

    if not arguments.older_than >= 0:
        raise Refused(f"--older-than is {arguments.older_than}; give a number of days of at least 0")
    if arguments.action == "list":
        print(store.cache_table())
        return 0
    removed = store.clear_cache(arguments.older_than)
    print(f"Removed {len(removed)} files, {sum(entry.bytes for entry in removed) / 1e9:.2f} GB.")
    return 0


def benchmark(argv: Sequence[str]) -> int:
    """``finetune101 benchmark``."""
    a = parse(BenchmarkArguments, argv, prog="finetune101 benchmark")
    from tempfile import TemporaryDirectory

    from finetune101.data.images import find_data
    from finetune101.demo.dataset import draw
    from finetune101.files import write_json
    from finetune101.training.benchmark import Workload, table
    from finetune101.training.benchmark import benchmark as measure

    check_bounds(ModelConfig(size=a.size))
    for name in ("batch_size", "steps", "repeats"):
        if getattr(a, name) < 1:
            raise Refused(f"--{name.replace('_', '-')} is {getattr(a, name)}; give at least 1")
    with TemporaryDirectory() as folder:
        try:
            root = find_data(a.data)
        except Refused:
            if a.data is not None:
                raise
            root = draw(Path(folder) / "data")
        work = Workload(size=a.size, batch_size=a.batch_size, steps=a.steps, repeats=a.repeats)
        result = measure(root, a.models, work, a.every)
    print(table(result))
    write_json(Path(a.out), result)
    return 0


def recipes(argv: Sequence[str]) -> int:
    """``finetune101 recipes``."""
    parse(RecipesArguments, argv, prog="finetune101 recipes")
    from inspect import getdoc

    from finetune101.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name}\n  " + (getdoc(recipe) or "").replace("\n", "\n  ").replace("``", "") + "\n")
    return 0
