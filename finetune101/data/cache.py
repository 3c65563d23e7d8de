"""Decode once, read for ever: every image of a data set as uint8 pixels in one memory-mapped file."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from finetune101.config import Preprocessing
from finetune101.data import store
from finetune101.data.decode import DECODER, FILTERS, Pixels, Unreadable, decode, in_threads, unreadable
from finetune101.data.images import Index, content_hash
from finetune101.errors import Refused, escaped
from finetune101.files import cache_dir

__all__ = ["FILTERS", "Images", "Pixels", "cache_dir", "decode", "open_images", "unreadable"]


class Images:
    """The pixels of ``paths``: read from the cache file where there is one, else decoded on demand."""

    def __init__(self, root: Path, paths: Sequence[str], preprocessing: Preprocessing) -> None:
        self.root, self.paths, self.preprocessing = root, tuple(paths), preprocessing
        self.pixels: Pixels | None = None
        self.rows: dict[str, int] = {}  # path -> row of ``pixels``, which may hold more than ``paths``
        self.key = ""  # of all pixels: another one when an image changes

    def read(self, paths: Sequence[str]) -> Pixels:
        """uint8 (N, cache_size, cache_size, 3), RGB. Raises Unreadable."""
        if self.pixels is not None:
            return self.pixels[[self.rows[path] for path in paths]]
        return np.stack(list(_decoded(self.root, paths, self.preprocessing)))


def _decoded(root: Path, paths: Sequence[str], preprocessing: Preprocessing) -> Iterator[Pixels]:
    size, interpolation = preprocessing.cache_size, preprocessing.interpolation
    return in_threads(lambda path: decode(root / path, size, interpolation), paths)


def open_images(
    index: Index,
    preprocessing: Preprocessing,
    mode: str = "auto",
    skipped: Collection[str] = (),
    wanted: Iterable[str] | None = None,
) -> Images:
    """The images ``wanted`` of ``index`` (None: all) but ``skipped``; with ``mode`` "auto" from a cache.

    Where at least half of the images are wanted, the cache holds them all, so that every split of the data set reads
    the same file; else, or where an image that is not wanted cannot be read, the cache holds the wanted images. It is
    keyed by the images' content, the geometry and the version of the decoder, so a changed image makes a new one; a
    missing or damaged one is made. Where it cannot be kept (no space on the disk, more than the bound of ``store``) the
    images are decoded on demand. The time of decoding is no cost of a run, as all runs on the same images share it: it
    stands in the cache only. Raises Unreadable.
    """
    left_out, chosen = set(skipped), set(index.paths if wanted is None else wanted)
    readable = [path for path in index.paths if path not in left_out]
    images = Images(index.root, [path for path in readable if path in chosen], preprocessing)
    if mode == "off":
        return images
    sets = [list(images.paths)]
    if len(sets[0]) < len(readable) <= 2 * len(sets[0]):
        sets.insert(0, readable)
    places = [_place(index, paths, preprocessing) for paths in sets]
    for paths, (key, place) in zip(sets, places, strict=True):
        if kept := store.read_array(place, mapped=True):
            return _filled(images, kept.array, paths, key)
    for paths, (key, place) in zip(sets, places, strict=True):
        try:
            with store.turn(place):
                kept = store.read_array(place, mapped=True)  # another process may have made it meanwhile
                if kept is None and _make(place, index.root, paths, preprocessing):
                    kept = store.read_array(place, mapped=True)
        except Unreadable:
            if paths is sets[-1]:
                raise
            continue  # perhaps of an image that is not wanted
        if kept:
            return _filled(images, kept.array, paths, key)
    return images


def _place(index: Index, paths: Sequence[str], preprocessing: Preprocessing) -> tuple[str, store.Place]:
    """The key of the pixels of ``paths``, and where they are kept."""
    size, interpolation = preprocessing.cache_size, preprocessing.interpolation
    content = f"{content_hash(index.digests, paths)} {','.join(paths)} {size} {interpolation} {DECODER}"
    key = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return key, store.Place(f"images_{size}px_{key}.npy", (len(paths), size, size, 3), np.uint8)


def _filled(images: Images, pixels: Pixels, paths: Sequence[str], key: str) -> Images:
    images.pixels, images.key, images.rows = pixels, key, {path: i for i, path in enumerate(paths)}
    return images


def _make(place: store.Place, root: Path, paths: Sequence[str], preprocessing: Preprocessing) -> bool:
    """Decodes ``paths`` into the cache; False, with a line that says why, where there is no room. Raises Unreadable."""
    if reason := store.make_room(place):
        print(f"The image cache {reason}: going on without it.")
        return False
    size, interpolation = preprocessing.cache_size, preprocessing.interpolation
    hint = f" The recipe asks for {size} px; a training with --cache-size {preprocessing.size + 32} needs less."
    large = hint if size >= 2 * preprocessing.size else ""
    print(f"Decoding {len(paths)} images once into {escaped(str(place.file))} ({place.bytes / 1e9:.2f} GB).{large}")
    rows = tqdm(
        _decoded(root, paths, preprocessing), total=len(paths), desc="decode", unit="img", leave=False
    )  # fmt: skip
    try:
        store.keep_array(place, rows, f"{len(paths):,} images of {root.name}, {size} px, {interpolation}")
    except Unreadable:
        raise
    except Refused as error:  # the disk is full, or the folder may not be written
        print(f"The image cache is left out ({error}): going on without it.")
        return False
    return True
