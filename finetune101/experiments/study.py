"""The whole study: seeds x splits x arms x networks x training sizes, each an ordinary run; resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune101.config import TrainConfig, to_dict
from finetune101.data.images import Index
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import has_frozen_backbone
from finetune101.evaluation.evaluate import evaluate
from finetune101.experiments.costs import features_cached, mean_seconds
from finetune101.experiments.plan import Cell, write_splits
from finetune101.experiments.processes import context, described, follow_parent, keep_trace, open_folder, stop
from finetune101.experiments.settings import StudyConfig
from finetune101.files import claim, write_json
from finetune101.redaction import LOG
from finetune101.run import Run
from finetune101.training import duration
from finetune101.training.duration import Counts, Work
from finetune101.training.job import prepare, sharing
from finetune101.training.log import log_records
from finetune101.training.loop import fit
from finetune101.training.resume import as_started, check_same


@dataclass(frozen=True)
class Failure:
    """Why a run has no result."""

    kind: str
    """Name of the exception, "Refused" for what the user can mend, "Killed" for a process that came to an end."""
    message: str
    """One line for people; it begins with ``kind`` but for "Refused"."""
    begun: bool
    """Whether anything of it was trained."""

    def __str__(self) -> str:
        return self.message


def run_study(study: StudyConfig, index: Index, cells: Sequence[Cell], jobs: int = 1) -> dict[str, Any]:
    """Trains and tests what is not done yet, seed by seed; writes study.json after every run and returns it.

    ``jobs`` runs at a time; the same command on other machines with the same folder shares the runs. A run that fails,
    whatever of, stands in study.json with the reason, its traceback in error.log of its folder, and the others go on.
    Raises Refused where no first run of any cell can begin, as settings, images or weights are wrong.
    """
    folder = Path(study.runs) / study.exp
    open_folder(folder, "study")
    if study.train_per_class:
        write_splits(study, index)
    failures: dict[str, Failure] = {}
    order = [config for runs in zip(*(cell.runs for cell in cells), strict=True) for config in runs]
    left = [config for config in order if not is_done(config)]
    ended = 0
    write_json(folder / "study.json", summarise(study, cells, failures))  # an interrupted study has one as well
    with tqdm(total=len(order), initial=len(order) - len(left), desc=study.exp, unit="run", dynamic_ncols=True) as bar:
        for config, result in _train_all(left, jobs, folder / "claims"):
            ended += 1
            if isinstance(result, Failure):
                failures[config.exp] = result
                refused = [f for f in failures.values() if f.kind == "Refused" and not f.begun]
                if len(left) == len(order) and ended == len(refused) >= len(cells):  # one of each, and none can begin
                    raise Refused(refused[0].message)
            tqdm.write(f"{config.exp}: {_told(result)}", file=sys.stdout)
            bar.update()
            write_json(folder / "study.json", summarise(study, cells, failures))
    return summarise(study, cells, failures)


def _told(result: dict[str, Any] | Failure) -> str:
    if isinstance(result, Failure):
        return f"failed: {result}"
    if not result:
        return "is being trained elsewhere"
    frozen = "; frozen backbone: only the output layer was trained" if result.get("frozen_backbone") else ""
    return f"{result['top1']:.2f} % of {result['n']} test images{frozen}"


Ended = tuple[TrainConfig, "dict[str, Any] | Failure"]


def _train_all(configs: Sequence[TrainConfig], jobs: int, claims: Path) -> Iterator[Ended]:
    """Each run with its test.json, {} for those that another process trains, or its failure; in the order they end."""
    if jobs == 1:
        for config in configs:
            yield config, _train(config, claims, quiet=not sys.stderr.isatty())  # one bar is enough in a log file
        return
    births, waiting = context(__name__), [(config, sharing(config, jobs)) for config in configs][::-1]
    running: dict[Any, tuple[TrainConfig, Any]] = {}  # by the pipe on which the process says how its run ended
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                config, shared = waiting.pop()
                said, say = births.Pipe(duplex=False)
                process = births.Process(target=_main, args=(shared, claims, say), name="study-worker")
                process.start()
                say.close()
                running[said] = config, process
            for ended in connection.wait(list(running)):
                config, process = running.pop(ended)
                try:
                    result = ended.recv()  # type: ignore[union-attr, call-arg]
                except EOFError:  # it was killed, as by the system when memory is short
                    process.join()
                    run = Run(Path(config.runs) / config.exp)
                    reason = (
                        f"Killed: its process ended with code {process.exitcode}; the same command goes on with the run"
                    )
                    result = Failure("Killed", reason, run.last.is_file())
                process.join()
                yield config, result  # type: ignore[misc]
    finally:
        stop([process for _, process in running.values()])


def _main(config: TrainConfig, claims: Path, say: Any) -> None:
    """A worker process: one run, so that whatever happens to it happens to that run alone."""
    follow_parent()
    with contextlib.suppress(KeyboardInterrupt):
        say.send(_train(config, claims, quiet=True))


def is_done(config: TrainConfig) -> bool:
    """Whether the run of ``config`` is trained and tested. Raises Refused when it had other settings."""
    run = Run(Path(config.runs) / config.exp)
    if run.has("config.json"):
        try:
            check_same(run, as_started(config, run))
        except Refused as error:
            raise Refused(f"{error}; or give the study another --exp") from error
    return _ended(run)


def _ended(run: Run) -> bool:
    """Whether ``run`` is trained to its last epoch and tested."""
    return run.has("test.json") and run.epochs_left() <= 0


def _train(config: TrainConfig, claims: Path, quiet: bool) -> dict[str, Any] | Failure:
    run = Run(Path(config.runs) / config.exp)
    lock = claims / (hashlib.sha256(config.exp.encode()).hexdigest()[:16] + ".lock")
    with claim(lock) as ours:
        if not ours:
            return {}
        if _ended(run):  # meanwhile, elsewhere
            return run.read_json("test.json")
        try:
            resume = run.has("config.json")
            job = prepare(as_started(config, run) if resume else config, resume=resume)
            for _ in log_records(job.run, fit(job, quiet=quiet)):
                pass
            result = evaluate(job.run)
        except Refused as error:
            return Failure("Refused", str(error), run.has("config.json"))
        except Exception as error:  # out of memory, or a fault of ours: kept, and the others go on
            text = f"{described(error)} (traceback: {keep_trace(run.path, error)})"
            return Failure(type(error).__name__, text, run.has("config.json"))
        job.run.last.unlink(missing_ok=True)  # a tested run is not continued, and a study has many
        (run.path / LOG).unlink(missing_ok=True)  # of an earlier try
        return result


def summarise(study: StudyConfig, cells: Sequence[Cell], failures: Mapping[str, Failure]) -> dict[str, Any]:
    """What study.json holds: the settings and, for each cell, means and standard deviations over its finished runs."""
    rows = []
    every = [Run(Path(config.runs) / config.exp) for cell in cells for config in cell.runs]
    cached = features_cached(run for run in every if _ended(run))
    for cell in cells:
        runs = [Run(Path(c.runs) / c.exp) for c in cell.runs]
        done = [run for run in runs if _ended(run)]
        row: dict[str, Any] = {"model": cell.model, "arm": cell.arm, "size": cell.size, "folder": cell.folder}
        row |= {"n": len(done), "planned": len(runs), "seconds": None}
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
