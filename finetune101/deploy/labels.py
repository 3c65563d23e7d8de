"""What a network says of images that are its input already: classes by their probability, and whether it is unlike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune101.deploy.prediction import Image, Prediction
from finetune101.errors import Refused
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.features import FeatureExtractor


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
