"""Images that show the same: copies, near-duplicates and Caltech-101's twins, as groups; in blocks and with a limit."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from finetune101.data import store
from finetune101.data.decode import DECODER, in_threads, opened
from finetune101.data.images import Index, content_hash
from finetune101.errors import Refused

SIDE = 32  # pixels of a thumbnail's side
NEAR = 0.99  # correlation of thumbnails above which two images count as the same picture
MOST = 200_000  # images that are compared by their looks; the time grows with the square of their number
BLOCK = 2048  # thumbnails that are compared with as many at a time
_COARSE = 8  # side of the thumbnails that rule pairs out
_TWINS = ("Faces", "Faces_easy")  # Faces_easy/x is a crop of Faces/x

Thumbnails = NDArray[np.uint8]
Labels = NDArray[np.int64]
Group = tuple[str, ...]


def thumbnail(image: Image.Image) -> Thumbnails:
    """uint8 (1024,): the whole RGB image in gray, 32 x 32 pixels."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)).ravel()


def thumbnails(root: Path, paths: Sequence[str]) -> Thumbnails:
    """uint8 (len(paths), 1024): the thumbnail of each image. Raises Refused naming an image that cannot be read."""

    def read(path: str) -> Thumbnails:
        with opened(root / path, SIDE) as picture:
            return thumbnail(picture.image)

    rows = np.zeros((len(paths), SIDE * SIDE), np.uint8)
    progress = tqdm(in_threads(read, paths), total=len(paths), desc="compare images", unit="img", leave=False)
    for i, row in enumerate(progress):
        rows[i] = row
    return rows


def standardised(thumbs: Thumbnails) -> NDArray[np.float32]:
    """float32 (N, 1024), each row of mean 0 and norm 1, so that a dot product is a correlation; 0 for flat images."""
    rows = thumbs.astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows[norms[:, 0] <= 1] = 0
    np.divide(rows, norms, out=rows, where=norms > 1)
    return rows


def near_labels(thumbs: Thumbnails, threshold: float = NEAR) -> Labels:
    """int64 (N,): a number for each thumbnail (N, 1024), the same where correlations above ``threshold`` join them.

    A pair of blocks that already is one group is not compared. Averages over 4 x 4 pixels rule most pairs out: from a
    and b of norm 1 they take a distance that is never above that of a and b.
    """
    labels = np.arange(len(thumbs))
    starts = range(0, len(thumbs), BLOCK)
    pairs = [(a, b) for a in starts for b in starts if a <= b]
    pairs.sort(key=lambda pair: pair[1] - pair[0])  # within the blocks first: similar images become one group early
    coarse = _coarse(thumbs)
    norms = (coarse**2).sum(1)
    for a, b in tqdm(pairs, desc="compare images", unit="block", leave=False, disable=len(pairs) < 100):
        first, second = slice(a, a + BLOCK), slice(b, b + BLOCK)
        if a != b and (labels[first] == labels[a]).all() and (labels[second] == labels[a]).all():
            continue
        # |a - b|² = 2 - 2 correlation; a little wider, for the rounding
        bound = (norms[first, None] + norms[None, second]) / 2 - (1 - threshold) - 1e-3
        near = coarse[first] @ coarse[second].T > bound
        if np.count_nonzero(near) > BLOCK:
            near = standardised(thumbs[first]) @ standardised(thumbs[second]).T > threshold
        else:
            rows, columns = np.nonzero(near)
            one, other = standardised(thumbs[rows + a]), standardised(thumbs[columns + b])
            near[rows, columns] = np.einsum("nd,nd->n", one, other) > threshold
        labels = _merged(labels, near, first, second)
    return labels


def _merged(labels: Labels, near: NDArray[np.bool_], first: slice, second: slice) -> Labels:
    """``labels`` after the images of two blocks that are ``near`` each other, bool (n, m), became one group each."""
    while True:
        near = near & (labels[first, None] != labels[None, second])
        rows = np.flatnonzero(near.any(1))
        if not len(rows):
            return labels
        columns = near[rows].argmax(1)  # one of its pairs for each image: few edges, also where all are near
        labels = _components(labels[rows + first.start], labels[columns + second.start], len(labels))[labels]


