"""What the verbs of many runs do, without a command line: a study, a search, a comparison of groups of runs.

A user's mistake raises ``Refused``. Everything prints what a person wants to see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune101.config import DataConfig, TrainConfig, check_name
from finetune101.data.download import ensure_data
from finetune101.data.images import find_data
from finetune101.experiments.settings import USUAL_WORKERS, WorkerOptions
from finetune101.recipes import recipe_line
from finetune101.run import plots_folder

if TYPE_CHECKING:
    from finetune101.experiments.settings import SearchOptions, StudyConfig
    from finetune101.experiments.space import Space
    from finetune101.reports.comparison import Comparison
    from finetune101.reports.groups import Group


def run_study(study: StudyConfig, workers: WorkerOptions = USUAL_WORKERS, *, dry_run: bool = False) -> dict[str, Any]:
    """Trains and tests every run of ``study`` that is not done; returns what study.json holds.

    With ``dry_run`` it only says how many runs there are and how long they take. Raises Refused for settings, data or
    weights that cannot work.
    """
    from finetune101.data.images import index_images, index_notes
    from finetune101.data.layouts import layout_for
    from finetune101.experiments.folders import check_kind
    from finetune101.experiments.plan import plan_study, scratch_recipe
    from finetune101.experiments.study import estimate, study_text
    from finetune101.experiments.study import run_study as train_cells
    from finetune101.experiments.workers import check_workers, make_workers
    from finetune101.reports.pages import draw_study
    from finetune101.training.duration import nothing_kept

    check_workers(workers)
    check_name(study.exp)
    folder = Path(study.runs) / study.exp
    check_kind(folder, "study")
    study = dataclasses.replace(study, scratch_recipe=scratch_recipe(study, folder))
    ensure_data(DataConfig(root=study.data))
    with nothing_kept() if dry_run else contextlib.nullcontext():
        index = index_images(find_data(study.data), layout_for(study.protocol), ours=[study.runs])
        for line in index_notes(index):
            print(line)
        cells = plan_study(study, index)
        print(estimate(index, cells, workers.jobs or 1, 10 if dry_run else 15), flush=True)
    if "scratch" in study.arms and study.scratch_recipe:
        print(f"Arm scratch: recipe {recipe_line(study.scratch_recipe)}")
    if dry_run:
        return {"cells": []}
    summary = train_cells(study, index, cells, make_workers(workers))
    print(study_text(summary))
    if any(cell["n"] for cell in summary["cells"]):
        for picture in draw_study(folder):
            print(f"Picture: {picture}")
        print(f"A page with all of it: {shlex.join(['finetune101', 'report', str(folder)])}")
    return summary


def run_search(config: TrainConfig, space: Space, options: SearchOptions, table: Path, plots: Path) -> int:
    """Searches ``space`` from the settings ``config`` on, and prints the ranking.

    ``table`` gets the original's list of results, a folder in ``plots`` the curves. Returns 1 where a point failed by
    a fault of the program or the machine, else 0. Raises Refused for what cannot work.
    """
    from finetune101.experiments import outcome, search
    from finetune101.experiments.folders import check_kind
    from finetune101.experiments.search_plan import check_plan, make_plan
    from finetune101.experiments.workers import make_workers
    from finetune101.reports.figures import draw_curves

    plan = make_plan(config, space, options)
    check_plan(plan)
    check_kind(plan.folder, "search")
    ensure_data(config.data)
    if options.dry_run:
        print(outcome.dry_run(plan))
        return 0
    plots /= plots_folder(config)
    return search.run_search(plan, table, plots, draw_curves, make_workers(options))


def run_comparison(groups: Sequence[Group], out: Path | None) -> Comparison:
    """Prints the comparisons of every two groups; writes comparison.json and comparison.png into ``out``.

    Returns the first comparison.
    """
    from finetune101.files import write_json
    from finetune101.reports import compare as comparing
    from finetune101.reports.comparison import comparison_text
    from finetune101.reports.pages import draw_groups

    comparisons = comparing.all_pairs(groups)
    print("\n\n".join(comparison_text(one) for one in comparisons))
    if out is not None:
        draw_groups(comparisons, groups, out / "comparison.png")
        write_json(out / "comparison.json", comparing.comparison_json(comparisons, out))
        page = shlex.join(["finetune101", "report", str(out)])
        print(f"Picture: {out / 'comparison.png'}. A page with all of it: {page}")
    return comparisons[0]
