"""Image files that belong to no data set, as a network's input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune101.config import Preprocessing
from finetune101.data.batches import to_input
from finetune101.data.decode import Pixels, Unreadable, decode, in_threads
from finetune101.machine import World

Failure = tuple[str, str]
"""A path as given, and why there is no image in it."""


def decoded(
    files: Sequence[str], preprocessing: Preprocessing, world: World, batch_size: int, failed: list[Failure]
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of those ``files`` that can be read and their input (N, 3, size, size); the others go to ``failed``."""
    for paths, pixels in decoded_pixels(files, preprocessing, batch_size, failed):
        yield paths, to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2), preprocessing, world)


def decoded_pixels(
    files: Sequence[str], preprocessing: Preprocessing, batch_size: int, failed: list[Failure]
) -> Iterator[tuple[list[str], Pixels]]:
    """As ``decoded``, with pixels uint8 (N, cache_size, cache_size, 3)."""

    def pixels_of(file: str) -> Pixels | str:
        try:
            return decode(Path(file), preprocessing.cache_size, preprocessing.interpolation)
        except Unreadable as error:
            return error.reason

    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        results = dict(zip(part, in_threads(pixels_of, part), strict=True))
        failed += [(file, result) for file, result in results.items() if isinstance(result, str)]
        pixels = {file: result for file, result in results.items() if not isinstance(result, str)}
        if pixels:
            yield list(pixels), np.stack(list(pixels.values()))
