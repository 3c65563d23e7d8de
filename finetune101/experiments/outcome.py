"""What a search leaves: search.json, the ranking, the winner's recipe, curves; and what it is going to take."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetune101.config import TrainConfig, change, from_dict, to_dict
from finetune101.data.images import find_data, index_images
from finetune101.data.layouts import layout_for
from finetune101.errors import Refused, shortened
from finetune101.experiments.folders import check_kind
from finetune101.experiments.point_run import recipe_of, split_hash
from finetune101.experiments.runner import Task
from finetune101.experiments.search_plan import ETA, Plan, check_plan
from finetune101.experiments.space import SEARCHED, Point, described, point_label, value_text
from finetune101.experiments.stage import shortened_schedule
from finetune101.files import FORMAT, atomic, write_json
from finetune101.run import Run, file_name
from finetune101.training import duration
from finetune101.training.job import sharing
from finetune101.training.resume import essence

Draw = Callable[[list[dict[str, Any]], Path, str], Any]


def check_same(plan: Plan) -> None:
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


@dataclass(frozen=True)
class Outcome:
    """What a search knows: entries of the points, best first; of the finalists; of the output layer alone."""

    entries: list[dict[str, Any]]
    finalists: list[dict[str, Any]]
    probe: dict[str, Any] | None = None

    @property
    def winner(self) -> dict[str, Any] | None:
        """The best finalist, else the best point, unless the output layer alone is better; None before any ended."""
        complete = [entry for entry in self.entries if entry["state"] == "complete"] or self.entries
        averaged = [entry for entry in self.finalists if entry["mean"] is not None]
        ranked = averaged or [entry for entry in complete if entry["error"] is None]
        probe = self.probe if self.probe and self.probe["error"] is None else None
        best = ranked[0] if ranked else probe
        return probe if probe and best and score_of(probe) > score_of(best) else best


def score_of(entry: dict[str, Any]) -> float:
    """The validation accuracy (%) of an entry: a mean over seeds, or one run's."""
    return float(entry.get("mean", entry.get("best_val_top1")) or 0.0)


def write_search(plan: Plan, name: str, outcome: Outcome, took: dict[str, float] | None, table: Path) -> None:
    """Writes ``table``, search.json and the winner's recipe; ``name`` is that of the Optuna study."""
    file = plan.folder / "search.json"
    saved = Run(plan.folder).read_json("search.json") if file.is_file() else {}
    commands = saved.get("commands", []) if saved.get("study") == name else []
    winner = outcome.winner
    value = {
        "study": name,
        "base": to_dict(plan.base),
        "split": split_hash(plan.base.data),
        "space": described(plan.space),
        "sampler": plan.sampler,
        "pruner": plan.pruner,
        "points": len(plan.points()) if plan.sampler == "grid" or not plan.budget else len(outcome.entries),
        "chosen_by": "mean validation accuracy over seeds" if outcome.finalists else "validation accuracy",
        "winner": winner and {"point": winner["point"], "run": winner["run"]},
        "results": outcome.entries,
        "finalists": outcome.finalists,
        "commands": [*commands, *([took] if took else [])],
    }
    if outcome.probe:
        value["probe"] = outcome.probe
    if json.loads(json.dumps(value)) != saved:
        write_json(file, value)
    rows = [[entry["point"], entry["best_val_top1"]] for entry in outcome.entries]
    if not _holds(table, rows):
        write_json(table, rows)
    if winner:
        write_recipe(plan, winner, plan.probe if winner is outcome.probe and plan.probe else plan.base)


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


def write_recipe(plan: Plan, winner: dict[str, Any], base: TrainConfig) -> Path:
    """Writes the winner's settings, ``base`` with its point, as a file for ``train --config``."""
    out = plan.folder / "winner.yaml"
    point = point_label(winner["point"]) or "the output layer alone"
    text = f"# Found by a search of {plan.base.exp}: {point}, {score_of(winner):.2f} % on validation images.\n"
    text += f"# {train_command(plan)}\n"
    text += yaml.safe_dump({"format": FORMAT, **recipe_of(base, winner["point"])}, sort_keys=False)
    if not out.is_file() or out.read_text(encoding="utf-8") != text:
        with atomic(out) as part:
            part.write_text(text, encoding="utf-8")
    return out


def train_command(plan: Plan) -> str:
    """How the winner is trained, on the images of the search."""
    root = plan.base.data.root
    where = f" --data {shlex.quote(root)}" if root else ""
    return f"finetune101 train --config {shlex.quote(str(plan.folder / 'winner.yaml'))} --exp NAME{where}"


