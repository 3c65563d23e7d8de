"""Tested runs and groups of them: which run folders a name means, and their answers on the same test images."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune101.config import TrainConfig
from finetune101.data import splits
from finetune101.data.images import class_of
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import has_frozen_backbone
from finetune101.evaluation.evaluate import trained_on
from finetune101.evaluation.tested import (
    Answer,
    evaluate_command,
    is_inside,
    manifest_file,
    read_answers,
    read_manifest,
)
from finetune101.experiments import costs
from finetune101.models.build import build
from finetune101.run import Run, open_run, runs_below

ONE_ARM = ("recipe", "model", "augment", "optim")  # the settings that all runs of an arm share


@dataclass(frozen=True)
class Tested:
    """A run with its test results; ``answers`` by image, in the order of their paths."""

    run: Run
    config: TrainConfig
    env: Mapping[str, Any]
    test: Mapping[str, Any]
    manifest: splits.Manifest
    answers: Mapping[str, Answer]
    features_cached: bool = False
    """Whether features were read from the cache of an earlier run: then the seconds are not what a training costs."""

    @property
    def frozen(self) -> bool:
        """Whether only the output layer of the tested weights was trained."""
        return has_frozen_backbone(self.config, self.test.get("epoch"))

    @property
    def random_layers(self) -> str:
        """The layers beside the output layer that started at random in a pretrained network; "" for none."""
        return ", ".join(self.config.model.random_layers)

    @property
    def first_pass(self) -> costs.FirstPass | None:
        """The pass that solves an output layer before the first epoch."""
        images = {name: len(paths) for name, paths in self.manifest.subsets.items()}
        return costs.first_pass(self.run, self.config, self.env, images)

    @cached_property
    def split(self) -> str:
        """Hash of the split."""
        return self.manifest.hash()

    @property
    def test_to_train(self) -> float:
        """Number of test images over number of training and validation images."""
        subsets = self.manifest.subsets
        return len(subsets["test"]) / (len(subsets["train"]) + len(subsets["val"]))

    @cached_property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each test image (N,) is right."""
        return np.array([answer.right for answer in self.answers.values()])

    def by_class(self) -> dict[str, float]:
        """Share of right images of each class that has test images, in percent."""
        images = Counter(answer.label for answer in self.answers.values())
        right = Counter(answer.label for answer in self.answers.values() if answer.right)
        return {name: 100 * right[name] / images[name] for name in sorted(images)}

    def cost(self) -> dict[str, float]:
        """Of the training: seconds with validation, optimizer steps, and images gone through."""
        records = self.run.metrics()
        return {
            "seconds": self.run.seconds(),
            "steps": records[-1]["step"] if records else 0,
            "images": len(records) * len(trained_on(self.manifest, self.config.data)),
        }


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one arm: one network, one run for each seed and split."""

    name: str
    runs: tuple[Tested, ...]

    def on(self, split: str) -> list[Tested]:
        """The runs on the split with this hash."""
        return [run for run in self.runs if run.split == split]

    def curve(self) -> list[dict[str, Any]]:
        """Validation accuracy (%) after each epoch, mean and standard deviation over the runs; [] without validation.

        Seconds are the mean over the runs that computed their own features; None where every run read a cache.
        """
        points = []
        seconds = [0.0] * len(self.runs)
        paid = [not run.features_cached for run in self.runs]
        for records in zip(*(run.run.metrics() for run in self.runs), strict=False):
            seconds = [s + r["seconds"] + r.get("val_seconds", 0.0) for s, r in zip(seconds, records, strict=True)]
            values = [r["val_top1"] for r in records if r["val_top1"] is not None]
            if len(values) == len(self.runs):
                mean, sd = mean_sd(values)
                step = statistics.mean(r["step"] for r in records)
                time = statistics.mean(itertools.compress(seconds, paid)) if any(paid) else None
                points.append({"step": step, "seconds": time, "mean": mean, "sd": sd or 0.0})
        return points

    def records(self) -> list[dict[str, Any]]:
        """Loss and accuracy (%) of training and validation images after each epoch, means over the runs.

        None where a run has no such number; [] where no epoch was trained, only an output layer solved.
        """
        keys = ("train_loss", "train_top1", "val_loss", "val_top1")
        means = []
        for records in zip(*(run.run.metrics() for run in self.runs), strict=False):
            values = {key: [record[key] for record in records] for key in keys}
            mean = {key: None if None in own else statistics.mean(own) for key, own in values.items()}
            means.append({"epoch": records[0]["epoch"], **mean})
        return means if any(record["epoch"] for record in means) else []

    def seconds(self) -> float | None:
        """Mean time of a training over the runs that computed their own features; None where every run read a cache."""
        seconds = [run.run.seconds() for run in self.runs if not run.features_cached]
        return statistics.mean(seconds) if seconds else None


def with_costs(groups: Sequence[Group]) -> list[Group]:
    """``groups`` with ``features_cached`` of every run set, by comparison with the other runs' first pass."""
    cached = costs.read_from_cache(run.first_pass for group in groups for run in group.runs)

    def marked(run: Tested) -> Tested:
        return dataclasses.replace(run, features_cached=run.run.path.resolve() in cached)

    return [dataclasses.replace(group, runs=tuple(map(marked, group.runs))) for group in groups]


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter with one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def run_folders(name: str, runs: str) -> list[Path]:
    """The folders of the runs that ``name`` means: a run, a folder of runs, or a glob of either; [] for none."""
    as_named = [str(path) for path in (Path(name), Path(runs) / name) if path.exists()][:1]  # names may hold brackets
    matches = as_named or glob.glob(name, recursive=True) or glob.glob(str(Path(runs) / name), recursive=True)
    return sorted({folder for path in matches for folder in runs_below(Path(path))})


