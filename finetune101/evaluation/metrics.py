"""Numbers from outputs: accuracies with their uncertainty and paired tests of two networks on the same images.

Accuracies and their intervals are in percent, differences in percentage points.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

Integers: TypeAlias = Tensor | npt.ArrayLike
Booleans: TypeAlias = Tensor | npt.ArrayLike


def top_k(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of images whose label is among the ``k`` highest outputs.

    ``logits`` N x C, ``labels`` N class indices. With fewer than ``k`` classes all of them count.
    Raises ValueError when there are no images.
    """
    _same_images(len(logits), len(labels))
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100.0 * int((best == labels[:, None]).sum()) / len(labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy in nats: ``logits`` N x C before the softmax, ``labels`` N class indices."""
    _same_images(len(logits), len(labels))
    return float(F.cross_entropy(logits.double(), labels))


def mean_per_class(predictions: Integers, labels: Integers, num_classes: int) -> float:
    """Mean over classes of the percent of a class's images that are right; both arguments are N class indices.

    Classes without images are left out. Raises ValueError when there are no images.
    """
    predicted, true = np.asarray(predictions), np.asarray(labels)
    _same_images(len(predicted), len(true))
    images = np.bincount(true, minlength=num_classes)
    right = np.bincount(true[predicted == true], minlength=num_classes)
    present = images > 0
    return float(100.0 * np.mean(right[present] / images[present]))


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in percent.

    Source: E. B. Wilson, "Probable inference", JASA 22 (1927). Raises ValueError unless 0 <= successes <= n, n >= 1.
    """
    if not (n >= 1 and 0 <= successes <= n):
        raise ValueError(f"{successes} of {n} is no proportion; give at least one image")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(confidence_level=level, method="wilson")
    return 100.0 * float(interval.low), 100.0 * float(interval.high)


def mcnemar_exact(a_correct: Booleans, b_correct: Booleans) -> float:
    """Two-sided p of McNemar's exact test that two networks are equally often right on the same N images.

    Only the images that one of the two gets right count; 1.0 when there are none.
    Source: Q. McNemar, Psychometrika 12 (1947); exact binomial form.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    _same_images(len(a), len(b))
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    a_correct: Booleans, b_correct: Booleans, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy of a minus accuracy of b on the same N images, in points, with its percentile bootstrap interval.

    Returns (difference, low, high). Resampling whole images keeps each pair together.
    Source: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    _same_images(len(a), len(b))
    n = len(a)
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    # An image adds +1, -1 or 0, so drawing n images is drawing the three counts.
    shares = np.array([only_a, only_b, n - only_a - only_b]) / n
    counts = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    differences = 100.0 * (counts[:, 0] - counts[:, 1]) / n
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return 100.0 * (only_a - only_b) / n, float(low), float(high)


def _same_images(a: int, b: int) -> None:
    """Raises ValueError when there are no images, or one side has more of them."""
    if a != b:
        raise ValueError(f"{a} and {b} images cannot be compared; give both for the same images")
    if a == 0:
        raise ValueError("there are no images to score; check the split for an empty subset")
