"""Image files that belong to no data set, as a network's input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finetune101.config import Preprocessing
from finetune101.data.batches import to_input
from finetune101.data.decode import photo_reader
from finetune101.host import usable_cores
from finetune101.machine import World
from finetune101.standalone import decoded_passes

Failure = tuple[str, str]
"""A path as given, and why there is no image in it."""


def decoded(
    files: Sequence[str], preprocessing: Preprocessing, world: World, batch_size: int, failed: list[Failure]
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of those ``files`` that can be read and their input (N, 3, size, size); the others go to ``failed``."""
    read = photo_reader(preprocessing.cache_size, preprocessing.interpolation)
    for paths, pixels in decoded_passes(read, files, failed, batch_size, usable_cores()):
        yield paths, to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2), preprocessing, world)