def open_group(name: str, runs: str = "runs", unfinished: bool = True) -> Group:
    """The tested runs that ``name`` means: a run, a folder that holds runs, or a quoted glob of either.

    Raises Refused when there is none, one is not tested, or they are not one arm: the same settings, and one run
    for each seed and split. Without ``unfinished``, runs that are not tested are left out instead.
    """
    folders = run_folders(name, runs)
    if not unfinished:
        folders = [folder for folder in folders if Run(folder).has("test.json") and not Run(folder).stopped()]
        if not folders:
            raise Refused(f"{name} has no finished run; continue the study first")
    if not folders and set(name) & set("*?["):
        raise Refused(f"no run matches {name}; a glob is looked up here and in {runs}")
    if not folders:
        folders = [open_run(name, runs).path]  # which says what there is
    return one_arm((folders[0] if len(folders) == 1 else Path(name)).as_posix(), [Run(folder) for folder in folders])


def one_arm(name: str, runs: Sequence[Run]) -> Group:
    """``runs`` as a group. Raises Refused when there is none, one is not tested, or they are not one arm."""
    if not runs:
        raise Refused(f"{name} has no run; run compare again")
    tested = sorted(map(read_tested, runs), key=lambda one: (one.manifest.seed, one.split, one.config.system.seed))
    if len({one.config.model.name for one in tested}) > 1:
        raise Refused(f"{name} holds several networks; give a folder or a glob with one of them")
    for other in tested[1:]:
        if different := [part for part in ONE_ARM if getattr(other.config, part) != getattr(tested[0].config, part)]:
            raise Refused(
                f"{tested[0].run.path} and {other.run.path} are not one arm: they differ in {', '.join(different)}; "
                "give a folder or a glob with runs that differ in seed and split only"
            )
    for one, other in itertools.pairwise(tested):
        if (one.split, one.config.system.seed) == (other.split, other.config.system.seed):
            same = f"{one.run.path} and {other.run.path} have the same seed and split"
            raise Refused(f"{same}; give a folder or a glob that holds one run of each")
    return Group(name=name, runs=tuple(tested))


def on_common_splits(groups: Sequence[Group]) -> list[Group]:
    """``groups`` with the runs on splits that all of them have. Raises Refused when there is no such split."""
    common = set.intersection(*({run.split for run in group.runs} for group in groups))
    if not common:
        raise Refused("no split has been trained in every arm yet; continue the study first")
    return [
        dataclasses.replace(group, runs=tuple(run for run in group.runs if run.split in common)) for group in groups
    ]


