"""A search from the command line: progress, ranking, finalists, and the files that it leaves."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import yaml
from tqdm import tqdm

from finetune101.config import change, from_dict, to_dict
from finetune101.data.images import find_data, index_images
from finetune101.data.layouts import layout_for
from finetune101.errors import Refused, escaped, shortened
from finetune101.experiments import queue as studies
from finetune101.experiments.processes import check_kind
from finetune101.experiments.queue import Plan
from finetune101.experiments.space import SEARCHED, Point, point_label
from finetune101.experiments.trial import FINISHED, is_finished, split_hash
from finetune101.experiments.workers import alone, run_workers
from finetune101.files import FORMAT, atomic, write_json
from finetune101.run import Run, file_name
from finetune101.training import duration
from finetune101.training.job import sharing
from finetune101.training.resume import essence

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """A time such as 90s, 30m or 2h in seconds. Raises Refused for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not match:
        raise Refused(f"--timeout {text} is no time; write it like 90s, 30m or 2h")
    return float(match[1]) * UNITS[match[2]]


class Progress:
    """A bar over the trials, with the best score so far."""

    def __init__(self, plan: Plan, words: str) -> None:
        total = len(plan.queue())
        self.bar = tqdm(
            total=total, desc=f"{plan.base.exp}{words}", unit="trial", dynamic_ncols=True, mininterval=0.5, smoothing=0
        )

    def __call__(self, study: optuna.Study, record: dict[str, Any] | None) -> None:
        """Brings the bar to where ``study`` stands; ``record`` is the epoch that just ended, if this process saw it."""
        done = study.get_trials(deepcopy=False, states=FINISHED)
        if not self.bar.n and record is None:  # what earlier commands trained tells nothing of the time left
            self.bar.initial = self.bar.n = min(len(done), self.bar.total)
        fine = [t.user_attrs for t in done if "error" not in t.user_attrs]
        scores = [attrs["best_val_top1"] for attrs in fine if attrs.get("best_val_top1") is not None]
        told = [f"best {max(scores):.2f} %"] if scores else []
        self.bar.set_postfix_str(", ".join([*told, *([f"epoch {record['epoch']}"] if record else [])]), refresh=False)
        self.bar.update(min(len(done), self.bar.total) - self.bar.n)


Draw = Callable[[list[dict[str, Any]], Path, str], Any]


def run_search(plan: Plan, table: Path, plots: Path, draw: Draw, finalists: int = 0, seeds: int = 3) -> int:
    """Trains what is missing of ``plan``, prints the ranking and writes all results, also when it is interrupted.

    ``table`` gets the original's form, ``plots`` the curves of every trial, drawn by ``draw`` (records, file, title).
    Returns 1 where a point failed by a fault of the program or the machine, else 0. Raises Refused for a plan, data or
    weights that cannot work.
    """
    studies.check_plan(plan)
    if finalists < 0 or seeds < 1:
        raise Refused(f"--finalists {finalists} --seeds {seeds} cannot be; give 0 or more, and at least 1 seed")
    with alone(plan):
        _check_same(plan)
        print(estimate(plan, finalists, seeds), flush=True)
        started, best = time.perf_counter(), None
        study = studies.open_study(plan)
        before = _training_seconds(plan, study)
        try:
            _run(plan, "")
            entries = studies.results(plan, study)
            if finalists and any(entry["state"] == "complete" for entry in entries):
                last = studies.finals(plan, entries, finalists, seeds)
                best = studies.averages(studies.results(last, _run(last, " finalists")))
        finally:
            entries = studies.results(plan, study)
            if entries:
                trained = _training_seconds(plan, study) - before
                took = {"wall_seconds": time.perf_counter() - started, "training_seconds": trained} if trained else None
                write_search(plan, entries, best, took, table)
                draw_curves(plan, entries, plots, draw)
    print_ranking(plan, entries, best, table, studies.unfinished(study))
    return int(any(entry["trace"] is not None for entry in entries))


