"""The second resize of a picture, from the cache's size to the network's, to the last bit; knows no torch.

``data.batches.resized`` does it by torchvision: whole numbers as weights, columns first, then rows, each rounded to
8 bits. The same numbers give the same pixels in NumPy and in an exported graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune101.config import Preprocessing

WEIGHT_BITS = 15  # of a weight as a whole number
MOST_PRECISION = 22
EXACT = 2**24  # whole numbers up to here are exact in single precision


@dataclass(frozen=True)
class ResizeWeights:
    """``matrix`` (target, source) of whole numbers; a pixel is their sum over ``2 ** precision``, rounded half up."""

    matrix: NDArray[np.floating]
    precision: int

    @property
    def divisor(self) -> int:
        """What the sums are divided by."""
        return int(2**self.precision)


@functools.cache
def resize_weights(source: int, target: int, interpolation: str) -> ResizeWeights:
    """The weights that torchvision's antialiased resize of 8-bit images has, for one side of ``source`` pixels.

    A triangle for "bilinear", the cubic kernel with a = -0.5 for "bicubic", stretched where the picture shrinks
    (Pillow's filters); as whole numbers of the greatest precision that fits into ``WEIGHT_BITS``.
    """
    reach = 2 if interpolation == "bicubic" else 1
    scale = source / target
    stretch = max(scale, 1.0)
    shares = np.zeros((target, source))
    for row in range(target):
        center, support = scale * (row + 0.5), reach * stretch
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), source)
        distances = np.abs(np.arange(first, last) - center + 0.5) / stretch
        values = _cubic(distances) if reach == 2 else np.maximum(0.0, 1 - distances)
        shares[row, first:last] = values / values.sum()
    precision = 0
    while precision < MOST_PRECISION and int(0.5 + shares.max() * 2 ** (precision + 1)) < 2**WEIGHT_BITS:
        precision += 1
    whole = np.trunc(shares * 2**precision + np.where(shares < 0, -0.5, 0.5))
    exact = 255 * np.abs(whole).sum(1).max() < EXACT
    return ResizeWeights(whole.astype(np.float32 if exact else np.float64), precision)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a = -0.5  # Keys, 1981
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_pixels(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """uint8 (cache_size, cache_size, 3) -> (size, size, 3), as ``data.batches.resized`` does it."""
    size, source = preprocessing.size, pixels.shape[0]
    if source == size:
        return pixels
    weights = resize_weights(source, size, preprocessing.interpolation)
    columns = _rounded(np.matmul(weights.matrix, pixels.astype(weights.matrix.dtype)), weights)
    rows = _rounded(weights.matrix @ columns.reshape(source, -1), weights)
    return rows.reshape(size, size, 3).astype(np.uint8)


def _rounded(sums: NDArray[np.floating], weights: ResizeWeights) -> NDArray[np.floating]:
    halves = weights.divisor / 2
    return np.clip(np.floor((sums + halves) / weights.divisor), 0, 255)
