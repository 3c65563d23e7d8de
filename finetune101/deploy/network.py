"""A trained network to work with: classify a file, a Pillow image, an array, or a list of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune101.config import Count, Preprocessing
from finetune101.data.batches import to_input
from finetune101.deploy.labels import Labeller, ranked_classes
from finetune101.deploy.prediction import Image, Prediction, cached_pixels, in_batches, thumbnail_of
from finetune101.deploy.released import open_released
from finetune101.deploy.released_files import RELEASED
from finetune101.evaluation.checkpoint import TrainedNetwork, open_file, open_network
from finetune101.files import typed
from finetune101.run import Run, open_run, run_name

if TYPE_CHECKING:
    from finetune101.deploy.explain import Explainer, Explanation
    from finetune101.deploy.export import Exported, Format
    from finetune101.deploy.neighbours import TrainingImages


class Network:
    """A trained network, ready for images: ``load`` opens one."""

    def __init__(self, trained: TrainedNetwork, run: Run | None = None) -> None:
        self.trained, self.run = trained, run
        self.forward = trained.forward()
        self.training: TrainingImages | None = None
        """What ``explain`` looks for the nearest training images in: see ``find_training_images``."""
        self._label = Labeller(trained)

    @property
    def name(self) -> str:
        """The folder of its run, its file, or the name of a released network."""
        return self.trained.name

    @property
    def classes(self) -> list[str]:
        """The names of its classes, in the order of its output."""
        return list(self.trained.classes)

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns an image into its input."""
        return self.trained.preprocessing

    def __repr__(self) -> str:
        size = self.preprocessing.size
        return f"Network({self.name}: {len(self.trained.classes)} classes, images of {size} x {size} pixels)"

    def predict(
        self, images: Image | Sequence[Image], top_k: int = 5, batch_size: int = 64
    ) -> Prediction | list[Prediction]:
        """The ``top_k`` most probable classes of an image, or of each of a list; probabilities are calibrated.

        Args:
            images: a file, a Pillow image, an array (H, W, 3) or (H, W) of uint8, or a list of them.
            top_k: with fewer classes, all are given.
            batch_size: images per forward pass.

        Raises Refused for what is no image, for numbers below 1, and where the network's output is not finite.
        """
        return in_batches(images, top_k, batch_size, self._classify)

    def export(
        self,
        out: str | os.PathLike[str] | None = None,
        format: Format = "onnx",
        *,
        resized: bool = False,
        parity: str | None = None,
        data: str | None = None,
        overwrite: bool = False,
    ) -> Exported:
        """Writes the network as one file for other programs; see ``deploy.export.export_network``.

        ``data`` is the folder of the images that it was trained on, if not where its run found them.
        """
        from finetune101.deploy.export import export_network, open_source, usual_file

        source = open_source(self.run or self.name, data)
        file = usual_file(source, format) if out is None else Path(out)
        return export_network(source, file, format=format, resized=resized, parity=parity, overwrite=overwrite)

    def logits(self, images: Sequence[Image]) -> Tensor:
        """Outputs of the network, float (N, classes), before temperature and softmax. Raises Refused for no image."""
        return self.forward(self.to_inputs(images)).cpu()

    def to_inputs(self, images: Sequence[Image]) -> Tensor:
        """Images as float (N, 3, size, size) on the network's device. Raises Refused for no image."""
        own = self.preprocessing
        pixels = torch.from_numpy(np.stack([cached_pixels(image, own) for image in images])).permute(0, 3, 1, 2)
        return to_input(pixels, own, self.trained.world)

    @functools.cached_property
    def explainer(self) -> Explainer:
        """What makes the maps of ``explain``; it has a copy of the network."""
        from finetune101.deploy.explain import Explainer

        return Explainer(self.trained)

    def explain(
        self, image: Image, target: str | Sequence[str] | None = None, top_k: int = 1, neighbours: int = 5
    ) -> Explanation:
        """Where the network looks in an image for a class, or for each of a list: by default its first ``top_k``.

        In a notebook the result is the picture beside its overlays; ``maps`` holds the numbers. After
        ``find_training_images`` it names the ``neighbours`` nearest of these as well. Probabilities are those of
        ``predict``. Raises Refused for what is no image, and for a class that is not there.
        """
        from finetune101.deploy.explain import SIDE, Explanation, class_numbers

        top_k, names = typed(Count, top_k, "top_k is"), [target] if isinstance(target, str) else list(target or ())
        numbers = class_numbers(names, self.classes)
        x, near = self.to_inputs([image]), []
        if self.training:
            features, output = self.training.extract(x)
            near = self.training.nearest(features, neighbours)[0]
        else:
            output = self.forward(x)
        ranked = ranked_classes(self.trained, output.cpu(), len(self.trained.classes))[0]
        numbers = numbers or class_numbers([name for name, _ in ranked[:top_k]], self.classes)
        chances = dict(ranked)
        classes = tuple((self.trained.classes[number], chances[self.trained.classes[number]]) for number in numbers)
        return Explanation(thumbnail_of(image, SIDE), classes, self.explainer.maps(x, numbers), tuple(near))

    def find_training_images(self, data: str | None = None) -> None:
        """Prepares the nearest training images for ``explain``: at first, one forward pass of each of them.

        ``data`` is where they are, if not where the run found them. Raises Refused where they are not there.
        """
        from finetune101.deploy.neighbours import training_images

        self.training = training_images(self.run or self.name, data)

    def _classify(self, images: Sequence[Image], top_k: int) -> list[Prediction]:
        return self._label(self.to_inputs(images), images, top_k)


def load(run: str | Path | Run | Network, runs: str = "runs") -> Network:
    """The network of a run (its object, folder or name), of a best.safetensors, or a released one by its name.

    Raises Refused when there is none, or it is damaged.
    """
    if isinstance(run, Network):
        return run
    if isinstance(run, Run):
        return Network(open_network(run), run)
    name = run_name(run)
    if name in RELEASED:
        return Network(open_released(name)[0])
    if name.endswith(".safetensors") and Path(name).is_file():
        return Network(open_file(Path(name)))
    opened = open_run(name, runs)
    return Network(open_network(opened), opened)
