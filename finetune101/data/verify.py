"""Read every image of a data set and report what is wrong or double in it; edits nothing."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from finetune101.data import store
from finetune101.data.dataset import (
    FOLDER,
    LEFT_OUT,
    OFFICIAL_CLASSES,
    OFFICIAL_IMAGES,
    Index,
    class_of,
    content_hash,
    index,
    layout_of,
    other_files,
)
from finetune101.data.decode import DECODER, Picture, Problem, Unreadable, in_threads, opened
from finetune101.data.formats import IMAGE_SUFFIXES
from finetune101.errors import Refused

SIDE = 32  # pixels of a thumbnail's side
NEAR = 0.99  # correlation of thumbnails from which two images count as the same picture
_TWINS = ("Faces", "Faces_easy")  # Faces_easy/x is a crop of Faces/x

Thumbnails = NDArray[np.float32]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Report:
    """What ``verify`` found; paths are relative to ``root``."""

    root: Path
    class_sizes: dict[str, int]
    unreadable: dict[str, str]  # path -> reason
    truncated: dict[str, str]
    not_images: tuple[str, ...]  # an image's suffix but no image inside, or a stray file among the images
    grayscale: tuple[str, ...]
    identical: tuple[tuple[str, ...], ...]  # groups of files with the same bytes
    near: tuple[Pair, ...]  # correlation above NEAR, without the byte-identical pairs
    twins: tuple[Pair, ...]

    @property
    def images(self) -> int:
        """Number of files that should be images."""
        return sum(self.class_sizes.values())

    @property
    def bad(self) -> tuple[str, ...]:
        """Files that cannot be used for training, sorted: unreadable, truncated, or no image in spite of the suffix."""
        return tuple(sorted({*self.unreadable, *self.truncated, *(p for p in self.not_images if _is_listed(p))}))

    def text(self, most: int = 10) -> str:
        """The report for a terminal; each list ends after ``most`` entries."""
        sizes = self.class_sizes
        small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        official = (len(sizes), self.images) == (OFFICIAL_CLASSES, OFFICIAL_IMAGES)
        twins = set(self.twins)
        near = f"{len(self.near)} (correlation above {NEAR}; {len(twins.intersection(self.near))} are twins as well)"
        rows: list[tuple[str, str, list[str]]] = [
            ("unreadable", f"{len(self.unreadable)}", [f"{p}: {why}" for p, why in self.unreadable.items()]),
            ("truncated", f"{len(self.truncated)}", [f"{p}: {why}" for p, why in self.truncated.items()]),
            ("not an image", f"{len(self.not_images)}", list(self.not_images)),
            ("grayscale", f"{len(self.grayscale)}", []),
            ("byte-identical groups", f"{len(self.identical)}", [" = ".join(group) for group in self.identical]),
            ("near-duplicate pairs", near, [f"{a} ~ {b}" for a, b in self.near]),
            ("Faces/Faces_easy twins", f"{len(self.twins)}", []),
        ]
        spread = (
            f"{sizes[small]} ({small}) to {sizes[large]} ({large})" if sizes[small] < sizes[large] else sizes[small]
        )
        lines = [f"{self.root}", f"{len(sizes)} classes, {self.images:,} images, {spread} per class"]
        if official or self.root.name == FOLDER:
            counts = f"{OFFICIAL_CLASSES} classes, {OFFICIAL_IMAGES:,} images without {LEFT_OUT}"
            lines.append(f"{'as' if official else 'NOT as'} the official Caltech-101: {counts}")
        for name, count, entries in rows:
            lines.append(f"{name:<24}{count}")
            lines += [f"    {entry}" for entry in entries[:most]]
            if len(entries) > most:
                lines.append(f"    ... and {len(entries) - most} more")
        lines.append(
            f"{len(self.bad)} file(s) to repair or remove before training" if self.bad else "every image can be read"
        )
        return "\n".join(lines)


def _is_listed(path: str) -> bool:
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class _Finding:
    problem: Problem | Literal[""] = ""
    reason: str = ""
    grayscale: bool = False
    thumbnail: Thumbnails | None = None


def _standardised(picture: Picture) -> Thumbnails:
    """float32 (1024,) of mean 0 and norm 1, or zeros for a flat image."""
    gray = picture.image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(gray, np.float32).ravel()
    pixels = pixels - pixels.mean()
    norm = float(np.linalg.norm(pixels))
    return pixels / norm if norm > 1 else np.zeros_like(pixels)


def _examine(path: Path) -> _Finding:
    try:
        with opened(path, SIDE) as picture:
            return _Finding(grayscale=picture.grayscale, thumbnail=_standardised(picture))
    except Unreadable as error:
        return _Finding(error.problem, error.reason)


def _examine_all(root: Path, paths: Sequence[str], title: str) -> Iterator[_Finding]:
    findings = in_threads(_examine, (root / path for path in paths))
    yield from tqdm(findings, total=len(paths), desc=title, unit="img", leave=False)


def thumbnails(root: Path, paths: Sequence[str]) -> Thumbnails:
    """Gray 32 x 32 versions of the whole images, standardised so that a dot product is a correlation.

    Returns:
        float32 (len(paths), 1024) without NaN; a flat image is all zeros.
    Raises:
        Refused: naming an image that cannot be read.
    """
    rows = np.zeros((len(paths), SIDE * SIDE), np.float32)
    for i, found in enumerate(_examine_all(root, paths, "compare images")):
        if found.thumbnail is None:
            raise Refused(f"cannot read the image {root / paths[i]} ({found.reason}); repair or remove it")
        rows[i] = found.thumbnail
    return rows


def near_duplicates(thumbs: Thumbnails, threshold: float = NEAR) -> list[tuple[int, int]]:
    """All (i, j), i < j, in order, whose thumbnails (N, 1024) correlate above ``threshold``."""
    pairs = []
    for start in range(0, len(thumbs), 1024):
        rows, columns = np.nonzero(thumbs[start : start + 1024] @ thumbs.T > threshold)
        pairs += [(start + int(i), int(j)) for i, j in zip(rows, columns, strict=True) if start + i < j]
    return pairs


def _identical(found: Index) -> tuple[tuple[str, ...], ...]:
    same = defaultdict(list)
    for path in found.paths:
        same[found.digests[path]].append(path)
    return tuple(tuple(group) for group in same.values() if len(group) > 1)


def _twins(paths: Iterable[str]) -> tuple[Pair, ...]:
    known = set(paths)
    first, second = (f"{name}/" for name in _TWINS)
    pairs = ((path, path.replace(first, second)) for path in sorted(known) if class_of(path) == _TWINS[0])
    return tuple(pair for pair in pairs if pair[1] in known)


def duplicate_groups(index: Index) -> dict[str, str]:
    """Path -> group, the group's first path: images a split must keep on one side share a group.

    Groups join byte-identical files, near-duplicates and Faces/Faces_easy twins. The thumbnails are kept in
    ``cache_dir()`` as long as no image changes. Raises Refused naming an image that cannot be read.
    """
    near = [(index.paths[i], index.paths[j]) for i, j in near_duplicates(_cached_thumbnails(index))]
    same = [(group[0], other) for group in _identical(index) for other in group[1:]]
    group = {path: path for path in index.paths}

    def first(path: str) -> str:
        while group[path] != path:
            path = group[path]
        return path

    for a, b in (*near, *same, *_twins(index.paths)):
        low, high = sorted((first(a), first(b)))
        group[high] = low
    return {path: first(path) for path in index.paths}


def with_duplicate(index: Index, paths: Iterable[str], among: Iterable[str]) -> set[str]:
    """Those of ``paths`` that share a group of ``duplicate_groups`` with one of ``among``."""
    paths, among = tuple(paths), tuple(among)
    groups = duplicate_groups(replace(index, paths=tuple(sorted({*paths, *among}))))
    known = {groups[path] for path in among}
    return {path for path in paths if groups[path] in known}


def _cached_thumbnails(index: Index) -> Thumbnails:
    content = f"{content_hash(index.digests, index.paths)} {DECODER}"
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    place = store.Place(f"thumbnails_{SIDE}px_{key}.npy", (len(index.paths), SIDE * SIDE), np.float32)
    if kept := store.read(place):
        return kept.array
    with store.turn(place):
        if kept := store.read(place):  # another process made them meanwhile
            return kept.array
        started = time.perf_counter()
        rows = thumbnails(index.root, index.paths)
        if not store.make_room(place):
            with suppress(Refused):  # on a full disk
                what = f"{len(rows):,} images of {index.root.name} to find near-duplicates"
                store.keep(place, [rows], what, time.perf_counter() - started)
    return rows


def verify(root: Path) -> Report:
    """Read every image below ``root`` (what ``dataset.find`` returned) and every file beside them.

    Raises:
        Refused: as ``dataset.index``: fewer than two classes, or a class folder without images.
    """
    found = index(root, layout_of(root))
    findings = dict(zip(found.paths, _examine_all(root, found.paths, "verify"), strict=True))
    reasons = {
        problem: {path: f.reason for path, f in findings.items() if f.problem == problem}
        for problem in ("unreadable", "truncated", "not an image")
    }
    whole = {path: f.thumbnail for path, f in findings.items() if f.thumbnail is not None}
    names, thumbs = list(whole), np.array(list(whole.values()), np.float32).reshape(-1, SIDE * SIDE)
    pairs = [(names[i], names[j]) for i, j in near_duplicates(thumbs)]
    return Report(
        root=root,
        class_sizes=dict(sorted(Counter(class_of(path) for path in found.paths).items())),
        unreadable=reasons["unreadable"],
        truncated=reasons["truncated"],
        not_images=tuple(sorted((*reasons["not an image"], *other_files(found)))),
        grayscale=tuple(path for path, f in findings.items() if f.grayscale),
        identical=_identical(found),
        near=tuple((a, b) for a, b in pairs if found.digests[a] != found.digests[b]),
        twins=_twins(found.paths),
    )
