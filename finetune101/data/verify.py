"""Read every image of a data set and report what is wrong or double in it; edits nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from finetune101.data import duplicates
from finetune101.data.decode import Problem, Unreadable, in_threads, opened
from finetune101.data.duplicates import MOST, NEAR, SIDE, Group, Thumbnails, thumbnail
from finetune101.data.images import (
    FOLDER,
    LEFT_OUT,
    OFFICIAL_CLASSES,
    OFFICIAL_IMAGES,
    class_of,
    index_images,
    index_notes,
)
from finetune101.data.layouts import OWN
from finetune101.errors import escaped


@dataclass(frozen=True)
class Report:
    """What ``verify`` found; paths are relative to ``root``."""

    root: Path
    class_sizes: dict[str, int]
    unreadable: dict[str, str]  # path -> reason
    truncated: dict[str, str]
    not_images: tuple[str, ...]  # an image's suffix but no image inside
    left_out: Mapping[str, tuple[str, ...]]  # reason -> files that training does not use
    notes: tuple[str, ...]  # lines on the folders: subsets, classes
    odd_names: tuple[str, ...]  # paths that are not UTF-8 or hold control characters
    grayscale: tuple[str, ...]
    identical: tuple[Group, ...]  # of files with the same bytes
    near: tuple[Group, ...]  # of images joined by correlations above NEAR, where not all bytes are the same
    twins: tuple[tuple[str, str], ...]

    @property
    def images(self) -> int:
        """Number of files that should be images."""
        return sum(self.class_sizes.values())

    @property
    def bad(self) -> tuple[str, ...]:
        """Files that cannot be used for training, sorted: unreadable, truncated, or no image in spite of the suffix."""
        return tuple(sorted({*self.unreadable, *self.truncated, *self.not_images}))

    def text(self, most: int = 10) -> str:
        """The report for a terminal; each list ends after ``most`` entries."""
        sizes = self.class_sizes
        small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        official = (len(sizes), self.images) == (OFFICIAL_CLASSES, OFFICIAL_IMAGES)
        near = f"{len(self.near)} (correlation above {NEAR})"
        if self.images > MOST:
            near = f"not looked for among more than {MOST:,} images"
        rows: list[tuple[str, str, Sequence[str]]] = [
            ("unreadable", f"{len(self.unreadable)}", [f"{p}: {why}" for p, why in self.unreadable.items()]),
            ("truncated", f"{len(self.truncated)}", [f"{p}: {why}" for p, why in self.truncated.items()]),
            ("not an image", f"{len(self.not_images)}", self.not_images),
            *((f"left out: {reason}", f"{len(paths)}", paths) for reason, paths in self.left_out.items()),
            *(
                [("names not in UTF-8 or with control characters", f"{len(self.odd_names)}", self.odd_names)]
                if self.odd_names
                else []
            ),
            ("grayscale", f"{len(self.grayscale)}", []),
            ("byte-identical groups", f"{len(self.identical)}", [_joined(group, " = ") for group in self.identical]),
            ("near-duplicate groups", near, [_joined(group, " ~ ") for group in self.near]),
            ("Faces/Faces_easy twins", f"{len(self.twins)}", []),
        ]
        spread = f"{sizes[small]}"
        if sizes[small] < sizes[large]:
            spread = f"{sizes[small]} ({escaped(small)}) to {sizes[large]} ({escaped(large)})"
        lines = [escaped(str(self.root)), f"{len(sizes)} classes, {self.images:,} images, {spread} per class"]
        if official or self.root.name == FOLDER:
            counts = f"{OFFICIAL_CLASSES} classes, {OFFICIAL_IMAGES:,} images without {LEFT_OUT}"
            lines.append(f"{'as' if official else 'NOT as'} the official Caltech-101: {counts}")
        lines += self.notes
        for name, count, entries in rows:
            lines.append(f"{name:<24}{count}" if len(name) < 24 else f"{name}: {count}")
            lines += [f"    {escaped(entry)}" for entry in entries[:most]]
            if len(entries) > most:
                lines.append(f"    ... and {len(entries) - most} more")
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        unused = sum(len(paths) for reason, paths in self.left_out.items() if reason != OWN)
        also = f"; {unused} file(s) are left out, see above" if unused else ""
        if self.bad:
            return f"{len(self.bad)} file(s) to repair or remove before training{also}"
        return f"every image that is used can be read{also}" if also else "every image can be read"


def _joined(group: Group, between: str, most: int = 6) -> str:
    more = f"{between}... ({len(group)} in all)" if len(group) > most else ""
    return between.join(group[:most]) + more


@dataclass(frozen=True)
class _Finding:
    problem: Problem | Literal[""] = ""
    reason: str = ""
    grayscale: bool = False
    thumbnail: Thumbnails | None = None


def _examine(path: Path) -> _Finding:
    try:
        with opened(path, SIDE) as picture:
            return _Finding(grayscale=picture.grayscale, thumbnail=thumbnail(picture.image))
    except Unreadable as error:
        return _Finding(error.problem, error.reason)


def _examine_all(root: Path, paths: Sequence[str], title: str) -> Iterator[_Finding]:
    findings = in_threads(_examine, (root / path for path in paths))
    yield from tqdm(findings, total=len(paths), desc=title, unit="img", leave=False)


def verify(root: Path, ours: Sequence[str] = ()) -> Report:
    """Read every image below ``root`` (what ``find_data`` returned) and report what is wrong, double or not used.

    ``ours`` are folders of runs, which are no classes.

    Raises:
        Refused: as ``index_images``: fewer than two classes, or a class folder without images.
    """
    index = index_images(root, fresh=True, ours=ours)
    reasons: dict[str, dict[str, str]] = {"unreadable": {}, "truncated": {}, "not an image": {}}
    thumbs = np.zeros((len(index.paths), SIDE * SIDE), np.uint8)
    whole: list[str] = []
    grayscale: list[str] = []
    for path, finding in zip(index.paths, _examine_all(root, index.paths, "verify"), strict=True):
        if finding.thumbnail is None:
            reasons[finding.problem][path] = finding.reason
            continue
        thumbs[len(whole)] = finding.thumbnail
        whole.append(path)
        if finding.grayscale:
            grayscale.append(path)
    near = duplicates.near_groups(whole, thumbs[: len(whole)])
    return Report(
        root=root,
        class_sizes=dict(sorted(Counter(class_of(path) for path in index.paths).items())),
        unreadable=reasons["unreadable"],
        truncated=reasons["truncated"],
        not_images=tuple(reasons["not an image"]),
        left_out=index.left_out,
        notes=tuple(index_notes(replace(index, left_out={}))),
        odd_names=tuple(path for path in index.paths if escaped(path) != path),
        grayscale=tuple(grayscale),
        identical=duplicates.identical(index),
        near=tuple(group for group in near if len({index.digests[path] for path in group}) > 1),
        twins=duplicates.twins(index.paths),
    )
