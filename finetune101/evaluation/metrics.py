"""Numbers from outputs: accuracies with their uncertainty and paired tests of two networks on the same images.

Accuracies and their intervals are in percent, differences in percentage points.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune101.errors import Refused

Integers: TypeAlias = Tensor | npt.ArrayLike
Booleans: TypeAlias = Tensor | npt.ArrayLike
BINS = 15  # of a reliability diagram
TEMPERATURES = (0.1, 10.0)  # between which a temperature is looked for
FEWEST = 10  # validation images that can tell one


def top_k(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of images whose label is among the ``k`` highest outputs.

    ``logits`` N x C, ``labels`` N class indices. With fewer than ``k`` classes all of them count.
    Raises Refused when there are no images.
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

    Classes without images are left out. Raises Refused when there are no images.
    """
    predicted, true = np.asarray(predictions), np.asarray(labels)
    _same_images(len(predicted), len(true))
    images = np.bincount(true, minlength=num_classes)
    right = np.bincount(true[predicted == true], minlength=num_classes)
    present = images > 0
    return float(100.0 * np.mean(right[present] / images[present]))


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in percent; ``successes`` may be a mean over runs on the same images.

    Source: E. B. Wilson, "Probable inference", JASA 22 (1927). Raises Refused unless 0 <= successes <= n, n >= 1.
    """
    if not (n >= 1 and 0 <= successes <= n):
        raise Refused(f"{successes} of {n} is no proportion; give at least one image")
    share, z = successes / n, NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * float(np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / (1 + z * z / n)
    # exact at the ends, where rounding would leave a trace
    return (0.0 if successes == 0 else 100 * (centre - half)), (100.0 if successes == n else 100 * (centre + half))


def mcnemar_exact(a_correct: Booleans, b_correct: Booleans) -> float:
    """Two-sided p of McNemar's exact test that two networks are equally often right on the same N images.

    Only the images that one of the two gets right count; 1.0 when there are none.
    Source: Q. McNemar, Psychometrika 12 (1947); exact binomial form.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    _same_images(len(a), len(b))
    from scipy import stats  # here: loading it takes a second, and a training asks for no statistic

    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    a_correct: Booleans, b_correct: Booleans, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy of a minus accuracy of b on the same N images, in points, with its percentile bootstrap interval.

    Each side is N times right or wrong, or N shares of its runs that are right. Returns (difference, low, high); the
    runs are taken as given, only the choice of images varies. Resampling whole images keeps each pair together.
    Source: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    a, b = np.asarray(a_correct, dtype=float), np.asarray(b_correct, dtype=float)
    _same_images(len(a), len(b))
    # A difference takes few values, so drawing n images is drawing how often each value comes.
    values, times = np.unique(np.round(a - b, 9), return_counts=True)
    counts = np.random.default_rng(seed).multinomial(len(a), times / len(a), size=resamples)
    low, high = np.quantile(100.0 * counts @ values / len(a), [(1 - level) / 2, (1 + level) / 2])
    return 100.0 * float(times @ values) / len(a), float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """A difference in points that holds for new images and new training runs."""

    difference: float
    interval: tuple[float, float]
    p: float
    df: float
    images_sd: float
    runs_sd: float


def crossed(a: npt.ArrayLike, b: npt.ArrayLike, level: float = 0.95) -> Crossed:
    """Accuracy of a minus accuracy of b, both (runs, images) right or wrong, with images and runs as random samples.

    The variance is that of the per-image difference over images, plus each arm's variance between its runs, from which
    the part that images already explain is taken (two-way analysis of variance, images x runs); the t interval has
    Satterthwaite's degrees of freedom, at least 1, which is what corrects for few runs. ``images_sd`` and ``runs_sd``
    are the two shares of the standard error. Raises Refused with fewer than two images, or two runs on a side.
    Source: F. E. Satterthwaite, Biometrics Bulletin 2 (1946); for images crossed with readers, S. L. Hillis, Statistics
    in Medicine 26 (2007).
    """
    arms = [np.asarray(side, dtype=float) for side in (a, b)]
    _same_images(arms[0].shape[1], arms[1].shape[1])
    if min(map(len, arms)) < 2:
        raise Refused("an interval over training runs needs two runs on each side; train another seed")
    if arms[0].shape[1] < 2:
        raise Refused("an interval over images needs two of them; give more test images")
    gain = 100.0 * (arms[0].mean(0) - arms[1].mean(0))
    images = gain.var(ddof=1) / len(gain)
    parts = [_between_runs(arm) for arm in arms]
    variance = images + sum(part for part, _ in parts)
    if variance == 0:  # every image gives the same difference in every run
        value = float(gain.mean())
        none = {"df": len(gain) - 1.0, "images_sd": 0.0, "runs_sd": 0.0}
        return Crossed(difference=value, interval=(value, value), p=float(value == 0), **none)
    weights = images**2 / (len(gain) - 1)
    weights += sum(raw**2 / (len(arm) - 1) for (_, raw), arm in zip(parts, arms, strict=True))
    # below 1 the interval would be wider than any number: so it were where few images hide what the runs differ by
    df, difference = max(1.0, variance**2 / weights), float(gain.mean())
    from scipy import stats  # here, as above

    half = float(stats.t.ppf((1 + level) / 2, df) * np.sqrt(variance))
    return Crossed(
        difference=difference,
        interval=(difference - half, difference + half),
        p=float(2 * stats.t.sf(abs(difference) / np.sqrt(variance), df)),
        df=float(df),
        images_sd=float(np.sqrt(images)),
        runs_sd=float(np.sqrt(sum(part for part, _ in parts))),
    )