def shortened(groups: Sequence[Group]) -> list[Group]:
    """``groups`` with the shortest ends of their names that tell them apart."""
    parts = [group.name.removesuffix("/all").split("/") for group in groups]  # a study's arm that has all images
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return [dataclasses.replace(group, name=name) for group, name in zip(groups, names, strict=True)]


def read_tested(run: Run) -> Tested:
    """The results of an evaluated run.

    Raises Refused when it has not been evaluated, or its files contradict each other.
    """
    answers, test, manifest = read_answers(run), run.read_json("test.json"), read_manifest(run)
    if outside := next((path for paths in manifest.subsets.values() for path in paths if not is_inside(path)), None):
        raise Refused(f"the split of {run.path} has {outside}, which is not inside of a data folder; it is damaged")
    correct = sum(answer.right for answer in answers.values())
    stated = (test.get("n"), test.get("correct"), test.get("manifest_hash"))
    wanted = {path: class_of(path) for path in manifest.subsets["test"]}
    labels = {path: answer.label for path, answer in answers.items()}
    if stated != (len(answers), correct, manifest.hash()) or labels != wanted:
        raise Refused(
            f"test.json of {run.path} does not belong to its predictions.csv and split.json; "
            f"run: {evaluate_command(run)}"
        )
    best = [record["epoch"] for record in run.metrics() if record["best"]]
    if best and best[-1] != test.get("epoch"):
        raise Refused(f"{run.path} was trained on after its test; evaluate it again")
    return Tested(run, run.config(), run.read_json("env.json"), test, manifest, answers)


def common_splits(a: Group, b: Group) -> list[str]:
    """Hashes of the splits that both groups have. Raises Refused, naming images, when they are not the same ones."""
    by_split_a, by_split_b = ({run.split: run for run in group.runs} for group in (a, b))
    only_a = [run for split, run in by_split_a.items() if split not in by_split_b]
    only_b = [run for split, run in by_split_b.items() if split not in by_split_a]
    if only_a or only_b:
        one, other = (only_a or a.runs)[0], (only_b or b.runs)[0]
        raise Refused(
            f"{one.run.path} and {other.run.path} were split differently ({_differing(one.manifest, other.manifest)}); "
            f"train one of them again with --split {manifest_file(one.run).as_posix()}"
        )
    return list(by_split_a)


def _differing(a: splits.Manifest, b: splits.Manifest) -> str:
    """Which images make two splits differ, in a few words."""
    for name in ("test", "val", "train"):
        different = sorted(set(a.subsets[name]) ^ set(b.subsets[name]))
        if different:
            count = f"{len(different)} image{'s' if len(different) > 1 else ''} in one {name} set only"
            return f"{count}: {', '.join(different[:3])}{', …' if len(different) > 3 else ''}"
    return "the same files, but other pixels or class names"


def proof(run: Tested, pretrained: Mapping[str, str], words: Mapping[str, str]) -> str:
    """Whether a run started where it says, in ``words``; ``pretrained`` has the names of pretrained runs by their hash.

    A random start is built again from its seed, and must give the recorded hash and none of a pretrained run.
    """
    if run.config.model.pretrain:
        return "pretrained"
    model, recorded, seed = run.config.model, run.env["model"]["init_hash"], run.config.system.seed
    if recorded in pretrained:
        return words["start_not_random"].format(run=pretrained[recorded])
    if _random_hash(model.name, len(run.manifest.classes), model.size, seed) == recorded:
        return words["start_random"].format(seed=seed)
    then, now = run.env.get("versions", {}).get("torch", "unknown"), torch.__version__
    return words["start_not_proven"].format(seed=seed, then=then, now=now)


@lru_cache(maxsize=64)
def _random_hash(name: str, classes: int, size: int | None, seed: int) -> str:
    with torch.random.fork_rng():
        return build(name, classes, pretrain=False, size=size, seed=seed).init_hash
