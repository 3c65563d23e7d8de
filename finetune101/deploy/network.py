"""A trained network to work with: classify a file, a Pillow image, an array, or a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from finetune101.config import Count, Preprocessing
from finetune101.data.batches import to_input
from finetune101.data.decode import Pixels, Unreadable, decode, decode_image
from finetune101.deploy.prediction import IMAGES, Image, Prediction, pillow_image
from finetune101.deploy.released import RELEASED, open_released
from finetune101.errors import Refused, escaped
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import TrainedNetwork, open_file, open_network
from finetune101.evaluation.features import FeatureExtractor
from finetune101.files import typed
from finetune101.run import Run, open_run, run_name


class Network:
    """A trained network, ready for images: ``load`` opens one."""

    def __init__(self, trained: TrainedNetwork) -> None:
        self.trained = trained
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
        top_k = typed(Count, top_k, "top_k is")
        batch_size = typed(Count, batch_size, "batch_size is")
        if isinstance(images, str | Path | Pillow.Image | np.ndarray):
            return self._classify([images], top_k)[0]
        if isinstance(images, bytes | bytearray) or not isinstance(images, Iterable):
            raise Refused(f"{type(images).__name__} is no image; {IMAGES}")
        several = list(images)
        starts = range(0, len(several), batch_size)
        return [one for start in starts for one in self._classify(several[start : start + batch_size], top_k)]

    def logits(self, images: Sequence[Image]) -> Tensor:
        """Outputs of the network, float (N, classes), before temperature and softmax. Raises Refused for no image."""
        return self._label.outputs(self._input(images))[0]

    def _classify(self, images: Sequence[Image], top_k: int) -> list[Prediction]:
        return self._label(self._input(images), images, top_k)

    def _input(self, images: Sequence[Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([self._pixels(image) for image in images])).permute(0, 3, 1, 2)
        return to_input(pixels, self.preprocessing, self.trained.world)

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
        return Network(open_network(run))
    name = run_name(run)
    if name in RELEASED:
        return Network(open_released(name)[0])
    if name.endswith(".safetensors") and Path(name).is_file():
        return Network(open_file(Path(name)))
    return Network(open_network(open_run(name, runs)))
