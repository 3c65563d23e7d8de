"""How unlike its training images an image is, by the features of a trained network; knows no torch.

The score adds two parts: how far the features point away from the nearest class mean (a nearest-neighbour distance of
normalised features, Sun et al., 2022, with one neighbour per class), and how far the maximum probability is from 1
(Hendrycks & Gimpel, 2017). benchmarks/unlike.py compares it with other scores; docs/unlike.md has the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from finetune101.errors import Refused, escaped, shortened
from finetune101.files import atomic

UNLIKE = "unlike.safetensors"
"""The file of a run that holds its score."""
KEPT = 0.95  # share of the validation images that the threshold keeps
PROBABILITY = 0.3  # weight of the maximum probability
FEWEST = 20  # validation images: the threshold lets one of so many go
MOST_BYTES = 2**28
REMEDY = "remove it, and evaluate the run again"


@dataclass(frozen=True)
class Unlike:
    """A score of features, and the threshold above which an image is unlike the training images."""

    means: NDArray[np.float16]
    """(classes, D): the mean direction of each class that has training images, of length 1."""
    threshold: float
    images: int = 0
    """Number of validation images that the threshold was found on."""

    def score(self, features: ArrayLike, logits: ArrayLike) -> NDArray[np.float64]:
        """Features (N, D) and logits (N, classes) -> (N,) from 0 to 2.3, higher is more unlike.

        1 - cosine to the nearest class mean + ``PROBABILITY`` * (1 - maximum probability). Logits are those before the
        temperature; of calibrated probabilities p they are temperature * log(p). Raises ValueError for another D.
        """
        rows, outputs = directions(features), np.asarray(logits, np.float64)
        if rows.shape[1:] != self.means.shape[1:]:
            raise ValueError(f"features of shape {rows.shape} for a score of {self.means.shape[1]}")
        cosines = (rows @ self.means.astype(np.float64).T).max(1)
        powers = np.exp(outputs - outputs.max(1, keepdims=True))
        return np.asarray(1 - cosines + PROBABILITY * (1 - 1 / powers.sum(1)))

    def is_unlike(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Scores (N,) -> whether each image is unlike the training images."""
        return np.asarray(np.asarray(scores) > self.threshold)


def directions(features: ArrayLike) -> NDArray[np.float64]:
    """Features (N, D) at length 1; those of length 0 stay."""
    rows = np.asarray(features, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def fit_unlike(features: ArrayLike, labels: ArrayLike, validation: ArrayLike, logits: ArrayLike) -> Unlike:
    """The score of training features (N, D) with their classes (N,), and its threshold.

    The threshold is the lowest score that keeps ``KEPT`` of the validation images, whose features (M, D) and logits
    (M, classes) are ``validation`` and ``logits``. Raises ValueError without any.
    """
    rows, classes = directions(features), np.unique(np.asarray(labels))
    means = np.stack([rows[np.asarray(labels) == one].mean(0) for one in classes])
    score = Unlike(directions(means).astype(np.float16), 0.0)
    if not len(np.asarray(validation)):
        raise ValueError("no validation images")
    scores = np.sort(score.score(validation, logits))
    return Unlike(score.means, float(scores[int(np.ceil(KEPT * len(scores))) - 1]), len(scores))


def no_unlike_reason(validation: int, fit_on: str) -> str:
    """Why a run with so many validation images, trained on ``fit_on``, can have no score; "" where it can."""
    if fit_on == "train+val":
        return "this run was trained on its validation images too, so that none are left to find a threshold"
    if not validation:
        return "the split of this run has no validation images to find a threshold"
    return (
        f"{validation} validation images are too few to find a threshold, which takes {FEWEST}"
        if validation < FEWEST
        else ""
    )


def unlike_bytes(unlike: Unlike, weights: str) -> bytes:
    """``unlike`` as the bytes of a safetensors file; ``weights`` is the sha256 (hex) of its checkpoint."""
    said = {"weights": weights, "threshold": unlike.threshold, "images": unlike.images, "format": 1}
    return save_arrays({"means": unlike.means}, {"unlike": json.dumps(said)})


def parsed_unlike(content: bytes, source: str) -> tuple[Unlike, str]:
    """What ``unlike_bytes`` wrote: the score, and the sha256 of its checkpoint. Raises Refused for anything else."""
    try:
        means = load_arrays(content)["means"]
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        said: dict[str, Any] = json.loads(header["__metadata__"]["unlike"])
        unlike = Unlike(means, float(said["threshold"]), int(said["images"]))
        fits = means.ndim == 2 and means.size and means.dtype == np.float16 and bool(np.isfinite(means).all())
        if not fits or not -0.1 <= unlike.threshold <= 3 or unlike.images < 0 or not isinstance(said["weights"], str):
            raise ValueError("values out of bounds")
        return unlike, said["weights"]
    except Exception as error:  # a damaged file can raise nearly anything
        raise Refused(f"{escaped(source)} is damaged ({shortened(str(error))}); {REMEDY}") from error


def write_unlike(file: Path, unlike: Unlike, weights: str) -> None:
    """Writes ``unlike_bytes`` into ``file``. Raises Refused where that cannot be."""
    with atomic(file, make_folder=False) as part:
        part.write_bytes(unlike_bytes(unlike, weights))


def read_unlike(file: Path, weights: str, width: int, classes: int) -> tuple[Unlike | None, str]:
    """The score in ``file`` for the checkpoint with the sha256 ``weights``; else None and why there is none.

    Raises Refused when the file is damaged, or holds more than ``classes`` means or means of another length than
    ``width``. A class without training images has no mean.
    """
    if not file.is_file():
        return None, f"no {UNLIKE} lies beside its weights"
    try:
        if file.stat().st_size > MOST_BYTES:
            raise Refused(f"{file} is larger than {MOST_BYTES} bytes; {REMEDY}")
        content = file.read_bytes()
    except OSError as error:
        raise Refused(f"{file} cannot be read ({error.strerror}); {REMEDY}") from error
    unlike, owner = parsed_unlike(content, str(file))
    if owner != weights:
        return None, "the score beside it is of other weights; evaluate the run again"
    if len(unlike.means) > classes or unlike.means.shape[1] != width:
        raise Refused(f"{file} does not fit its network; {REMEDY}")
    return unlike, ""
