"""Who trains, validates and tests: (index, protocol, seed) -> manifest. Pure, and independent of directory order."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune101.config import DataConfig
from finetune101.data.images import SUBSETS, Index, class_of, content_hash
from finetune101.errors import Refused, escaped, shortened
from finetune101.files import read_json
from finetune101.schemas import Split

ANEW = "make it anew by leaving out --split"
MOST_NAMED = 3  # classes in a sentence
MOST_NEEDED = 10_000  # images of a class, at most, of which one trains


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One split: class names and, for each of train, val and test, paths relative to the data folder."""

    protocol: str
    seed: int
    options: dict[str, Any]
    classes: tuple[str, ...]
    content_hash: str
    subsets: dict[str, tuple[str, ...]]

    def labels(self, subset: str) -> list[int]:
        """Class indices of the images of ``subset``, in their order."""
        return [self.numbers[class_of(path)] for path in self.subsets[subset]]

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Class name -> index."""
        return {name: i for i, name in enumerate(self.classes)}

    @property
    def skipped(self) -> tuple[str, ...]:
        """The unreadable images that ``--skip-bad-images`` left out."""
        paths = self.options.get("skipped")
        return tuple(map(str, paths)) if isinstance(paths, list | tuple) else ()

    def hash(self) -> str:
        """Identifies the split: the same classes and the same images in the same subsets."""
        import hashlib

        parts = {name: sorted(paths) for name, paths in self.subsets.items()}
        text = json.dumps([self.classes, parts, self.content_hash], sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, ``hash`` included."""
        return {
            "protocol": self.protocol,
            "seed": self.seed,
            "options": dict(self.options),
            "classes": self.classes,
            "content_hash": self.content_hash,
            "subsets": dict(self.subsets),
            "hash": self.hash(),
        }


def from_json(values: Mapping[str, Any]) -> Manifest:
    """The inverse of ``Manifest.to_json``.

    Raises Refused for a broken one, an image in two subsets, or a path that leads out of the data folder.
    """
    try:
        manifest = Manifest(
            protocol=values["protocol"],
            seed=values["seed"],
            options=dict(values["options"]),
            classes=tuple(values["classes"]),
            content_hash=values["content_hash"],
            subsets={name: tuple(values["subsets"][name]) for name in SUBSETS},
        )
    except (KeyError, TypeError) as error:
        raise Refused(f"the split manifest lacks {error}; {ANEW}") from error
    held: dict[str, str] = {}
    for name, paths in manifest.subsets.items():
        for path in paths:
            if path in held:
                raise Refused(
                    f"the split manifest has {shortened(escaped(path))} in {held[path]} and in {name}; {ANEW}"
                )
            if _leads_out(path):
                raise Refused(
                    f"the split manifest has {shortened(escaped(path))}, which leads out of the data folder; {ANEW}"
                )
            if class_of(path) not in manifest.numbers:
                raise Refused(
                    f"the split manifest has {shortened(escaped(path))}, of a class that it does not list; {ANEW}"
                )
            held[path] = name
    return manifest


def _leads_out(path: str) -> bool:
    """Whether a manifest's path could name a file outside of the data folder, on any system."""
    if re.match(r"[A-Za-z]:[\\/]|[\\/]", path) or "\0" in path:
        return True
    return any(part in ("", ".", "..") for part in path.split("/")) or ".." in path.split("\\")


def read_split(file: Path) -> Manifest:
    """Reads a manifest from ``file``. Raises Refused when it is missing or broken."""
    return from_json(read_json(file, Split, remedy=f"check --split, or {ANEW}"))


def split_remarks(manifest: Manifest, fit_on: str = "train") -> list[str]:
    """What a user should know of a split: subsets without images, or without images of some class; in sentences."""
    lines = []
    if not manifest.subsets["val"]:
        if fit_on == "train":
            lines.append("No validation images: nothing tells which epoch is best, the last one is kept.")
    elif few := _lacking(manifest, "val"):
        lines.append(f"No validation images of {few}.")
    if not manifest.subsets["test"]:
        lines.append("No test images: evaluate will use the validation images.")
    elif few := _lacking(manifest, "test"):
        lines.append(f"No test images of {few}.")
    return lines


def is_by_folders(manifest: Manifest, index: Index) -> bool:
    """Whether ``manifest`` holds every image of ``index`` in the subset in whose folder the image lies."""
    by_folder = _by_folder(index) if index.subsets else {}
    return all(set(paths) == set(by_folder.get(name, ())) for name, paths in manifest.subsets.items())


def _lacking(manifest: Manifest, subset: str, most: int = 3) -> str:
    """Names the classes of which ``subset`` has no image; "" when there is none."""
    held = {class_of(path) for path in manifest.subsets[subset]}
    names = [escaped(name) for name in manifest.classes if name not in held]
    few = ", ".join(names[:most]) + ", …" * (len(names) > most)
    return f"{len(names)} of {len(manifest.classes)} classes ({few})" if names else ""


