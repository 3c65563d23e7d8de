"""Difference, interval and training cost of two groups of runs that were tested on the same images."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from finetune101.errors import Refused
from finetune101.evaluation import metrics
from finetune101.recipes import whole_epochs
from finetune101.redaction import redacted
from finetune101.reports.comparison import Arm, ClassGain, Comparison, Pair, Score
from finetune101.reports.drawing import ARMS
from finetune101.reports.groups import Group, Tested, common_splits, mean_sd, one_arm, proof, shortened, with_costs
from finetune101.reports.page import read_words
from finetune101.run import Run


def compare_groups(a: Group, b: Group) -> Comparison:
    """Compares the test predictions of two groups of runs, image by image.

    Every number is computed from predictions.csv and must agree with test.json. Raises Refused when a run has not
    been evaluated, its files contradict each other, or the arms were split differently.
    """
    if twice := {run.run.path.resolve() for run in a.runs} & {run.run.path.resolve() for run in b.runs}:
        raise Refused(f"{min(twice)} cannot be compared with itself; name other runs")
    splits = common_splits(a, b)
    sides = [[np.stack([run.correct for run in group.on(split)]) for split in splits] for group in (a, b)]
    by_split = [metrics.paired_bootstrap(x.mean(0), y.mean(0)) for x, y in zip(*sides, strict=True)]
    several = len(splits) > 1
    first = a.runs[0]
    crossed = min(len(a.runs), len(b.runs), len(first.answers)) > 1 and not several
    return Comparison(
        a=_arm(a, b),
        b=_arm(b, a),
        n=len(first.answers),
        manifest_hash=first.split,
        splits=len(splits),
        difference=float(np.mean([one[0] for one in by_split])),
        difference_interval=None if several else by_split[0][1:],
        crossed=metrics.crossed(sides[0][0], sides[1][0]) if crossed else None,
        over_splits=over_splits([one[0] for one in by_split], first.test_to_train) if several else None,
        mcnemar=tuple(_pairs(a, b, splits)),
        classes=tuple(_gains(a, b)),
    )


def all_pairs(groups: Sequence[Group]) -> list[Comparison]:
    """Compares every two of ``groups``, in their order; times leave out runs that read features from a cache.

    Raises Refused with fewer than two, or too many for a picture.
    """
    if len(groups) > len(ARMS):
        raise Refused(f"compare shows {len(ARMS)} groups at most; name fewer")
    if len(groups) < 2:
        raise Refused("compare needs two runs or groups of runs; give another one")
    return [compare_groups(a, b) for a, b in itertools.combinations(shortened(with_costs(groups)), 2)]


def over_splits(differences: Sequence[float], ratio: float) -> tuple[float, float]:
    """95 % interval of the mean of ``differences``, one for each random split; ``ratio`` is test over training images.

    Random splits share images, so a plain t interval is too narrow: here its 1/K becomes 1/K + ``ratio``. With few
    training images ``ratio`` is large (29 for one image per class of Caltech-101), and the interval says next to
    nothing: studies show it at their largest size only.
    Source: C. Nadeau, Y. Bengio, "Inference for the generalization error", Machine Learning 52 (2003).
    """
    k = len(differences)
    half = float(stats.t.ppf(0.975, k - 1)) * math.sqrt((1 / k + ratio) * float(np.var(differences, ddof=1)))
    mean = float(np.mean(differences))
    return max(-100.0, mean - half), min(100.0, mean + half)


def _arm(group: Group, other: Group) -> Arm:
    pretrained = {run.env["model"]["init_hash"]: run.run.name for run in other.runs if run.config.model.pretrain}
    scores = [_score(run, pretrained) for run in group.runs]
    (top1, top1_sd), (per_class, per_class_sd) = (
        mean_sd([getattr(s, k) for s in scores]) for k in ("top1", "mean_per_class")
    )
    curve, goal = group.curve(), _final(other)
    reached = next((point for point in curve if goal is not None and point["mean"] >= goal), None)
    first = group.runs[0]

    return Arm(
        name=group.name,
        network=first.config.model.name,
        recipe=first.config.recipe,
        pretrain=first.config.model.pretrain,
        device=first.env["world"]["device"],
        seconds=group.seconds(),
        init_source=first.env["model"]["init_source"],
        init_hash=first.env["model"]["init_hash"],
        epoch=first.test.get("epoch", 0),
        correct=float(np.mean([s.correct for s in scores])),
        top1=top1,
        top1_sd=top1_sd,
        top1_interval=_top1_interval(group, top1),
        mean_per_class=per_class,
        mean_per_class_sd=per_class_sd,
        validation=_final(group),
        steps_to_other=reached["step"] if reached else None,
        seconds_to_other=reached["seconds"] if reached else None,
        runs=tuple(scores),
        random_layers=first.config.model.random_layers,
        epochs=first.config.optim.epochs,
        whole_epochs=whole_epochs(first.config),
    )


def _top1_interval(group: Group, top1: float) -> tuple[float, float]:
    """Wilson's interval for one test set; with several splits, the interval of the mean over splits."""
    first, splits = group.runs[0], dict.fromkeys(run.split for run in group.runs)  # in a fixed order
    if len(splits) == 1:
        n = len(first.answers)
        return metrics.wilson(top1 / 100 * n, n)
    means = [100 * float(np.mean([run.correct.mean() for run in group.on(split)])) for split in splits]
    low, high = over_splits(means, first.test_to_train)
    return max(0.0, low), min(100.0, high)