def _check_same(plan: Plan) -> None:
    """Raises Refused where the folder holds the results of a search with other settings beside the space."""
    if not (plan.folder / "search.json").is_file():
        return
    file, saved = plan.folder / "search.json", Run(plan.folder).read_json("search.json")
    lists = [isinstance(saved.get(name, []), list) for name in ("commands", "finalists")]
    if "base" not in saved or not all(lists):
        what = "lacks base" if all(lists) else "has commands or finalists that are no list"
        raise Refused(f"{file} {what}; remove it and give the command again, it finds the runs")
    before, now = essence(from_dict(saved["base"], f"{file}, base,")), essence(plan.base)
    searched = {SEARCHED[name][:2] for name in {*saved["space"], *plan.space} if name in SEARCHED}
    for part, fields in now.items():
        for name, value in fields.items():
            old = before[part][name]
            if old != value and (part, name) not in {*searched, ("system", "seed")}:
                raise Refused(
                    f"{plan.folder} holds a search with {name} {old}, not {value}; give this one another --exp"
                )
    split = saved.get("split")
    if split and split != split_hash(plan.base.data):
        raise Refused(f"{plan.folder} holds a search on another split of the images; give this one another --exp")


def _run(plan: Plan, words: str) -> optuna.Study:
    progress = Progress(plan, words)
    try:
        return run_workers(plan, progress)
    finally:
        progress.bar.close()


def _training_seconds(plan: Plan, study: optuna.Study) -> float:
    return sum(float(trial.user_attrs.get("seconds", 0)) for trial in study.get_trials(deepcopy=False, states=FINISHED))


def write_search(
    plan: Plan,
    entries: list[dict[str, Any]],
    best: list[dict[str, Any]] | None,
    took: dict[str, float] | None,
    table: Path,
) -> None:
    """Writes ``table``, search.json and the winner's recipe."""
    file = plan.folder / "search.json"
    saved = Run(plan.folder).read_json("search.json") if file.is_file() else {}
    name = studies.study_name(plan)
    commands = saved.get("commands", []) if saved.get("study") == name else []
    winner = next((e for e in best or entries if e.get("state") == "complete" or e.get("mean") is not None), None)
    value = {
        "study": name,
        "base": to_dict(plan.base),
        "split": split_hash(plan.base.data),
        "space": studies.described(plan.space),
        "sampler": plan.sampler,
        "pruner": plan.pruner,
        "points": len(plan.queue()),
        "chosen_by": "mean validation accuracy over seeds" if best else "validation accuracy",
        "winner": winner and {"point": winner["point"], "run": winner["run"]},
        "results": entries,
        "finalists": best or (saved.get("finalists", []) if commands else []),
        "commands": [*commands, *([took] if took else [])],
    }
    if json.loads(json.dumps(value)) != saved:
        write_json(file, value)
    rows = [[entry["point"], entry["best_val_top1"]] for entry in entries]
    if not _holds(table, rows):
        write_json(table, rows)
    if winner:
        write_recipe(plan, winner)


def draw_curves(plan: Plan, entries: list[dict[str, Any]], plots: Path, draw: Draw) -> None:
    """Draws the curves of every trial into ``plots`` that are not drawn yet."""
    for entry in entries:
        source = Run(Path(entry["run"])) if entry["run"] else None
        if source and source.has("metrics.jsonl"):
            out = plots / picture_name(plan, entry["point"], source)
            if not out.is_file() or out.stat().st_mtime < (source.path / "metrics.jsonl").stat().st_mtime:
                draw(source.metrics(), out, shortened(point_label(entry["point"]), 90))


def _holds(file: Path, value: Any) -> bool:
    """Whether the JSON file ``file`` is there, whole, and holds ``value``."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(value)))
    except (OSError, ValueError, RecursionError):  # missing or damaged: it is written anew
        return False


def picture_name(plan: Plan, point: Point, run: Run) -> str:
    """The file name of the curves of ``run``: its settings where they are short, and its hash."""
    settings = re.sub(r"[^A-Za-z0-9=.,+-]", "-", point_label(point))
    exp, middle = file_name(plan.base.exp)[:60], f"{settings}_" if len(settings) <= 100 else ""
    return f"{exp}_{middle}{run.name[:6] if middle else run.name}.png"


def write_recipe(plan: Plan, winner: dict[str, Any]) -> Path:
    """Writes the winner's settings as a file for ``train --config``."""
    out = plan.folder / "winner.yaml"
    score = winner.get("mean", winner.get("best_val_top1"))
    text = (
        f"# Found by a search of {plan.base.exp}: {escaped(point_label(winner['point']))}, "
        f"{score or 0:.2f} % on validation images.\n"
    )
    text += f"# {train_command(plan)}\n"
    text += yaml.safe_dump({"format": FORMAT, **studies.recipe(plan.base, winner["point"])}, sort_keys=False)
    if not out.is_file() or out.read_text(encoding="utf-8") != text:
        with atomic(out) as part:
            part.write_text(text, encoding="utf-8")
    return out


