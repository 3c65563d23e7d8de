"""The training images that a network finds most alike to a picture: by the cosine of their features."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from finetune101.data.cache import open_images
from finetune101.data.decode import Unreadable, opened
from finetune101.data.images import class_of
from finetune101.deploy.released import open_reference, open_released
from finetune101.deploy.released_files import RELEASED
from finetune101.errors import Refused
from finetune101.evaluation.evaluate import Opened, open_scored, trained_on
from finetune101.evaluation.features import FeatureExtractor
from finetune101.run import Run

SEED = 0
PER_CLASS = 25  # training images: a minute for a hundred classes


@dataclass(frozen=True)
class Neighbour:
    """A training image that is near to a picture."""

    file: Path
    label: str
    """Its class."""
    distance: float
    """1 - cosine of the two images' features: 0 for equal ones, at most 2."""

    def thumbnail(self, side: int) -> Image.Image | None:
        """A small copy whose longer side has ``side`` pixels at most; None where it cannot be read any more."""
        try:
            with opened(self.file, side) as picture:
                small = picture.image.copy()
        except Unreadable:
            return None
        small.thumbnail((side, side))
        return small


class TrainingImages:
    """Images that a network was trained on, by their features, which are kept in the cache folder.

    All of them where their features are there already, as after ``evaluate``. Else at most ``PER_CLASS`` of each class,
    the same each time, and the first use takes one forward pass of each.
    """

    def __init__(self, scored: Opened, extract: FeatureExtractor | None = None) -> None:
        self.root, self.paths = scored.index.root, list(trained_on(scored.manifest, scored.config))
        self.total = len(self.paths)
        self.extract = extract or FeatureExtractor(scored.network)
        wanted, skipped = (
            (path for paths in scored.manifest.subsets.values() for path in paths),
            scored.manifest.skipped,
        )
        images = open_images(scored.index, scored.network.preprocessing, scored.config.cache, skipped, wanted)
        if not self.extract.has_kept(images, self.paths):
            rounds = class_rounds([class_of(path) for path in self.paths])[:PER_CLASS]
            self.paths = [self.paths[place] for place in sorted(itertools.chain(*rounds))]
        self._features = F.normalize(self.extract.of_images(images, self.paths)[0])

    def __str__(self) -> str:
        if len(self.paths) == self.total:
            return f"all {self.total:,} training images"
        return f"{len(self.paths):,} of {self.total:,} training images, at most {PER_CLASS} of each class"

    def nearest(self, features: Tensor, count: int) -> list[list[Neighbour]]:
        """The ``count`` nearest training images of each row of ``features`` (N, D), nearest first."""
        likeness = F.normalize(features.float().cpu()) @ self._features.T
        values, places = likeness.topk(min(count, len(self.paths)), dim=1)
        return [
            [self._neighbour(place, 1 - value) for place, value in zip(*row, strict=True)]
            for row in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def _neighbour(self, place: int, distance: float) -> Neighbour:
        path = self.paths[place]
        return Neighbour(self.root / path, class_of(path), max(0.0, distance))


def training_images(run: Run | str, data: str | None = None) -> TrainingImages:
    """The training images of a run, or of the released network of this name; ``data`` is where they are now.

    Raises Refused when they are not there, or are others.
    """
    if isinstance(run, Run):
        return TrainingImages(open_scored(run, data))
    if run not in RELEASED:
        raise Refused(f"{run} does not say which images it was trained on; name its run, or add --neighbours 0")
    network, info = open_released(run)
    return TrainingImages(open_reference(network, data, run, info.split))


def class_rounds(labels: Sequence[Hashable]) -> list[list[int]]:
    """The places 0, 1, … of ``labels`` in rounds: the first round holds one image of every class, the second another.

    Which image of a class, and the order of the classes in a round, are random with a fixed seed. A class with fewer
    images than rounds is missing in the last ones.
    """
    rounds: list[list[int]] = []
    images: dict[Hashable, int] = {}
    for place in np.random.default_rng(SEED).permutation(len(labels)).tolist():
        number = images.get(labels[place], 0)
        images[labels[place]] = number + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(place)
    return rounds
