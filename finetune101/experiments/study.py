"""The whole study: seeds x splits x arms x networks x training sizes, each an ordinary run; resumable."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune101.config import TrainConfig, to_dict
from finetune101.data.images import Index
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import has_frozen_backbone
from finetune101.experiments.costs import features_cached, mean_seconds
from finetune101.experiments.folders import alone
from finetune101.experiments.plan import Cell, write_splits
from finetune101.experiments.runner import Ended, Epoch, Failed, Task, Workers, run_tasks
from finetune101.experiments.settings import StudyConfig
from finetune101.files import write_json
from finetune101.training import duration
from finetune101.training.duration import Counts, Work
from finetune101.training.job import sharing
from finetune101.training.resume import as_started, check_same


def run_study(study: StudyConfig, index: Index, cells: Sequence[Cell], workers: Workers) -> dict[str, Any]:
    """Trains and tests what is not done yet, seed by seed; writes study.json after every run and returns it.

    ``workers`` train as many runs at a time as they take. A run that fails, whatever of, stands in
    study.json with the reason, its traceback in error.log of its folder, and the others go on. Raises Refused where no
    first run of any cell can begin, as settings, images or weights are wrong.
    """
    folder = Path(study.runs) / study.exp
    order = [config for runs in zip(*(cell.runs for cell in cells), strict=True) for config in runs]
    failures: dict[str, Failed] = {}
    with alone(folder, "study"):
        if study.train_per_class:
            write_splits(study, index)
        left = [Task(config, is_tested=True) for config in order if not is_done(config)]
        write_json(folder / "study.json", summarise(study, cells, failures))  # an interrupted study has one as well
        ended, total = 0, sum(max(task.config.optim.epochs, 1) for task in left)
        with tqdm(total=total, desc=study.exp, unit="epoch", dynamic_ncols=True) as bar:
            for event in run_tasks(left, workers):
                if isinstance(event, Epoch) and event.record["epoch"]:
                    bar.update()
                elif isinstance(event, Ended | Failed):
                    ended += 1
                    exp = event.task.config.exp
                    if isinstance(event, Failed):
                        failures[exp] = event
                        bar.total -= event.task.config.optim.epochs - len(event.task.run.metrics())
                        refused = [f for f in failures.values() if f.kind == "Refused" and not f.begun]
                        if len(left) == len(order) and ended == len(refused) >= len(cells):  # none can begin
                            raise Refused(refused[0].message)
                    tqdm.write(f"{exp}: {_result_text(event)}", file=sys.stdout)
                    bar.set_postfix_str(f"run {len(order) - len(left) + ended} of {len(order)}", refresh=False)
                    write_json(folder / "study.json", summarise(study, cells, failures))
                if sys.stderr.isatty():  # in a log file every refresh would be a line
                    bar.refresh()
    return summarise(study, cells, failures)


def _result_text(event: Ended | Failed) -> str:
    if isinstance(event, Failed):
        return f"failed: {event}"
    result = event.task.run.read_json("test.json")
    frozen = "; frozen backbone: only the output layer was trained" if result.get("frozen_backbone") else ""
    return f"{result['top1']:.2f} % of {result['n']} test images{frozen}"


def is_done(config: TrainConfig) -> bool:
    """Whether the run of ``config`` is trained and tested. Raises Refused when it had other settings."""
    task = Task(config, is_tested=True)
    if task.run.has("config.json"):
        try:
            check_same(task.run, as_started(config, task.run))
        except Refused as error:
            raise Refused(f"{error}; or give the study another --exp") from error
    return task.is_done()


def summarise(study: StudyConfig, cells: Sequence[Cell], failures: Mapping[str, Failed]) -> dict[str, Any]:
    """What study.json holds: the settings and, for each cell, means and standard deviations over its finished runs."""
    rows = []
    tasks = {cell.folder: [Task(config, is_tested=True) for config in cell.runs] for cell in cells}
    tested = {folder: [task.run for task in own if task.is_done()] for folder, own in tasks.items()}
    cached = features_cached(itertools.chain.from_iterable(tested.values()))
    for cell in cells:
        done = tested[cell.folder]
        row: dict[str, Any] = {"model": cell.model, "arm": cell.arm, "size": cell.size, "folder": cell.folder}
        row |= {"n": len(done), "planned": len(cell.runs), "seconds": None}
        for key in ("top1", "mean_per_class"):
            values = [run.read_json("test.json")[key] for run in done]
            row[key] = statistics.mean(values) if values else None
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        if done:
            row["seconds"] = mean_seconds(done, cached)
        row["frozen"] = sum(has_frozen_backbone(r.config(), r.read_json("test.json").get("epoch")) for r in done)
        failed = {c.exp: failures[c.exp] for c in cell.runs if c.exp in failures}
        row["errors"] = [str(failure) for failure in failed.values()]
        row["failed"] = [{"run": exp, "type": f.kind, "message": f.message} for exp, f in failed.items()]
        rows.append(row)
    return {"settings": to_dict(study), "cells": rows}


def estimate(index: Index, cells: Sequence[Cell], jobs: int = 1, budget: float = 15.0) -> str:
    """How many runs there are, and how long those take that are not done; measuring takes ``budget`` seconds at most.

    Writes nothing.
    """
    runs = [config for cell in cells for config in cell.runs]
    left = [config for config in runs if not is_done(config)]
    text = f"{len(runs)} run{'s' * (len(runs) != 1)}, {len(left)} to do"
    if not left:
        return f"{text}."
    sizes = {config.exp: cell.size for cell in cells for config in cell.runs}
    counts = {size: _counts(index, cell) for size, cell in {cell.size: cell for cell in cells}.items()}
    shared = [sharing(config, jobs) if jobs > 1 else config for config in left]
    works = [Work(config, counts[sizes[config.exp]], tested=True) for config in shared]
    return f"{text}. {duration.duration_text(works, index, jobs, budget)}"


def _counts(index: Index, cell: Cell) -> Counts:
    """How many images the runs of ``cell`` train on, validate and test, without making the split."""
    data = cell.runs[0].data
    if cell.size is None:
        return duration.count(index, data)
    images = duration.count(
        index, dataclasses.replace(data, split=None, protocol="standard", train_per_class=cell.size)
    )
    return dataclasses.replace(images, train=cell.size * len(index.classes), val=0)


def study_text(summary: dict[str, Any]) -> str:
    """The cells as lines for a terminal."""
    lines = [f"{'network':22}{'arm':10}{'per class':>10}  {'top-1':17}{'mean per class':17}runs"]
    for c in summary["cells"]:
        scores = [
            "–"
            if c[key] is None
            else f"{c[key]:.2f}" + (f" ± {c[f'{key}_sd']:.2f}" if c[f"{key}_sd"] is not None else "")
            for key in ("top1", "mean_per_class")
        ]
        size = "all" if c["size"] is None else str(c["size"])
        frozen = f", frozen backbone in {c['frozen']}" if c.get("frozen") else ""
        runs = f"{c['n']} of {c['planned']}{frozen}"
        lines.append(f"{c['model']:22}{c['arm']:10}{size:>10}  {scores[0]:17}{scores[1]:17}{runs}")
    if any(c.get("frozen") for c in summary["cells"]):
        lines.append("frozen backbone: only the output layer of the tested weights was trained")
    return "\n".join(lines + [f"failed: {error}" for c in summary["cells"] for error in c["errors"]])