def check_split(manifest: Manifest, index: Index) -> None:
    """Raises Refused when ``index`` lacks files of ``manifest``, or holds other content in them."""
    wanted = [path for name in SUBSETS for path in manifest.subsets[name]]
    missing = [path for path in wanted if path not in index.digests]
    if missing:
        raise Refused(
            f"{len(missing)} images of the split are not in {index.root} (first: {shortened(escaped(missing[0]))}); "
            "give the --data it was made from, or score another folder by --as-test"
        )
    if content_hash(index.digests, wanted) != manifest.content_hash:
        raise Refused(f"images in {index.root} changed after the split was made; restore them or make a new split")


def make_split(index: Index, config: DataConfig, groups: Mapping[str, str] | None = None) -> Manifest:
    """Splits the images of ``index`` by ``config.protocol``.

    Images in train/, val/ and test/ stay there, also by the default protocol. ``groups`` (path -> group) keeps
    near-duplicates on one side; of the reference split the first image of each group decides, the others follow it.
    Raises Refused when a class has too few images, or too few groups, or the folders do not suit the protocol.
    """
    _check_classes(index, config)
    protocol = config.protocol
    options: dict[str, Any] = {}
    subsets: dict[str, list[str]]
    if index.layout == "folders":
        protocol, subsets = "folders", _by_folder(index)
    elif config.protocol == "standard":
        subsets = _standard(_by_class(index.paths), config, groups or {})
        options = {
            "train_per_class": config.train_per_class,
            "max_test_per_class": config.max_test_per_class,
            "group_duplicates": config.group_duplicates,
        }
    else:
        first = [path for path in index.paths if not groups or groups[path] == path]
        if {class_of(path) for path in first} != set(index.classes):
            raise Refused("a class has no image that is not a near-duplicate of another class's; leave its groups out")
        subsets = _reference(_by_class(first), config)
        options = {"test_size": config.test_size, "val_size": config.val_size}
        if groups:
            subsets = _followed(index.paths, subsets, groups)
            options["group_duplicates"] = True
    used = [path for paths in subsets.values() for path in paths]
    return Manifest(
        protocol=protocol,
        seed=config.split_seed,
        options=options,
        classes=index.classes,
        content_hash=content_hash(index.digests, used),
        subsets={name: tuple(paths) for name, paths in subsets.items()},
    )


def _by_folder(index: Index) -> dict[str, list[str]]:
    """Subset -> the images in its folder, where images lie in train/, val/ and test/."""
    subsets: dict[str, list[str]] = {name: [] for name in SUBSETS}
    folders = {folder: name for name, folder in index.subsets.items()}
    for path in index.paths:
        subsets[folders[path.split("/", 1)[0]]].append(path)
    return subsets


def _check_classes(index: Index, config: DataConfig) -> None:
    where = escaped(str(index.root))
    if config.protocol == "standard" and index.layout == "folders":
        folders = " and ".join(f"{escaped(name)}/" for name in index.subsets.values())
        raise Refused(
            f"{where} is split into {folders}, and --protocol standard would mix them; leave --protocol out,"
            " or give a folder with one folder per class"
        )
    if config.protocol == "folders" and index.layout == "classes":
        raise Refused(f"{where} has no train/ with val/ or test/ of class folders; leave --protocol out")
    train = index.subsets.get("train")
    held = {class_of(path) for path in index.paths if train is None or path.startswith(f"{train}/")}
    if empty := [name for name in index.classes if name not in held]:
        raise Refused(
            f"class {escaped(empty[0])} has no image that can be read; repair its images, or move its folder elsewhere"
        )


def _by_class(paths: Sequence[str]) -> dict[str, list[str]]:
    classes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(paths):
        classes[class_of(path)].append(path)
    return dict(sorted(classes.items()))


