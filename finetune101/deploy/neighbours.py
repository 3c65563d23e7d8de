"""The training images that a network finds most alike to a picture: by the cosine of their features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from finetune101.data.cache import open_images
from finetune101.data.decode import Unreadable, opened
from finetune101.data.images import class_of
from finetune101.deploy.choose import RELEASED
from finetune101.deploy.released import open_reference, open_released
from finetune101.errors import Refused
from finetune101.evaluation.evaluate import Opened, open_scored, trained_on
from finetune101.evaluation.features import FeatureExtractor
from finetune101.run import Run


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
    """The images that a network was trained on, by their features, which are kept in the cache folder.

    Their first use takes one forward pass of each image.
    """

    def __init__(self, scored: Opened, extract: FeatureExtractor | None = None) -> None:
        self.root, self.paths = scored.index.root, trained_on(scored.manifest, scored.config)
        self.extract = extract or FeatureExtractor(scored.network)
        wanted, skipped = (
            (path for paths in scored.manifest.subsets.values() for path in paths),
            scored.manifest.skipped,
        )
        images = open_images(scored.index, scored.network.preprocessing, scored.config.cache, skipped, wanted)
        self._features = F.normalize(self.extract.of_images(images, self.paths)[0])

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
