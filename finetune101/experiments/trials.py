"""What a search found: its trials with their curves, read from search.json and the folders of its runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune101.errors import Refused, escaped, shortened
from finetune101.experiments import space
from finetune101.experiments.replay import Curve
from finetune101.run import Run

LEVELS = 6  # more values than this are put into bins
REMEDY = "give the search's command again, it writes the file anew from its runs"


@dataclass(frozen=True)
class Trials:
    """The trials of a search that have a curve, and the settings that the search varied."""

    name: str
    settings: tuple[str, ...]
    curves: tuple[Curve, ...]
    failed: int
    images: int | None = None
    """Validation images; None where the winner's run is not in the folder."""
    winner: space.Point | None = None
    """What the search chose; None for the best trial."""
    finalists: int = 0
    """Points that were trained again with several seeds to choose the winner."""
    rungs: tuple[int, ...] = ()
    """The epochs of each schedule, where the best points alone went on to longer ones."""
    probe: float | None = None
    """Accuracy (%) of the output layer alone, where the search began with it."""
    untried: int = 0
    """Points of the grid that were not trained, as where the budget ended before."""
    is_probe_best: bool = False
    """Whether the winner is the output layer alone."""

    @property
    def best(self) -> Curve:
        """The winner."""
        chosen = [curve for curve in self.curves if curve.point == self.winner]
        return chosen[0] if chosen else max(self.curves, key=lambda curve: curve.best)

    @property
    def common(self) -> int | None:
        """The last epoch that all trials reached: trials are compared there. None where no trial was stopped early."""
        if self.rungs:
            return self.rungs[0]
        return None if len(self.complete) == len(self.curves) else min(len(curve.scores) for curve in self.curves)

    def score(self, curve: Curve) -> float:
        """What the trial is compared by: its best accuracy (%) up to the last common epoch, or on the first rung."""
        if curve.first_rung is not None:
            return curve.first_rung
        return max(curve.scores[: self.common])

    @property
    def complete(self) -> tuple[Curve, ...]:
        """The trials that were not stopped early."""
        return tuple(curve for curve in self.curves if curve.state == "complete")

    def levels(self, setting: str) -> tuple[list[str], list[int]]:
        """The values of ``setting`` in order, as text, and the number of each trial's value; many numbers are binned.

        Bins end at the quartiles.
        """
        values = [curve.point[setting] for curve in self.curves]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        distinct = sorted(set(values)) if numbers else list(dict.fromkeys(values))
        if not numbers or len(distinct) <= LEVELS:
            return [space.value_text(value) for value in distinct], [distinct.index(value) for value in values]
        edges = np.quantile(values, [0.25, 0.5, 0.75])
        bins, number = np.unique(np.searchsorted(edges, values, side="right"), return_inverse=True)
        members = [[value for value, k in zip(values, number, strict=True) if k == bin] for bin in range(len(bins))]
        names = [" to ".join(dict.fromkeys([f"{min(own):.3g}", f"{max(own):.3g}"])) for own in members]
        return names, number.tolist()

    def by_level(self, setting: str) -> list[tuple[str, list[Curve]]]:
        """(value, trials that had it) for each value of ``setting``, as in ``levels``."""
        values, number = self.levels(setting)
        pairs = list(zip(self.curves, number, strict=True))
        return [(value, [curve for curve, n in pairs if n == k]) for k, value in enumerate(values)]


def read_trials(folder: Path) -> Trials:
    """The search in ``folder``, from its search.json and run folders.

    Raises Refused when ``folder`` holds no search, fewer than two trials with a curve, or a damaged search.json.
    """
    if not (folder / "search.json").is_file():
        begun = (folder / "optuna.journal").exists()
        raise Refused(
            f"the search in {folder} has written no results yet; run its command again, it goes on"
            if begun
            else f"{folder} is no folder of a search; give RUNS/EXP of one"
        )
    saved = Run(folder).read_json("search.json")
    _check_points(saved, folder / "search.json")
    curves = []
    for entry in saved["results"]:
        records = Run(folder / Path(entry["run"]).name).metrics() if entry["run"] else []
        if records and entry["state"] != "failed":
            curves.append(_curve(entry, records, folder))
    if len(curves) < 2:
        raise Refused(f"{folder} has {len(curves)} trial(s) with a curve; let the search train at least 2")
    settings = tuple(name for name in saved["space"] if len({str(curve.point[name]) for curve in curves}) > 1)
    chosen = saved.get("winner") or saved["results"][0]
    winner = Run(folder / Path(chosen["run"] or "").name)
    images = len(winner.read_json("split.json")["subsets"]["val"]) if winner.has("split.json") else None
    failed = sum(entry["state"] == "failed" for entry in saved["results"])
    probe, points = saved.get("probe", {}), saved.get("points")
    missing = points - len(saved["results"]) if type(points) is int and saved.get("sampler") == "grid" else 0
    return Trials(
        folder.name, settings, tuple(curves), failed, images, chosen["point"], len(saved.get("finalists", [])),
        tuple(sorted({int(epochs) for entry in saved["results"] for epochs in _rungs(entry)})),
        probe.get("best_val_top1"), max(0, missing), bool(probe) and chosen["run"] == probe["run"],
    )  # fmt: skip


def _rungs(entry: dict[str, Any]) -> dict[str, float]:
    """Accuracy (%) by epochs of the schedules of a point; searches of version 0.1 had rungs within one schedule."""
    rungs = entry.get("rungs")
    return rungs if isinstance(rungs, dict) and not any(name == "0" for name in rungs) else {}


def _check_points(saved: Any, file: Path) -> None:
    """Raises Refused where a name in a search.json is not that of a setting, or a point lacks one, or a run a name."""
    if foreign := sorted(set(saved["space"]) - space.SEARCHED.keys()):
        raise Refused(f"{file} searches {escaped(shortened(foreign[0], 60))}, which is no setting; {REMEDY}")
    winner = saved.get("winner")
    for number, entry in enumerate([*saved["results"], *([winner] if winner else [])], 1):
        if entry["run"] and Path(entry["run"]).name in ("", ".."):
            raise Refused(f"{file} has a run without a name (result {number}); {REMEDY}")
        if "probe" in saved and entry is winner and winner["run"] == saved["probe"]["run"]:
            continue  # the output layer alone has no point
        if missing := sorted(set(saved["space"]) - entry["point"].keys()):
            raise Refused(f"{file} has a point without {missing[0]} (result {number}); {REMEDY}")


def _curve(entry: dict[str, Any], records: list[dict[str, Any]], folder: Path) -> Curve:
    """The curve of a trial from its records. Raises Refused for an epoch without a validation accuracy."""
    if records[0]["epoch"] == 0 and len(records) > 1:  # a solved output layer's score counts with epoch 1
        solved, first, *others = records
        records = [{**first, "val_top1": max(solved["val_top1"] or 0, first["val_top1"] or 0)}, *others]
    scores, steps = (tuple(record[key] for record in records) for key in ("val_top1", "step"))
    if None in scores:
        raise Refused(f"{folder / Path(entry['run']).name} has epochs without validation, so it is no trial; {REMEDY}")
    rungs = _rungs(entry)
    first_rung = rungs[min(rungs, key=int)] if rungs else None
    return Curve(entry["point"], scores, steps, entry["state"], first_rung)