def _shuffle_split(items: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(rest, held out) exactly as scikit-learn's train_test_split(items, test_size=share, random_state=seed)."""
    order = np.random.RandomState(seed).permutation(len(items))
    held = math.ceil(share * len(items))
    return [items[i] for i in order[held:]], [items[i] for i in order[:held]]


def _reference(classes: Mapping[str, list[str]], config: DataConfig) -> dict[str, list[str]]:
    """The original project's split: per class, ``test_size`` tests, ``val_size`` validates."""
    # rounded: 0.1 / (1 - 0.2) must be the 0.125 of the original, not 0.12500000000000003
    val_share = round(config.val_size / (1 - config.test_size), 12)

    def trained_on(images: int) -> int:
        rest = images - math.ceil(config.test_size * images)
        return rest - math.ceil(val_share * rest)

    least = next((n for n in range(1, MOST_NEEDED) if trained_on(n)), MOST_NEEDED)
    refuse_small({name: len(items) for name, items in classes.items()}, least, "to split")
    subsets: dict[str, list[str]] = {name: [] for name in SUBSETS}
    for items in classes.values():
        rest, test = _shuffle_split(items, config.test_size, config.split_seed)
        train, val = _shuffle_split(rest, val_share, config.split_seed)
        for subset, paths in (("train", train), ("val", val), ("test", test)):
            subsets[subset] += paths
    return subsets


def refuse_small(images: Mapping[str, int], least: int, why: str, remedy: str = "") -> None:
    """Raises Refused naming the classes of ``images`` that have fewer than ``least``, those that lack most first.

    ``why`` they are too few; ``remedy`` is another way out than more images or fewer classes.
    """
    small = sorted((count, name) for name, count in images.items() if count < least)
    if not small:
        return
    listed = [f"class {escaped(name)} has {count} (add at least {least - count})" for count, name in small[:MOST_NAMED]]
    more = f" and {len(small) - MOST_NAMED} more" if len(small) > MOST_NAMED else ""
    which = "its folder" if len(small) == 1 else "their folders"
    raise Refused(f"too few images {why}: {', '.join(listed)}{more}; add images, or remove {which}{remedy}")


def _followed(
    paths: Sequence[str], subsets: Mapping[str, list[str]], groups: Mapping[str, str]
) -> dict[str, list[str]]:
    """``paths`` in the subsets that the first images of their ``groups`` have."""
    places = {path: subset for subset, own in subsets.items() for path in own}
    followed: dict[str, list[str]] = {subset: [] for subset in subsets}
    for path in paths:
        followed[places[groups[path]]].append(path)
    return followed


def check_train_per_class(images: Mapping[str, int], number: int) -> None:
    """Raises Refused where a class of ``images`` (its name -> how many) has none left to test beside ``number``."""
    remedy = ", or give a smaller --train-per-class"
    refuse_small(images, number + 1, f"for --train-per-class {number} and a test", remedy)


def _standard(classes: Mapping[str, list[str]], config: DataConfig, groups: Mapping[str, str]) -> dict[str, list[str]]:
    """``train_per_class`` random images per class for training (a sixth of them validation), the rest tests.

    Groups are drawn whole and over all classes at once, so that the two classes of a twin agree on its side; a group
    that would overfill a class goes to the test side.
    """
    wanted = dict.fromkeys(classes, config.train_per_class)
    check_train_per_class({name: len(items) for name, items in classes.items()}, config.train_per_class)
    members: dict[str, list[str]] = defaultdict(list)
    for items in classes.values():
        for path in items:
            members[groups.get(path, path)].append(path)
    order = np.random.RandomState(config.split_seed).permutation(len(members))
    listed = list(members.values())
    drawn = [listed[i] for i in order]
    pool, outside = _fill(drawn, wanted)
    short = {name: left for name, left in wanted.items() if left}
    if short:
        name = next(iter(short))
        raise Refused(
            f"class {escaped(name)} lacks {short[name]} image(s) for training without splitting near-duplicates; "
            "use --no-group-duplicates or a smaller --train-per-class"
        )
    share = (config.train_per_class + 3) // 6  # n / 6, halves up: 3 of 15, where Python's round(2.5) is 2
    val, train = _fill(pool, dict.fromkeys(classes, share))
    if share:
        val, train = _with_every_class(val, train)
    test = _by_class([path for group in outside for path in group])
    if config.max_test_per_class is not None:
        rng = np.random.RandomState(config.split_seed)
        for name, items in test.items():
            test[name] = sorted(rng.permutation(items)[: config.max_test_per_class].tolist())
    return {
        "train": sorted(path for group in train for path in group),
        "val": sorted(path for group in val for path in group),
        "test": [path for items in test.values() for path in items],
    }


def _with_every_class(val: list[list[str]], train: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """(val, train) where classes without validation images get their smallest group, if one is left to train on.

    Groups may be larger than a class's share, so that none of them fitted.
    """
    left = Counter(class_of(path) for group in train for path in group)
    validated = {class_of(path) for group in val for path in group}
    lacking = sorted(set(left) - validated)
    if not lacking:
        return val, train
    groups: dict[str, list[int]] = defaultdict(list)  # class -> places of its groups in train, the smallest first
    for i in sorted(range(len(train)), key=lambda i: len(train[i])):
        for name in {class_of(path) for path in train[i]}:
            groups[name].append(i)
    moved: set[int] = set()
    for name in lacking:
        for i in groups[name] if name not in validated else ():
            sizes = Counter(map(class_of, train[i]))
            if i not in moved and all(left[other] > size for other, size in sizes.items()):
                moved.add(i)
                left -= sizes
                validated |= set(sizes)
                break
    kept = [group for i, group in enumerate(train) if i not in moved]
    return [*val, *(train[i] for i in sorted(moved))], kept


def _fill(groups: Sequence[list[str]], wanted: dict[str, int]) -> tuple[list[list[str]], list[list[str]]]:
    """(taken, left): takes each group, in order, whose classes all still want its images; ``wanted`` counts down."""
    taken, left = [], []
    for group in groups:
        need: dict[str, int] = defaultdict(int)
        for path in group:
            need[class_of(path)] += 1
        if all(wanted[name] >= n for name, n in need.items()):
            taken.append(group)
            for name, n in need.items():
                wanted[name] -= n
        else:
            left.append(group)
    return taken, left