def _score(run: Tested, pretrained: dict[str, str]) -> Score:
    right = int(run.correct.sum())
    return Score(
        path=run.run.path.as_posix(),
        seed=run.config.system.seed,
        split_seed=run.manifest.seed,
        manifest_hash=run.split,
        epoch=run.test.get("epoch", 0),
        correct=right,
        top1=100 * right / len(run.correct),
        mean_per_class=float(np.mean(list(run.by_class().values()))),
        init_hash=run.env["model"]["init_hash"],
        start=proof(run, pretrained, read_words("en")),
        command=redacted(run.env.get("command", "")),
        features_cached=run.features_cached,
        frozen=run.frozen,
        **run.cost(),  # type: ignore[arg-type]
    )


def _final(group: Group) -> float | None:
    """Validation accuracy of the weights that were kept, mean over the runs; None without validation."""
    kept = [[r["val_top1"] for r in run.run.metrics() if r["best"]][-1:] for run in group.runs]
    values = [own[0] for own in kept if own and own[0] is not None]
    return float(np.mean(values)) if len(values) == len(group.runs) else None


def _pairs(a: Group, b: Group, splits: Sequence[str]) -> list[Pair]:
    """McNemar's test of each two runs with one split and seed (else the first with the first, and so on).

    The tests are never pooled, because the runs share their images.
    """
    return [
        Pair(
            a=_run_name(a, one),
            b=_run_name(b, other),
            only_a=int(np.sum(one.correct & ~other.correct)),
            only_b=int(np.sum(other.correct & ~one.correct)),
            p=metrics.mcnemar_exact(one.correct, other.correct),
        )
        for split in splits
        for one, other in _same_seed(a.on(split), b.on(split))
    ]


def _same_seed(a: Sequence[Tested], b: Sequence[Tested]) -> list[tuple[Tested, Tested]]:
    seeds = {run.config.system.seed: run for run in b}
    pairs = [(run, seeds[run.config.system.seed]) for run in a if run.config.system.seed in seeds]
    return pairs or list(zip(a, b, strict=False))


def _run_name(group: Group, run: Tested) -> str:
    """The name of the arm; with several runs also that of the run, because two arms may name their runs alike."""
    return group.name if len(group.runs) == 1 else f"{group.name}/{run.run.name}"


def _gains(a: Group, b: Group) -> list[ClassGain]:
    """The classes, those with the greatest gain first."""
    first = [answer.label for answer in a.runs[0].answers.values()]
    shares = [[run.by_class() for run in group.runs] for group in (a, b)]
    rows = []
    for name in sorted(set(first)):
        n = first.count(name)
        x, y = (float(np.mean([one[name] for one in side if name in one])) for side in shares)
        intervals = [metrics.wilson(min(n, share / 100 * n), n) for share in (x, y)]
        rows.append(ClassGain(name=name, n=n, a=x, b=y, gain=x - y, a_interval=intervals[0], b_interval=intervals[1]))
    return sorted(rows, key=lambda row: -row.gain)


def comparison_json(comparisons: Sequence[Comparison], folder: Path) -> dict[str, Any]:
    """Plain JSON types: the first comparison, and ``others``; paths of runs are relative to ``folder``."""
    first, *others = (json.loads(json.dumps(dataclasses.asdict(one))) for one in comparisons)
    for one in (first, *others):
        for score in (*one["a"]["runs"], *one["b"]["runs"]):
            with contextlib.suppress(ValueError):  # on another drive of Windows
                score["path"] = Path(os.path.relpath(score["path"], folder)).as_posix()
    return {**first, "others": others}


def read_groups(folder: Path) -> list[Group]:
    """The groups of the comparison in ``folder``, read again from their runs. Raises Refused when a run is gone."""
    values = Run(folder).read_json("comparison.json")
    sides = {arm["name"]: arm["runs"] for pair in (values, *values["others"]) for arm in (pair["a"], pair["b"])}
    if any("\0" in one["path"] for runs in sides.values() for one in runs):
        raise Refused(f"{folder / 'comparison.json'} names a folder that cannot be; run compare again")
    return [one_arm(name, [Run(_plain(folder / one["path"])) for one in runs]) for name, runs in sides.items()]


def _plain(path: Path) -> Path:
    """``path`` without the ".." in it, where that is the same folder: a link may lead elsewhere."""
    plain = Path(os.path.normpath(path))
    return plain if plain.exists() and path.exists() and plain.samefile(path) else path
