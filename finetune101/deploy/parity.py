"""Whether an exported file gives the answers of its network, measured on real pictures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from finetune101.data.batches import to_input
from finetune101.data.decode import Unreadable, decode, in_threads, opened
from finetune101.deploy.labels import Labeller
from finetune101.deploy.neighbours import class_rounds
from finetune101.deploy.onnx_network import Difference, Parity
from finetune101.errors import Refused, escaped
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.standalone import resize_pixels

MOST_IMAGES = 1_000  # more tell little more, and take minutes
MOST_CHANGED = 0.001  # share of the images; a single one may always differ, as two classes can be equally probable
MOST_APART = 0.01  # between probabilities, and between scores, of the same pixels in float32: rounding makes 1e-5
MOST_LOST = 2.0  # points of accuracy, by 8-bit integers
MOST_CHANGED_IN_8_BITS = 0.05  # share of the images, where the accuracy is not known
BATCH = 16
_END = "and no file was written; export it as safetensors, and report its name"

Numbers = NDArray[np.float32]
Pictures = NDArray[np.uint8]
Outcome = tuple[Numbers, Numbers | None]
"""Probabilities (N, classes), and scores (N,) of ``evaluation.unlike``; None for a network without a score."""
Answers = Callable[[Pictures], Outcome]


@dataclass(frozen=True)
class LabelledImages:
    """Image files to measure on: of what kind they are, and the number of each one's class where that is known."""

    files: Sequence[Path]
    of: str
    labels: Sequence[int] | None = None
    remedy: str = "repair it, or compare the answers on other pictures by --parity FOLDER"
    """What the user does about a file that cannot be read."""

    def at_most(self, count: int) -> LabelledImages:
        """``count`` of them, evenly from the whole list."""
        if len(self.files) <= count:
            return self
        return self._of(np.linspace(0, len(self.files) - 1, count).astype(int).tolist())

    def drawn(self, count: int) -> LabelledImages:
        """Up to ``count`` of them, the same each time: one of every class, then another of every class, and so on."""
        rounds = class_rounds(self.labels or [0] * len(self.files))
        return self._of(list(itertools.chain(*rounds))[:count])

    def _of(self, places: Sequence[int]) -> LabelledImages:
        labels = None if self.labels is None else [self.labels[i] for i in places]
        return dataclasses.replace(self, files=[self.files[i] for i in places], labels=labels)


def measure_parity(
    network: TrainedNetwork, images: LabelledImages, resized: Answers, pictures: Answers | None = None
) -> Parity:
    """The answers of a file beside those of ``network`` in float32.

    Args:
        network: the network that was exported.
        images: at most ``MOST_IMAGES`` of them are used.
        resized: the file's answer for pictures that Pillow resized, uint8 (N, size, size, 3).
        pictures: the file's answer for a whole picture, uint8 (1, H, W, 3); None for a file that takes none.

    Raises Refused for an image that cannot be read, and for an output of the file that is not finite.
    """
    images = images.at_most(MOST_IMAGES)
    world = dataclasses.replace(network.world, precision="fp32")
    labeller, own = Labeller(dataclasses.replace(network, world=world)), network.preprocessing
    outcomes: tuple[list[Outcome], list[Outcome], list[Outcome]] = ([], [], [])
    for files, cached in cached_batches(images, network):
        x = to_input(torch.from_numpy(cached).permute(0, 3, 1, 2), own, world)
        logits, scores = labeller.outputs(x)
        probabilities = metrics.probabilities(logits, network.temperature or 1.0).numpy().astype(np.float32)
        outcomes[0].append((probabilities, None if scores is None else scores.astype(np.float32)))
        outcomes[1].append(resized(np.stack([resize_pixels(pixels, own.size, own.interpolation) for pixels in cached])))
        if pictures:
            outcomes[2].extend(pictures(whole_picture(file, images.remedy)[None]) for file in files)
    reference, small, large = (_joined(parts) for parts in outcomes)
    threshold = network.unlike.threshold if network.unlike else None
    labels = None if images.labels is None else np.asarray(images.labels)
    return Parity(
        images=len(images.files),
        of=images.of,
        pictures=_difference(reference, large, threshold) if pictures else None,
        resized=_difference(reference, small, threshold),
        top1=None if labels is None else _accuracy(small, labels),
        top1_network=None if labels is None else _accuracy(reference, labels),
    )


def cached_batches(images: LabelledImages, network: TrainedNetwork) -> Iterator[tuple[Sequence[Path], Pictures]]:
    """The files and their pixels as ``predict`` decodes them, uint8 (N, cache_size, cache_size, 3); N <= ``BATCH``.

    Raises Refused for an image that cannot be read.
    """
    own = network.preprocessing
    with tqdm(total=len(images.files), desc="parity", unit="img", leave=False, disable=None) as bar:
        for start in range(0, len(images.files), BATCH):
            part = images.files[start : start + BATCH]
            try:
                pixels = list(in_threads(lambda file: decode(file, own.cache_size, own.interpolation), part))
            except Unreadable as error:
                raise _unreadable(error, images.remedy) from error
            yield part, np.stack(pixels)
            bar.update(len(part))


