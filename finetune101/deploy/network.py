"""A trained network to work with: classify a file, a Pillow image, an array, or a list of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune101.config import Count, Preprocessing
from finetune101.data.batches import to_input
from finetune101.data.decode import Pixels, Unreadable, decode, decode_image
from finetune101.deploy.prediction import Image, Prediction, in_batches, pillow_image
from finetune101.deploy.released import RELEASED, open_released
from finetune101.errors import Refused, escaped
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import TrainedNetwork, open_file, open_network
from finetune101.evaluation.features import FeatureExtractor
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
        pixels = torch.from_numpy(np.stack([self._pixels(image) for image in images])).permute(0, 3, 1, 2)
        return to_input(pixels, self.preprocessing, self.trained.world)

    @functools.cached_property
    def explainer(self) -> Explainer:
        """What makes the maps of ``explain``; it has a copy of the network."""
        from finetune101.deploy.explain import Explainer

        return Explainer(self.trained)

    def explain(self, image: Image, target: str | Sequence[str] | None = None, top_k: int = 1) -> Explanation:
        """Where the network looks in an image for a class, or for each of a list: by default its first ``top_k``.

        In a notebook the result is the picture beside its overlays; ``maps`` holds the numbers. After
        ``find_training_images`` it names the five nearest of these as well. Raises Refused for what is no image, and
        for a class that is not there.
        """
        from finetune101.deploy.explain import explained

        return explained(self, image, target, top_k=typed(Count, top_k, "top_k is"), training=self.training)

    def find_training_images(self, data: str | None = None) -> None:
        """Prepares the nearest training images for ``explain``: at first, one forward pass of each of them.

        ``data`` is where they are, if not where the run found them. Raises Refused where they are not there.
        """
        from finetune101.deploy.neighbours import training_images

        self.training = training_images(self.run or self.name, data)

    def _classify(self, images: Sequence[Image], top_k: int) -> list[Prediction]:
        return self._label(self.to_inputs(images), images, top_k)

    def _pixels(self, image: Image) -> Pixels:
        size, interpolation = self.preprocessing.cache_size, self.preprocessing.interpolation
        if isinstance(image, str | Path):
            try:
                return decode(Path(image), size, interpolation)
            except Unreadable as error:
                raise Refused(f"{escaped(str(image))} cannot be read ({error.reason}); leave it out") from error
        return decode_image(pillow_image(image), size, interpolation)


class Labeller:
    """Images as a network's input -> their predictions."""

    def __init__(self, network: TrainedNetwork) -> None:
        self.network = network
        self._extract = FeatureExtractor(network) if network.unlike else None
        self._forward = None if self._extract else network.forward()

    def __call__(self, x: Tensor, images: Sequence[Image], top_k: int) -> list[Prediction]:
        """The ``top_k`` most probable classes of each of ``images``, whose input is ``x`` (N, 3, size, size).

        Raises Refused when the network's output is not finite.
        """
        logits, scores = self.outputs(x)
        ranked, unlike = ranked_classes(self.network, logits, top_k), self.network.unlike
        if unlike is None or scores is None:
            return [Prediction(tuple(classes), image) for image, classes in zip(images, ranked, strict=True)]
        rows = zip(images, ranked, unlike.is_unlike(scores).tolist(), scores.tolist(), strict=True)
        return [Prediction(tuple(classes), image, flag, score) for image, classes, flag, score in rows]

    def outputs(self, x: Tensor) -> tuple[Tensor, NDArray[np.float64] | None]:
        """Logits (N, classes) on the CPU, and the scores (N,) of ``network.unlike`` where there is one."""
        if self._forward:
            return self._forward(x).cpu(), None
        assert self._extract and self.network.unlike
        features, logits = (values.cpu() for values in self._extract(x))
        return logits, self.network.unlike.score(features, logits)


def ranked_classes(network: TrainedNetwork, output: Tensor, top_k: int) -> list[list[tuple[str, float]]]:
    """(name, probability) of the ``top_k`` most probable classes for each row of the logits ``output``.

    Raises Refused when a logit is not finite.
    """
    if not bool(torch.isfinite(output).all()):
        raise Refused(f"the output of {network.name or 'the network'} is not finite; train it again")
    # of equals the first, as argmax
    order = output.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    best = metrics.probabilities(output, network.temperature or 1.0).gather(1, order)
    return [
        [(network.classes[number], share) for number, share in zip(numbers, shares, strict=True)]
        for numbers, shares in zip(order.tolist(), best.tolist(), strict=True)
    ]


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
