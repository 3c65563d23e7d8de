"""Image files as a torch ``Dataset``, for code that brings its own DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from finetune101.config import Preprocessing
from finetune101.data.batches import to_input
from finetune101.data.decode import decode
from finetune101.machine import World


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Item i: (float (3, size, size), int64 ()) of ``paths[i]`` below ``root``, through the package's preprocessing."""

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        transform: Callable[[Tensor], Tensor],
    ) -> None:
        self.root, self.paths, self.labels = root, paths, labels
        self.preprocessing, self.transform = preprocessing, transform
        self.world = World(torch.device("cpu"), "fp32", channels_last=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        pixels = decode(self.root / self.paths[i], self.preprocessing.cache_size, self.preprocessing.interpolation)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return to_input(self.transform(image)[None], self.preprocessing, self.world)[0], torch.tensor(self.labels[i])