def _between_runs(correct: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Variance of the mean accuracy (points squared): the part of the runs themselves, at least 0, and the raw one.

    The raw variance between runs holds a part of the images too; Hillis takes it for the degrees of freedom.
    """
    runs, images = correct.shape
    by_run = 100.0 * correct.mean(1)
    rest = 100.0 * (correct - correct.mean(1, keepdims=True) - correct.mean(0) + correct.mean())
    interaction = float((rest**2).sum()) / ((runs - 1) * (images - 1))
    raw = float(by_run.var(ddof=1))
    return max(0.0, raw - interaction / images) / runs, raw / runs


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The number from 1/10 to 10 by which logits (N, C) are divided so that their cross-entropy is least.

    Fitted on validation images; no prediction changes. Source: C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On
    calibration of modern neural networks", ICML (2017).
    """
    from scipy import optimize  # here, as above

    best = optimize.minimize_scalar(  # over the logarithm: the minimum is one, and the scale unknown
        lambda log: cross_entropy(logits / float(np.exp(log)), labels), bounds=np.log(TEMPERATURES), method="bounded"
    )
    return float(np.exp(best.x))


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The number that logits are divided by, 1 where none helps, and then why."""

    temperature: float
    reason: str = ""


def calibrate(logits: Tensor, labels: Tensor) -> Calibrated:
    """``temperature`` of validation images where it helps: logits (N, C), labels (N,); six decimals.

    It helps where it lowers the cross-entropy of images that it was not fitted on (every fifth in turn), does not
    raise the calibration error, and lies within its bounds: at chance level there is no best one.
    """
    if reason := too_few(len(labels)):
        return Calibrated(temperature=1.0, reason=reason)
    if bool((logits.argmax(1) == labels).all()):  # the lower the better then
        return Calibrated(temperature=1.0, reason="every validation image is right, so that no temperature is too low")
    fitted = round(temperature(logits, labels), 6)
    low, high = TEMPERATURES
    if not low * 1.01 < fitted < high / 1.01:
        return Calibrated(temperature=1.0, reason="the validation images give no best temperature, as at chance level")
    held = torch.arange(len(labels)) % 5
    each = [(logits[held == k], labels[held == k], logits[held != k], labels[held != k]) for k in range(5)]
    unseen = sum(len(y) * cross_entropy(x / temperature(*rest), y) for x, y, *rest in each) / len(labels)
    if unseen >= cross_entropy(logits, labels):
        reason = "a temperature found on four fifths of the validation images does not help on the other fifth"
        return Calibrated(temperature=1.0, reason=reason)
    before, after = (ece(reliability(*confidences(logits, t, labels))) for t in (1.0, fitted))
    if after > before:
        return Calibrated(
            temperature=1.0, reason=f"temperature {fitted:.2f} makes calibration worse on the validation images"
        )
    return Calibrated(temperature=fitted)


def too_few(images: int) -> str:
    """Why so many validation images give no temperature; "" where they are enough."""
    return f"{images} validation images are too few to find a temperature" if images < FEWEST else ""


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Calibrated probabilities, float64 (N, C), of logits (N, C): the numbers that users see."""
    return torch.softmax(logits.double() / temperature, 1)


def confidences(logits: Tensor, temperature: float, labels: Tensor) -> tuple[npt.NDArray[np.float64], Tensor]:
    """The highest probability of each image, float64 (N,), and whether its class is the label."""
    confidence, prediction = probabilities(logits, temperature).max(1)
    return confidence.numpy(), prediction == labels


def reliability(confidence: npt.ArrayLike, correct: Booleans, bins: int = BINS) -> list[dict[str, Any]]:
    """Images in ``bins`` equal-width bins of confidence (0 to 1): count, mean confidence and percent right of each."""
    sure, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    _same_images(len(sure), len(right))
    number = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    inside = [number == k for k in range(bins)]
    return [
        {"n": int(i.sum()), "confidence": 100 * float(sure[i].mean()), "top1": 100 * float(right[i].mean())}
        if i.any()
        else {"n": 0, "confidence": None, "top1": None}
        for i in inside
    ]


def ece(bins: list[dict[str, Any]]) -> float:
    """Expected calibration error, a share: mean distance of confidence and accuracy over the bins of ``reliability``.

    Source: M. Naeini, G. Cooper, M. Hauskrecht, AAAI (2015); as used by Guo et al. (2017).
    """
    n = sum(one["n"] for one in bins)
    return float(sum(one["n"] * abs(one["confidence"] - one["top1"]) for one in bins if one["n"]) / n / 100)


def auroc(high: npt.ArrayLike, low: npt.ArrayLike) -> float:
    """Area under the ROC curve of scores ``high`` (N,) against ``low`` (M,): the share of pairs in the right order.

    A pair of equal scores counts a half.
    """
    ordered = np.sort(np.asarray(low, np.float64))
    below = np.searchsorted(ordered, high, side="left") + np.searchsorted(ordered, high, side="right")
    return float(below.mean() / 2 / len(ordered))


def false_positive_rate(high: npt.ArrayLike, low: npt.ArrayLike, kept: float = 0.95) -> float:
    """The share of scores ``high`` (N,) at or below the threshold that keeps the share ``kept`` of ``low`` (M,)."""
    threshold = np.sort(np.asarray(low, np.float64))[int(np.ceil(kept * len(np.asarray(low)))) - 1]
    return float((np.asarray(high) <= threshold).mean())


def _same_images(a: int, b: int) -> None:
    """Raises Refused when there are no images, or one side has more of them."""
    if a != b:
        raise Refused(f"{a} and {b} images cannot be compared; give both for the same images")
    if a == 0:
        raise Refused("there are no images to score; check the split for an empty subset")
