"""Splits of random data sets: what holds whatever the classes, their sizes, the groups and the seed are."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune101.config import DataConfig
from finetune101.data import splits
from finetune101.data.images import SUBSETS, Index, class_of
from finetune101.errors import Refused

EXAMPLES = int(os.environ.get("FINETUNE101_EXAMPLES", "60"))  # another number for a longer or a shorter search
fuzzed = settings(derandomize=True, deadline=None, database=None, max_examples=EXAMPLES)
NAMES = st.text("abcXYZ09 _-.é鳥\U0001f426", min_size=1, max_size=8).filter(lambda name: name.strip(". ") == name)
SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.integers(1, 60).map(lambda percent: percent / 100)


@st.composite
def indices(draw: st.DrawFn, smallest: int = 1, largest: int = 30) -> Index:
    """A data set of one to five classes with any number of images each, in any order."""
    sizes = draw(st.dictionaries(NAMES, st.integers(smallest, largest), min_size=1, max_size=5))
    paths = draw(st.permutations([f"{name}/{i:03d}.jpg" for name, n in sizes.items() for i in range(n)]))
    digests = {path: f"sha of {path}" for path in paths}
    return Index(root=Path("data"), classes=tuple(sorted(sizes)), paths=tuple(paths), digests=digests)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Index, dict[str, str]]:
    """A data set, and groups of up to four of its images, also of several classes, each named by its first image."""
    index = draw(indices(smallest=4))
    number = draw(st.lists(st.integers(0, 12), min_size=len(index.paths), max_size=len(index.paths)))
    groups: dict[str, str] = {}
    members: dict[int, list[str]] = {}
    for path, n in zip(sorted(index.paths), number, strict=True):
        mates = members.setdefault(n, [])
        mates.append(path)
        groups[path] = mates[0]
        if n == 0 or len(mates) == 4:  # the images of number 0 are alone
            members[n] = []
    return index, groups


def split_of(index: Index, config: DataConfig, groups: dict[str, str] | None = None) -> splits.Manifest | None:
    """The split, or None where it is refused by a sentence."""
    try:
        return splits.make_split(index, config, groups)
    except Refused as refused:
        assert str(refused)
        return None


def sizes_of(manifest: splits.Manifest, subset: str) -> Counter[str]:
    """Images of each class in ``subset``."""
    return Counter(class_of(path) for path in manifest.subsets[subset])


def sides(manifest: splits.Manifest) -> dict[str, str]:
    """Image -> subset; no image may lie in two of them."""
    paths = [path for name in SUBSETS for path in manifest.subsets[name]]
    assert len(paths) == len(set(paths))
    return {path: name for name in SUBSETS for path in manifest.subsets[name]}


@fuzzed
@given(indices(), SEEDS, SHARES, SHARES)
def test_the_reference_split_is_disjoint_complete_and_of_the_shares_asked_for(
    index: Index, seed: int, test_size: float, val_size: float
) -> None:
    test, val = round(100 * test_size), round(100 * val_size)
    config = DataConfig(split_seed=seed, test_size=test_size, val_size=val_size)
    counts = {}
    for name in index.classes:
        n = sum(class_of(path) == name for path in index.paths)
        tested = math.ceil(Fraction(test, 100) * n)
        counts[name] = (tested, math.ceil(Fraction(val, 100 - test) * (n - tested)) if test + val < 100 else n - tested)
    too_few = any(sum(counts[class_of(path)]) >= n for path, n in _images(index).items())
    manifest = split_of(index, config)
    assert (manifest is None) == too_few
    if manifest:
        assert set(sides(manifest)) == set(index.paths)
        for name, (tested, validated) in counts.items():
            # the share is a float: where it should give a whole number, its ceiling may be one more
            assert sizes_of(manifest, "test")[name] in (tested, tested + 1)
            assert sizes_of(manifest, "val")[name] in (validated - 1, validated, validated + 1)
        again = splits.make_split(dataclasses.replace(index, paths=tuple(reversed(index.paths))), config)
        assert again == manifest and again.hash() == manifest.hash()


def _images(index: Index) -> dict[str, int]:
    """The first image of each class -> how many images the class has."""
    counts = Counter(map(class_of, index.paths))
    return {f"{name}/000.jpg": n for name, n in counts.items()}


@fuzzed
@given(indices(), SEEDS, st.integers(1, 20), st.none() | st.integers(1, 6))
def test_the_standard_split_has_the_counts_asked_for(index: Index, seed: int, n: int, most: int | None) -> None:
    config = DataConfig(protocol="standard", split_seed=seed, train_per_class=n, max_test_per_class=most)
    images = Counter(map(class_of, index.paths))
    manifest = split_of(index, config)
    assert (manifest is None) == any(count <= n for count in images.values())
    if manifest:
        where = sides(manifest)
        validated = math.floor(Fraction(n, 6) + Fraction(1, 2))
        for name, count in images.items():
            tested = min(count - n, most or count)
            numbers = [sizes_of(manifest, subset)[name] for subset in ("train", "val", "test")]
            assert numbers == [n - validated, validated, tested]
        assert most is not None or set(where) == set(index.paths)
        assert splits.make_split(dataclasses.replace(index, paths=tuple(sorted(index.paths))), config) == manifest


@fuzzed
@given(grouped(), SEEDS, st.integers(1, 12))
def test_the_standard_split_never_parts_a_group(data: tuple[Index, dict[str, str]], seed: int, n: int) -> None:
    index, groups = data
    config = DataConfig(protocol="standard", split_seed=seed, train_per_class=n)
    manifest = split_of(index, config, groups)
    if manifest:
        where = sides(manifest)
        assert set(where) == set(index.paths)
        assert len({(groups[path], where[path]) for path in where}) == len(set(groups.values()))
        pool = sizes_of(manifest, "train") + sizes_of(manifest, "val")
        assert pool == Counter(dict.fromkeys(index.classes, n))
        assert all(sizes_of(manifest, "train")[name] for name in index.classes)


@fuzzed
@given(grouped(), SEEDS)
def test_the_reference_split_never_parts_a_group(data: tuple[Index, dict[str, str]], seed: int) -> None:
    index, groups = data
    manifest = split_of(index, DataConfig(split_seed=seed), groups)
    if manifest:
        where = sides(manifest)
        assert set(where) == set(index.paths)
        assert all(where[path] == where[groups[path]] for path in where)
        assert manifest.options["group_duplicates"] is True


@fuzzed
@given(indices(smallest=3), SEEDS, st.data())
def test_manifests_survive_json_and_lies_are_found(index: Index, seed: int, data: st.DataObject) -> None:
    manifest = split_of(index, DataConfig(split_seed=seed, protocol="reference"))
    if manifest is None:
        return
    again = splits.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest and again.hash() == manifest.hash() == manifest.to_json()["hash"]
    splits.check_split(again, index)
    for subset in SUBSETS:
        assert [manifest.classes[label] for label in manifest.labels(subset)] == list(
            map(class_of, manifest.subsets[subset])
        )
    path = data.draw(st.sampled_from(manifest.subsets["train"]))
    other = {**manifest.subsets, "test": (*manifest.subsets["test"], path)}
    with pytest.raises(Refused, match="in train and in test"):
        splits.from_json({**manifest.to_json(), "subsets": other})
    moved = {**manifest.subsets, "train": tuple(p for p in manifest.subsets["train"] if p != path)}
    moved["test"] = other["test"]
    assert dataclasses.replace(manifest, subsets=moved).hash() != manifest.hash()
    changed = dataclasses.replace(index, digests={**index.digests, path: "other bytes"})
    with pytest.raises(Refused, match="changed after the split"):
        splits.check_split(manifest, changed)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
KEYS = ("protocol", "seed", "options", "classes", "content_hash", "subsets", "train", "val", "test", "hash", "format")


@fuzzed
@given(st.dictionaries(st.sampled_from(KEYS[:6]), PLAIN), st.dictionaries(st.sampled_from(KEYS), PLAIN), st.booleans())
def test_a_file_of_anything_is_a_manifest_or_refused(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], more: dict[str, Any], whole: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed_split.json"
    index = Index(root=Path("data"), classes=("a",), paths=tuple(f"a/{i}.jpg" for i in range(9)), digests={})
    index.digests.update((path, path) for path in index.paths)
    base = splits.make_split(index, DataConfig()).to_json() if whole else {}
    file.write_text(json.dumps({**base, **values, **({"subsets": more} if more else {})}), encoding="utf-8")
    try:
        manifest = splits.read_split(file)
    except Refused:
        return
    assert splits.from_json(manifest.to_json()) == manifest
