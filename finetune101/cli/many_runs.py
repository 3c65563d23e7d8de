"""The verbs of several runs: study, search, ensemble, compare, report. A function's signature is its flags."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from finetune101.cli.console import watched
from finetune101.cli.parse import Flag, RecipeFile
from finetune101.config import Flat, TrainConfig
from finetune101.experiments.settings import USUAL_SEARCH, USUAL_WORKERS, SearchOptions, StudyConfig, WorkerOptions
from finetune101.experiments.space import planned_search

GOES_ON = "the same command goes on from the last epochs"


def ensemble(
    members: tyro.conf.Positional[tuple[str, ...]],
    *,
    subset: Literal["test", "val", "train"] = "val",
    out: str = "ensemble",
    mirror: Flag = False,
    data: str | None = None,
    batch_size: int = 64,
    runs: str = "runs",
) -> int:
    """Score the mean probabilities of several runs of one split.

    Args:
        members: Two or more runs (folder or name).
        subset: Which images: val chooses the members, test is for the end.
        out: Folder for test.json and predictions.csv.
        mirror: See each image and its mirror image, and take the mean.
        data: Where the images are, if not where the runs found them.
        batch_size: Images per step.
        runs: Folder of all runs.
    """
    from finetune101 import api

    evaluation = api.ensemble(members, out, subset=subset, data=data, batch_size=batch_size, mirror=mirror, runs=runs)
    print(evaluation)
    if evaluation.folder:
        print(f"Every prediction: {evaluation.folder / 'predictions.csv'}")
    return 0


def compare(
    groups: tyro.conf.Positional[tuple[str, ...]],
    *,
    evaluate: Flag = False,
    out: str = "comparison",
    runs: str = "runs",
) -> int:
    """Compare tested runs, or groups of runs that differ in seed and split, on the same test images.

    Args:
        groups: Two or more: runs (folder or name), folders that hold runs, quoted globs; or one study.
        evaluate: First score the runs that are not tested yet on their test images.
        out: Folder for comparison.json and comparison.png.
        runs: Folder of all runs.
    """
    from finetune101 import many_runs
    from finetune101.reports.groups import open_group
    from finetune101.reports.pages import study_folder, study_groups
    from finetune101.run import check_folder

    check_folder(Path(out))
    if evaluate:
        _evaluate_untested(groups, runs)
    folder = study_folder(groups[0], runs) if len(groups) == 1 else None
    if folder:
        _print_study(folder)
    sides = study_groups(folder) if folder else [open_group(name, runs) for name in groups]
    many_runs.run_comparison(sides, Path(out))
    return 0


def _evaluate_untested(names: tuple[str, ...], runs: str) -> None:
    """Scores the finished runs of ``names`` (runs, folders that hold runs, globs) on their test images, where not done.

    Raises Refused, before a test image is read, for a name without a run and for groups without a common split.
    """
    from finetune101 import api
    from finetune101.errors import Refused
    from finetune101.evaluation.tested import read_manifest
    from finetune101.reports.groups import open_group, run_folders
    from finetune101.run import Run

    below: dict[str, list[Run]] = {}
    for name in names:
        below[name] = [*map(Run, run_folders(name, runs))]
        if not below[name]:
            open_group(name, runs)  # which says what there is
    splits = [{read_manifest(run).hash() for run in own} for own in below.values() if own]
    if splits and not set.intersection(*splits):
        raise Refused(f"{' and '.join(names)} were not trained on the same split; compare runs of one split")
    for run in (run for own in below.values() for run in own):
        if not run.has("test.json") and not run.stopped():
            print(f"{run.path}\n{api.evaluate(run)}\n")


def _print_study(folder: Path) -> None:
    """Says which part of a study is compared, and what of it is not done or failed."""
    from finetune101.reports.pages import failures_of, finished_cells, progress_of

    cells, (done, planned) = finished_cells(folder), progress_of(folder)
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


def report(
    target: tyro.conf.Positional[str],
    *,
    out: str = "report",
    style: Literal["full", "assignment"] = "full",
    lang: Literal["en", "zh"] = "en",
    gallery: bool = True,
    explain: bool = True,
    data: str | None = None,
    search: str | None = None,
    runs: str = "runs",
) -> int:
    """Make one self-contained page about a tested run, a comparison, a study or a search.

    Args:
        target: A run (folder or name), or the folder that compare, study or search wrote.
        out: Folder for report.html, report.md and the pictures.
        style: assignment: a shorter page to print or to save as PDF, with what a lab report has to say.
        lang: Language of the page.
        gallery: Show example images; --no-gallery leaves them out, so that the images need not be there.
        explain: Show beside mistakes where the network looked, and the nearest training images (a pass of all of them).
        data: Where the images are, if not where the run found them.
        search: Of an assignment: folder or name of a search whose result it tells as well.
        runs: Folder of all runs.
    """
    from finetune101 import api

    page = api.report(
        target, out, style=style, lang=lang, gallery=gallery, explain=explain, data=data, search=search, runs=runs
    )
    print(f"Report: {page} ({page.stat().st_size / 1e6:.2f} MB), also as {page.with_suffix('.md')}")
    return 0


def study(
    study: Annotated[StudyConfig, Flat],
    workers: Annotated[WorkerOptions, Flat] = USUAL_WORKERS,
    *,
    dry_run: Flag = False,
) -> int:
    """What was pretraining worth? Trains and tests every arm, network, size, split and seed that is not done yet.

    The exit code is 1 when a run failed.

    Args:
        dry_run: Only say how many runs there are to do, and how long they take.
    """
    from finetune101 import many_runs

    folder = Path(study.runs) / study.exp
    with watched(folder, lambda: GOES_ON if not dry_run and folder.is_dir() else ""):
        summary = many_runs.run_study(study, workers, dry_run=dry_run)
    return int(any(cell["errors"] for cell in summary["cells"]))


def auto(
    data: tyro.conf.Positional[str],
    *,
    exp: str = "auto",
    budget: str = "30m",
    models: tuple[str, ...] = (),
    seed: int = 0,
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",
    runs: str = "runs",
    lang: Literal["en", "zh"] = "en",
) -> int:
    """Make the best network for your photos that fits into a time. It decides everything else, and says why.

    It looks at the images, splits them, tries the installed networks, searches the settings of
    fine-tuning, tests the winner once and writes a page. Ctrl-C at any time leaves the best network
    so far in RUNS/EXP, and the same command goes on.

    Args:
        data: Folder with one folder of images per class.
        exp: Name of the network: RUNS/EXP. What was tried is in RUNS/EXP_search.
        budget: The whole work ends within this time: 90s, 30m, 2h.
        models: Networks to choose from. Default: all whose ImageNet weights are installed.
        seed: Fixes everything random.
        device: Where to train.
        runs: Folder of all runs.
        lang: Language of the page.
    """
    from finetune101 import api

    with watched(Path(runs) / f"{exp}_search", lambda: _best_so_far(Path(runs) / exp)):
        api.auto(data, exp=exp, budget=budget, models=models, seed=seed, device=device, runs=runs, lang=lang)
    return 0


def _best_so_far(folder: Path) -> str:
    """What an interrupted ``auto`` leaves in ``folder``."""
    from finetune101.run import is_run

    ready = f"{folder} is the best network so far and can be used" if is_run(folder) else "there is no network yet"
    return f"{ready}; the same command goes on"


def search(
    config: Annotated[TrainConfig, Flat],
    options: Annotated[SearchOptions, Flat] = USUAL_SEARCH,
    *,
    recipe_file: RecipeFile = None,
) -> int:
    """Search hyper-parameters; stopped, the same command goes on. `search report DIR` explains what it saw.

    The exit code is 1 when a point failed by a fault of the program or the machine.

    Args:
        recipe_file: Start from a recipe file such as a search's winner.yaml.
    """
    folder = Path(config.runs) / config.exp
    return search_watched(config, options, folder / f"gridsearch_results_{folder.name}.json", folder)


def search_watched(
    config: TrainConfig, options: SearchOptions, table: Path, plots: Path, usual: Mapping[str, Any] | None = None
) -> int:
    """``many_runs.run_search``; the exit code. The settings are checked before anything heavy is imported.

    ``table`` gets the original's list of results, folders in ``plots`` the curves; ``usual`` is the space without
    --grid and --space.
    """
    config, space = planned_search(config, options, usual)
    from finetune101 import many_runs

    folder = Path(config.runs) / config.exp
    with watched(folder, lambda: GOES_ON if not options.dry_run and folder.is_dir() else ""):
        return many_runs.run_search(config, space, options, table, plots)


def search_report(
    folder: tyro.conf.Positional[str],
    *,
    pair: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    lang: Literal["en", "zh"] = "en",
) -> int:
    """Explain a search: one HTML page and pictures in DIR/report.

    Args:
        folder: Folder of the search: RUNS/EXP.
        pair: NAME,NAME: a heat map of these two. Repeat it. Default: learning rate and batch size.
        lang: Language of the page.
    """
    from finetune101.reports.search_page import write_search_report

    page = write_search_report(Path(folder), [tuple(names.split(",")) for names in pair], lang=lang)
    print(f"Page: {page}")
    return 0
