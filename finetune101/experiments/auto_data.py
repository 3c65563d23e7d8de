"""The images of ``auto``: what is wrong with them, and a split that keeps near-duplicates on one side."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune101.config import DataConfig
from finetune101.data import duplicates
from finetune101.data.images import OFFICIAL_CLASSES, OFFICIAL_IMAGES, Index, class_of
from finetune101.data.splits import Manifest, make_split
from finetune101.data.verify import Report
from finetune101.errors import Refused, escaped
from finetune101.experiments.decision import Decision

FEW = 10
"""Images of a class below which its accuracy says little."""
SHARES = {"test": 0.2, "val": 0.125}
"""The share of the training images that a data set with folders of its own gives to a subset that it lacks."""


def looked_at(report: Report) -> list[Decision]:
    """What ``report`` says of the images, as decisions: which are used, small classes, and duplicates."""
    bad, count = report.bad, report.images
    why = "images_bad" if bad else "images_fine"
    values: dict[str, Any] = {"bad": len(bad), "first": escaped(bad[0]) if bad else ""}
    decisions = [Decision("images", f"{count - len(bad):,} / {count:,}", why, values)]
    sizes = report.class_sizes
    small = [name for name, size in sizes.items() if size < FEW]
    values = {"few": len(small), "first": escaped(small[0]) if small else "", "least": FEW}
    low, high = min(sizes.values()), max(sizes.values())
    values["sizes"] = f"{low:,}" if low == high else f"{low:,}–{high:,}"
    decisions.append(Decision("classes", f"{len(sizes)}", "classes_few" if small else "classes_fine", values))
    groups = groups_of(report, ())
    members = Counter(groups.values())
    doubled = {path: group for path, group in groups.items() if members[group] > 1}
    classes = defaultdict(set)
    for path, group in doubled.items():
        classes[group].add(class_of(path))
    across = sorted(group for group, names in classes.items() if len(names) > 1)
    values = {"images": len(doubled), "across": len(across), "first": escaped(across[0]) if across else ""}
    why = "duplicates_across" if across else "duplicates_some" if classes else "duplicates_none"
    decisions.append(Decision("duplicates", f"{len(classes):,}", why, values))
    return decisions


def groups_of(report: Report, paths: tuple[str, ...]) -> dict[str, str]:
    """Path -> the first path of its group of near-duplicates, for ``paths`` and all that look like another."""
    groups = [*report.near, *report.identical, *report.twins]
    every = {*paths, *(path for group in groups for path in group)}
    return duplicates.joined(sorted(every), groups)


def split_for(index: Index, report: Report, data: DataConfig) -> tuple[Manifest, Decision, bool]:
    """The split, why it is so, and whether it is the one that ``data`` makes by itself.

    Folders train/, val/ and test/ stay as they are. Otherwise the usual split, in which near-duplicates are kept on
    one side; but the published images of Caltech-101 have the split by which others are compared. Raises Refused where
    a class has too few images.
    """
    bad = set(report.bad)
    good = dataclasses.replace(index, paths=tuple(path for path in index.paths if path not in bad))
    manifest, why = make_split(good, data), "split_usual"
    if index.subsets:
        why = "split_folders"
        for subset, share in SHARES.items():
            if not manifest.subsets[subset]:
                manifest, why = _held_out(manifest, subset, share, groups_of(report, good.paths)), "split_filled"
    elif (len(index.classes), len(index.paths)) == (OFFICIAL_CLASSES, OFFICIAL_IMAGES):
        why = "split_official"
    else:
        groups = groups_of(report, good.paths)
        if any(_is_divided(manifest, groups)):
            try:
                manifest, why = make_split(good, data, groups), "split_groups"
            except Refused:  # a class that is one group
                why = "split_divided"
    is_own = not bad and why in ("split_usual", "split_folders", "split_official", "split_divided")
    if bad:
        manifest = dataclasses.replace(manifest, options={**manifest.options, "skipped": sorted(bad)})
    sizes = " / ".join(f"{len(manifest.subsets[name]):,}" for name in ("train", "val", "test"))
    return manifest, Decision("split", sizes, why), is_own


def _is_divided(manifest: Manifest, groups: Mapping[str, str]) -> list[str]:
    """The groups of which images lie in several subsets."""
    places = defaultdict(set)
    for subset, paths in manifest.subsets.items():
        for path in paths:
            places[groups[path]].add(subset)
    return [group for group, subsets in places.items() if len(subsets) > 1]


def _held_out(manifest: Manifest, subset: str, share: float, groups: Mapping[str, str]) -> Manifest:
    """``manifest`` whose empty ``subset`` has ``share`` of the training groups of each class."""
    classes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in manifest.subsets["train"]:
        classes[class_of(path)][groups[path]].append(path)
    random, held = np.random.RandomState(manifest.seed), set[str]()
    for members in classes.values():
        order = random.permutation(len(members))
        names = [list(members)[i] for i in order[: min(math.ceil(share * len(members)), len(members) - 1)]]
        held |= {path for name in names for path in members[name]}
    train = tuple(path for path in manifest.subsets["train"] if path not in held)
    subsets = {**manifest.subsets, "train": train, subset: tuple(sorted(held))}
    return dataclasses.replace(manifest, options={**manifest.options, f"{subset}_share": share}, subsets=subsets)