def whole_picture(file: Path, remedy: str = "repair it") -> Pictures:
    """Every pixel of an image file, uint8 (H, W, 3): what another program gives to an exported file.

    ``predict`` may decode a large JPEG at a part of its size. Raises Refused, which ends with ``remedy``.
    """
    try:
        with opened(file) as picture:
            return np.array(picture.image)
    except Unreadable as error:
        raise _unreadable(error, remedy) from error


def _unreadable(error: Unreadable, remedy: str) -> Refused:
    return Refused(f"cannot read the image {escaped(str(error.path))} ({error.reason}); {remedy}")


def _joined(parts: Sequence[Outcome]) -> Outcome:
    """The outcomes of several passes as those of one."""
    scores = [part[1] for part in parts if part[1] is not None]
    probabilities = [part[0] for part in parts] or [np.zeros((0, 0), np.float32)]
    return np.concatenate(probabilities), np.concatenate(scores) if scores else None


def _accuracy(outcome: Outcome, labels: NDArray[np.int_]) -> float:
    return 100 * float((outcome[0].argmax(1) == labels).mean())


def _difference(reference: Outcome, outcome: Outcome, threshold: float | None) -> Difference:
    """How ``outcome`` differs from ``reference``; ``threshold`` is that of the scores.

    Raises Refused for numbers that are not finite.
    """
    (own, own_scores), (other, other_scores) = reference, outcome
    if not np.isfinite(other).all() or not (other_scores is None or np.isfinite(other_scores).all()):
        raise Refused("the exported network gives numbers that are not finite; choose another --format")
    difference = Difference(
        largest=float(np.abs(own - other).max()), changed=int((own.argmax(1) != other.argmax(1)).sum())
    )
    if threshold is None:
        return difference
    assert own_scores is not None and other_scores is not None
    marks, other_marks = own_scores > threshold, other_scores > threshold
    return dataclasses.replace(
        difference,
        unlike=float(np.abs(own_scores - other_scores).max()),
        marks_changed=int((marks != other_marks).sum()),
        marks_added=int((other_marks & ~marks).sum()),
    )


def check_parity(parity: Parity) -> None:
    """Raises Refused where the answers of a file in float32 are not those of its network.

    That is: more than ``MOST_CHANGED`` of the first classes changed; or, for the same pixels, a probability or a score
    is more than ``MOST_APART`` away (a temperature that is missing changes no class).
    """
    limit = max(1, int(MOST_CHANGED * parity.images))
    for way, difference in (("whole pictures", parity.pictures), ("resized pictures", parity.resized)):
        if difference and difference.changed > limit:
            raise Refused(
                f"the exported network gives another class for {difference.changed} of {parity.images} {way} than the "
                f"network itself, {_END}"
            )
    for name, apart in (("probabilities", parity.resized.largest), ("unlike scores", parity.resized.unlike or 0.0)):
        if apart > MOST_APART:
            raise Refused(f"{name} of the exported network are up to {apart:.3f} away from the network's own, {_END}")


def check_8_bits(parity: Parity) -> None:
    """Raises Refused for an 8-bit file whose answers are much worse than those of its network.

    That is: right on ``MOST_LOST`` points fewer images, or without known classes ``MOST_CHANGED_IN_8_BITS`` of the
    first classes changed. How many marks "unlike" changed is for ``parity_text`` to say.
    """
    limit = max(1, int(MOST_CHANGED_IN_8_BITS * parity.images))
    end = "and no file was written; export it by --format onnx"
    if parity.top1 is not None and parity.top1_network is not None:
        if parity.top1_network - parity.top1 > MOST_LOST:
            raise Refused(
                f"in 8 bits the network is right on {parity.top1:.1f} % of the {parity.of} images, in floats on "
                f"{parity.top1_network:.1f} %, {end}"
            )
    elif parity.resized.changed > limit:
        raise Refused(f"in 8 bits {parity.resized.changed} of {parity.images} pictures have another class, {end}")


def parity_text(parity: Parity) -> str:
    """Lines for a terminal."""
    lines = [f"Compared with PyTorch (fp32) on {parity.images} {parity.of} images:"]
    ways = ((parity.pictures, "whole pictures, resized in the file"), (parity.resized, "pictures resized by Pillow"))
    for difference, way in ways:
        if difference:
            changed, largest = difference.changed, difference.largest
            lines.append(f"  {way}: {changed} with another class, largest difference of a probability {largest:.1e}")
            if difference.unlike is not None:
                lines.append(
                    f"    marked otherwise as unlike the training pictures: {difference.marks_changed} "
                    f"({difference.marks_added} more), largest difference of a score {difference.unlike:.1e}"
                )
    if parity.top1 is not None and parity.top1_network is not None:
        lines.append(f"  accuracy {parity.top1:.2f} % (network: {parity.top1_network:.2f} %)")
    return "\n".join(lines)


def resized_pictures(images: LabelledImages, network: TrainedNetwork, count: int) -> Pictures:
    """Up to ``count`` of ``images`` (see ``LabelledImages.drawn``), resized: uint8 (N, size, size, 3)."""
    own, drawn = network.preprocessing, dataclasses.replace(images.drawn(count), remedy="repair it")
    batches = cached_batches(drawn, network)
    return np.stack([resize_pixels(pixels, own.size, own.interpolation) for _, cached in batches for pixels in cached])
