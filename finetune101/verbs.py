"""Verbs beyond one run: ``study`` makes several, ``compare`` and ``report`` read them, ``lr-find`` comes before."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune101.arguments import (
    CompareArguments,
    EnsembleArguments,
    LrFindArguments,
    ReportArguments,
    StudyArguments,
    parse,
    parse_train,
)
from finetune101.cli import ensure_data, score_text
from finetune101.config import DataConfig, StudyConfig, TrainConfig
from finetune101.errors import Refused

if TYPE_CHECKING:
    from finetune101.analysis.compare import Comparison
    from finetune101.analysis.groups import Group


def ensemble(argv: Sequence[str]) -> int:
    """``finetune101 ensemble``."""
    a = parse(EnsembleArguments, argv, prog="finetune101 ensemble")
    from finetune101.evaluation.ensemble import ensemble as score
    from finetune101.runs import open_run

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

    from finetune101.analysis.figures import range_test as draw
    from finetune101.training.lr_find import range_test
    from finetune101.training.prepare import prepare

    ensure_data(arguments.config)
    with TemporaryDirectory() as runs:  # a job has a run, which nobody needs afterwards
        job = prepare(dataclasses.replace(arguments.config, runs=runs))
        found = range_test(job, arguments.low, arguments.high, arguments.steps)
    print(f"Picture: {draw(found.rates, found.losses, found.suggestion, found.lowest, Path(arguments.out))}")
    print(f"--lr {found.suggestion:.2g}: {found.reason}.")
    return 0


def compare(argv: Sequence[str]) -> int:
    """``finetune101 compare``."""
    arguments = parse(CompareArguments, argv, prog="finetune101 compare")
    from finetune101.analysis.groups import open_group
    from finetune101.analysis.report import finished, progress_of, study_folder, study_groups
    from finetune101.runs import check_folder

    check_folder(Path(arguments.out))
    names = arguments.groups
    folder = study_folder(names[0], arguments.runs) if len(names) == 1 else None
    if folder:
        cells, (done, planned) = finished(folder), progress_of(folder)
        network, *others = dict.fromkeys(cell["model"] for cell in cells)
        size = max(cell["size"] or 0 for cell in cells)
        also = f"; {', '.join(others)}: finetune101 report {folder}" if others else ""
        print(f"{network}{f', {size} training images per class' if size else ''}{also}")
        if done < planned:
            print(f"{done} of {planned} runs are done")
        print()
    found = study_groups(folder) if folder else [open_group(name, arguments.runs) for name in names]
    run_comparison(found, Path(arguments.out))
    return 0


def run_comparison(groups: Sequence[Group], out: Path) -> Comparison:
    """Prints the comparisons of every two groups, writes comparison.json and comparison.png; returns the first."""
    from finetune101.analysis import compare as comparing
    from finetune101.analysis.report import progress
    from finetune101.files import write_json

    found = comparing.all_pairs(groups)
    print("\n\n".join(comparing.text(one) for one in found))
    progress(found, groups, out / "comparison.png")
    write_json(out / "comparison.json", comparing.to_json(found, out))
    print(f"Picture: {out / 'comparison.png'}. A page with all of it: finetune101 report {out}")
    return found[0]


def report(argv: Sequence[str]) -> int:
    """``finetune101 report``."""
    a = parse(ReportArguments, argv, prog="finetune101 report")
    search = next((p for p in (Path(a.target), Path(a.runs) / a.target) if (p / "search.json").is_file()), None)
    if search:
        from finetune101.analysis.search_report import report as explain

        page = explain(search, out=Path(a.out), lang=a.lang)
    else:
        from finetune101.analysis.report import report as make

        page = make(a.target, Path(a.out), runs=a.runs, lang=a.lang, gallery=a.gallery, data=a.data)
    print(f"Report: {page} ({page.stat().st_size / 1e6:.2f} MB), also as {page.with_suffix('.md')}")
    return 0


def study(argv: Sequence[str]) -> int:
    """``finetune101 study``; 1 when a run failed."""
    arguments = parse(StudyArguments, _lists(argv), prog="finetune101 study")
    config: StudyConfig = arguments.study
    if arguments.jobs < 1:
        raise Refused(f"--jobs is {arguments.jobs}; give at least 1")
    from finetune101 import experiment
    from finetune101.analysis.report import draw_study
    from finetune101.data import dataset
    from finetune101.training.duration import nothing_kept

    ensure_data(TrainConfig(exp=config.exp, data=DataConfig(root=config.data)))
    layout: Literal["classes", "folders"] = "folders" if config.protocol == "folders" else "classes"
    index = dataset.index(dataset.find(config.data), layout)
    cells = experiment.plan(config, index)
    with nothing_kept() if arguments.dry_run else contextlib.nullcontext():
        print(experiment.estimate(index, cells, arguments.jobs, 10 if arguments.dry_run else 60), flush=True)
    failed = False
    if not arguments.dry_run:
        try:
            summary = experiment.run(config, index, cells, arguments.jobs)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from the last epochs", file=sys.stderr)
            return 130
        print(experiment.text(summary))
        folder = Path(config.runs) / config.exp
        if any(cell["n"] for cell in summary["cells"]):
            for picture in draw_study(folder):
                print(f"Picture: {picture}")
            print(f"A page with all of it: {shlex.join(['finetune101', 'report', str(folder)])}")
        failed = any(cell["errors"] for cell in summary["cells"])
    return int(failed)


def _lists(argv: Sequence[str]) -> list[str]:
    """Lists may have commas: --train-per-class 1,2,5 is --train-per-class 1 2 5."""
    words: list[str] = []
    flag = ""
    for word in argv:
        flag = word if word.startswith("--") else flag
        listed = flag.replace("_", "-") in ("--train-per-class", "--models", "--arms")
        words += [part for part in word.split(",") if part] if listed else [word]
    return words