def train_command(plan: Plan) -> str:
    """How the winner is trained, on the images of the search."""
    root = plan.base.data.root
    where = f" --data {shlex.quote(root)}" if root else ""
    return f"finetune101 train --config {shlex.quote(str(plan.folder / 'winner.yaml'))} --exp NAME{where}"


def print_ranking(
    plan: Plan, entries: list[dict[str, Any]], best: list[dict[str, Any]] | None, table: Path, left: int
) -> None:
    """Prints the ranking and where everything is."""
    if left:
        print(f"\n{left} of {len(plan.queue())} points are left; the same command goes on.")
    if not entries:
        return
    print(f"\nRanking of {len(entries)} point{'s' * (len(entries) != 1)} by validation accuracy ({table}):")
    for rank, entry in enumerate(entries[:10], 1):
        trace = f" (a fault of the program or the machine: {entry['trace']})" if entry.get("trace") else ""
        score = f"failed: {entry['error']}{trace}" if entry["error"] else f"{entry['best_val_top1']:.2f} %"
        stopped = f", stopped after epoch {entry['epochs']}" if entry["state"] == "pruned" else ""
        print(f"{rank:3d}. {score}{stopped}  " + "  ".join(f"{k} {v}" for k, v in entry["point"].items()))
    for rank, entry in enumerate(best or [], 1):
        sd = f" ± {entry['sd']:.2f}" if entry["sd"] is not None else ""
        failed = f", {entry['failed']} of them failed" if entry["failed"] else ""
        mean, seeds = entry["mean"] or 0, len(entry["seeds"])
        print(f"finalist {rank}: {mean:.2f}{sd} % over {seeds} seeds{failed}  {point_label(entry['point'])}")
    if any(entry["state"] == "complete" for entry in entries):
        print(f"Train the winner: {train_command(plan)}")
    print(f"What the search saw: {shlex.join(['finetune101', 'search', 'report', str(plan.folder)])}")


def dry_run(plan: Plan) -> str:
    """What ``plan`` would do, and about how long; a few steps on noise tell, and nothing is written."""
    studies.check_plan(plan)
    check_kind(plan.folder, "search")
    with duration.nothing_kept():
        _check_same(plan)
        return estimate(plan, budget=10.0)


def estimate(plan: Plan, finalists: int = 0, seeds: int = 1, budget: float = 15.0) -> str:
    """How many trials of ``plan`` there are, and how long those take that are not finished.

    Measuring takes ``budget`` seconds at most. Writes nothing. Raises Refused for data, networks or sizes that cannot
    be.
    """
    queue = plan.queue()
    finished = []
    for file in sorted(plan.folder.glob("*/config.json")):
        with contextlib.suppress(Refused):  # damaged: told when its turn comes
            run = Run(file.parent)
            finished += [config for config in [run.config()] if is_finished(run, config)]
    done = {json.dumps(essence(config)) for config in finished}
    configs = [change(plan.base, point) for point in queue]
    left = [config for config in configs if json.dumps(essence(config)) not in done]
    if plan.sampler != "grid":
        left = left[min(len(finished), len(left)) :]
    text = f"{len(queue)} trial{'s' * (len(queue) != 1)}, {len(queue) - len(left)} of them finished"
    if not left:
        return f"{text}: nothing to do."
    left += [plan.base] * (min(finalists, len(queue)) * (seeds - 1))
    data = plan.base.data
    index = index_images(find_data(data.root), layout_for(data.protocol))
    images = duration.count(index, data)
    works = [duration.Work(sharing(config, plan.jobs) if plan.jobs > 1 else config, images) for config in left]
    less = "" if plan.pruner == "none" else " Less what the pruner saves."
    drawn = "" if plan.sampler == "grid" else " Points that are drawn may take other times than the base."
    epochs = sum(config.optim.epochs for config in left)
    return (
        f"{text}; {epochs} epochs of {images.train} training images are left. "
        f"{duration.duration_text(works, index, plan.jobs, budget)}{less}{drawn}"
    )