def _components(starts: Labels, ends: Labels, count: int) -> Labels:
    """int64 (count,): a number for each of the nodes 0 to ``count``, the same for nodes that edges connect."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(starts), bool), (starts, ends)), shape=(count, count))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def _coarse(thumbs: Thumbnails) -> NDArray[np.float32]:
    """float32 (N, 64): the standardised thumbnails' averages over 4 x 4 pixels, scaled as an orthonormal projection."""
    side, parts = SIDE // _COARSE, []
    for start in range(0, len(thumbs), BLOCK):
        rows = standardised(thumbs[start : start + BLOCK]).reshape(-1, _COARSE, side, _COARSE, side)
        parts.append(rows.sum((2, 4)).reshape(len(rows), -1) / side)
    return np.concatenate(parts) if parts else np.zeros((0, _COARSE**2), np.float32)


def identical(index: Index) -> tuple[Group, ...]:
    """Groups of files with the same bytes, each in order."""
    same: dict[str, list[str]] = defaultdict(list)
    for path in index.paths:
        same[index.digests[path]].append(path)
    return tuple(tuple(group) for group in same.values() if len(group) > 1)


def twins(paths: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of images in Faces and Faces_easy that are the same photo."""
    present = set(paths)
    first, second = (f"/{name}/" for name in _TWINS)
    photos = (path for path in sorted(present) if first in f"/{path}")
    pairs = ((path, f"/{path}".replace(first, second)[1:]) for path in photos)
    return tuple(pair for pair in pairs if pair[1] in present)


def near_groups(paths: Sequence[str], thumbs: Thumbnails) -> tuple[Group, ...]:
    """Groups of ``paths`` whose thumbnails (N, 1024) look the same; none where there are more than ``MOST``."""
    if len(paths) > MOST:
        return ()
    groups: dict[int, list[str]] = defaultdict(list)
    for path, label in zip(paths, near_labels(thumbs).tolist(), strict=True):
        groups[label].append(path)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def joined(paths: Sequence[str], groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Path -> the first path, by code point, of all paths that ``groups`` join with it (itself included)."""
    number = {path: i for i, path in enumerate(sorted(paths))}
    edges = [(number[group[0]], number[other]) for group in groups for other in group[1:]]
    starts, ends = np.array(edges, np.int64).reshape(-1, 2).T
    label = dict(zip(number, _components(starts, ends, len(number)).tolist(), strict=True))
    first = {label[path]: path for path in reversed(number)}
    return {path: first[label[path]] for path in paths}


def duplicate_groups(index: Index) -> dict[str, str]:
    """Path -> group, the group's first path: images a split must keep on one side share a group.

    Groups join byte-identical files, near-duplicates and Faces/Faces_easy twins. The thumbnails are kept in
    ``cache_dir()`` as long as no image changes. Raises Refused naming an image that cannot be read.
    """
    near: tuple[Group, ...] = ()
    if len(index.paths) > MOST:
        print(f"More than {MOST:,} images: near-duplicates are not looked for, only files with the same bytes.")
    else:
        near = near_groups(index.paths, _kept_thumbnails(index))
    return joined(index.paths, (*near, *identical(index), *twins(index.paths)))


def with_duplicate(index: Index, paths: Iterable[str], among: Iterable[str]) -> set[str]:
    """The ``paths`` that share a group of ``duplicate_groups`` with a path of ``among``."""
    paths, among = tuple(paths), tuple(among)
    groups = duplicate_groups(replace(index, paths=tuple(sorted({*paths, *among}))))
    their_groups = {groups[path] for path in among}
    return {path for path in paths if groups[path] in their_groups}


def _kept_thumbnails(index: Index) -> Thumbnails:
    content = f"{content_hash(index.digests, index.paths)} {DECODER}"
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    place = store.Place(f"thumbnails_{SIDE}px_{key}.npy", (len(index.paths), SIDE * SIDE), np.uint8)
    if kept := store.read_array(place):
        return kept.array
    with store.turn(place):
        if kept := store.read_array(place):  # another process made them meanwhile
            return kept.array
        started = time.perf_counter()
        rows = thumbnails(index.root, index.paths)
        if not store.make_room(place):
            with suppress(Refused):  # on a full disk
                what = f"{len(rows):,} images of {index.root.name} to find near-duplicates"
                store.keep_array(place, [rows], what, time.perf_counter() - started)
    return rows