def print_ranking(plan: Plan, outcome: Outcome, table: Path, left: int) -> None:
    """Prints the ranking and where everything is; ``left`` points are not done."""
    if left:
        print(
            f"\n{left} of {max(left, len(plan.points()))} points are left; the same command goes on."
            if not plan.budget
            else f"\n{left} run{'s' * (left != 1)} did not end in time; the same command goes on."
        )
    if plan.budget and plan.sampler == "grid" and (late := len(plan.points()) - len(outcome.entries)):
        print(f"\n{late} of the grid's {len(plan.points())} points had no time; the same command trains them.")
    if outcome.probe and not outcome.probe["error"]:
        print(f"\nThe output layer alone, on frozen features: {score_of(outcome.probe):.2f} %")
    if not outcome.entries:
        return
    count = len(outcome.entries)
    print(f"\nRanking of {count} point{'s' * (count != 1)} by validation accuracy ({table}):")
    for rank, entry in enumerate(outcome.entries[:10], 1):
        trace = f" (a fault of the program or the machine: {entry['trace']})" if entry.get("trace") else ""
        score = f"failed: {entry['error']}{trace}" if entry["error"] else f"{entry['best_val_top1']:.2f} %"
        stopped = f", stopped after epoch {entry['epochs']}" if entry["state"] == "pruned" else ""
        print(f"{rank:3d}. {score}{stopped}  " + "  ".join(f"{k} {value_text(v)}" for k, v in entry["point"].items()))
    for rank, entry in enumerate(outcome.finalists, 1):
        sd = f" ± {entry['sd']:.2f}" if entry["sd"] is not None else ""
        failed = f", {entry['failed']} of them failed" if entry["failed"] else ""
        seeds = len(entry["seeds"])
        print(f"finalist {rank}: {score_of(entry):.2f}{sd} % over {seeds} seeds{failed}  {point_label(entry['point'])}")
    if outcome.winner:
        if outcome.winner is outcome.probe:
            print("No fine-tuned point is better than the output layer alone: the winner is the output layer alone.")
        print(f"Train the winner: {train_command(plan)}")
    print(f"What the search saw: {shlex.join(['finetune101', 'search', 'report', str(plan.folder)])}")


def dry_run(plan: Plan) -> str:
    """What ``plan`` would do, and about how long; a few steps on noise tell, and nothing is written."""
    check_plan(plan)
    check_kind(plan.folder, "search")
    with duration.nothing_kept():
        check_same(plan)
        return estimate(plan, seconds=10.0)


def estimate(plan: Plan, seconds: float = 15.0) -> str:
    """How many points ``plan`` has, and how long those take that are not finished.

    Measuring takes ``seconds`` at most. Writes nothing. Raises Refused for data, networks or sizes that cannot be.
    """
    if plan.budget:
        return budget_text(plan)
    points = plan.points()
    finished = []
    for file in sorted(plan.folder.glob("*/config.json")):
        with contextlib.suppress(Refused):  # damaged: told when its turn comes
            config = Run(file.parent).config()
            finished += [config] if Task(replace(config, runs=str(plan.folder), exp=file.parent.name)).is_done() else []
    done = {json.dumps(essence(config)) for config in finished}
    configs = [change(plan.base, point) if point else plan.base for point in points]
    if plan.sampler == "grid":
        left = [config for config in configs if json.dumps(essence(config)) not in done]
    else:
        left = configs[min(len(finished), len(configs)) :]
    text = f"{len(points)} trial{'s' * (len(points) != 1)}, {len(points) - len(left)} of them finished"
    if not left:
        return f"{text}: nothing to do."
    rungs = plan.shares()
    promoted = left[: math.ceil(len(left) / ETA)] if len(rungs) > 1 else []
    ran = [shortened_schedule(config, rungs[0]) for config in left] + promoted
    ran += [plan.base] * (min(plan.finalists, len(points)) * (plan.seeds - 1))
    data = plan.base.data
    index = index_images(find_data(data.root), layout_for(data.protocol))
    images = duration.count(index, data)
    works = [duration.Work(sharing(config, plan.jobs) if plan.jobs > 1 else config, images) for config in ran]
    less = " Less what the pruner saves." if plan.pruner == "median" else ""
    drawn = "" if plan.sampler == "grid" else " Points that are drawn may take other times than the base."
    epochs = sum(config.optim.epochs for config in ran)
    return (
        f"{text}; {epochs} epochs of {images.train} training images are left. "
        f"{duration.duration_text(works, index, plan.jobs, seconds)}{less}{drawn}"
    )


def budget_text(plan: Plan) -> str:
    """What ``plan`` does with its budget, in words."""
    assert plan.budget is not None
    epochs = [shortened_schedule(plan.base, share).optim.epochs for share in plan.shares()]
    points = f"{len(plan.points())} points" if plan.sampler == "grid" or plan.trials else "as many points as fit"
    first = "first the output layer alone; then " if plan.probe else ""
    first += "the recipe as it is; then " if plan.first else ""
    most = "up to " if "epochs" in plan.space else ""
    rungs = f"{points}, {most}{epochs[0]} epoch{'s' * (epochs[0] != 1)} each"
    if len(epochs) > 1:
        rungs += f", and of every {ETA} the best one again with {epochs[1]}"
    seeds = f"; the best {plan.finalists} with {plan.seeds} seeds each" if plan.finalists else ""
    return f"Within {duration.in_words(plan.budget)}: {first}{rungs}{seeds}."
