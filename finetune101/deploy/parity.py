"""Whether an exported file gives the answers of its network, measured on real pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from finetune101.data.batches import to_input
from finetune101.data.decode import FILTERS, in_threads, opened
from finetune101.deploy.onnx_network import Difference, Parity
from finetune101.errors import Refused
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.forward import Forward
from finetune101.standalone import resize_pixels

MOST_IMAGES = 1_000  # more tell little more, and take minutes
MOST_CHANGED = 0.001  # share of the images; a single one may always differ, as two classes can be equally probable
MOST_LOST = 2.0  # points of accuracy, by 8-bit integers
BATCH = 16

Numbers = NDArray[np.float32]
Pictures = NDArray[np.uint8]
Answers = Callable[[Pictures], Numbers]
"""Pictures -> probabilities (N, classes)."""


@dataclass(frozen=True)
class LabelledImages:
    """Image files to measure on: of what kind they are, and the number of each one's class where that is known."""

    files: Sequence[Path]
    of: str
    labels: Sequence[int] | None = None

    def at_most(self, count: int) -> LabelledImages:
        """``count`` of them, evenly from the whole list."""
        if len(self.files) <= count:
            return self
        chosen = np.linspace(0, len(self.files) - 1, count).astype(int)
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return LabelledImages([self.files[i] for i in chosen], self.of, labels)


def measure_parity(
    network: TrainedNetwork, images: LabelledImages, resized: Answers, pictures: Answers | None = None
) -> Parity:
    """The answers of a file beside those of ``network`` in float32.

    Args:
        network: the network that was exported.
        images: at most ``MOST_IMAGES`` of them are used.
        resized: the file's answer for pictures that Pillow resized, uint8 (N, size, size, 3).
        pictures: the file's answer for a whole picture, uint8 (1, H, W, 3); None for a file that takes none.

    Raises Unreadable for an image that cannot be read.
    """
    images = images.at_most(MOST_IMAGES)
    world = dataclasses.replace(network.world, precision="fp32")
    forward, own = Forward(network.model, world, fast=network.fast_kernels), network.preprocessing
    rows: list[Numbers] = []
    for batch in picture_batches(images.files, network):
        whole = [picture for picture, _ in batch]
        cached = np.stack([pixels for _, pixels in batch])
        x = to_input(torch.from_numpy(cached).permute(0, 3, 1, 2), own, world)
        output = forward(x).cpu()
        reference = metrics.probabilities(output, network.temperature or 1.0).numpy().astype(np.float32)
        small = resized(np.stack([resize_pixels(pixels, own.size, own.interpolation) for pixels in cached]))
        large = np.concatenate([pictures(one[None]) for one in whole]) if pictures else small
        rows.append(np.stack([reference, small, large]))
    reference, small, large = np.concatenate(rows, axis=1)
    labels = None if images.labels is None else np.asarray(images.labels)
    return Parity(
        images=len(images.files),
        of=images.of,
        pictures=_difference(reference, large) if pictures else None,
        resized=_difference(reference, small),
        top1=None if labels is None else 100 * float((small.argmax(1) == labels).mean()),
        top1_network=None if labels is None else 100 * float((reference.argmax(1) == labels).mean()),
    )


def picture_batches(files: Sequence[Path], network: TrainedNetwork) -> Iterator[list[tuple[Pictures, Pictures]]]:
    """Whole pictures of any size, and each resized to the cache size, ``BATCH`` at a time. Raises Unreadable."""
    own = network.preprocessing

    def both(file: Path) -> tuple[Pictures, Pictures]:
        with opened(file, own.cache_size) as picture:
            side = (own.cache_size, own.cache_size)
            resized = picture.image.resize(side, FILTERS[own.interpolation])
            return np.asarray(picture.image), np.asarray(resized)

    with tqdm(total=len(files), desc="parity", unit="img", leave=False, disable=None) as bar:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            yield list(in_threads(both, part))
            bar.update(len(part))


def _difference(reference: Numbers, answer: Numbers) -> Difference:
    """Raises Refused for an answer that is not finite."""
    if not np.isfinite(answer).all():
        raise Refused("the exported network gives numbers that are not finite; choose another --format")
    return Difference(
        largest=float(np.abs(reference - answer).max()),
        changed=int((reference.argmax(1) != answer.argmax(1)).sum()),
    )


def check_parity(parity: Parity) -> None:
    """Raises Refused where more answers changed than ``MOST_CHANGED`` of the images."""
    limit = max(1, int(MOST_CHANGED * parity.images))
    for way, difference in (("whole pictures", parity.pictures), ("resized pictures", parity.resized)):
        if difference and difference.changed > limit:
            raise Refused(
                f"the exported network gives another class for {difference.changed} of {parity.images} {way} than the "
                "network itself, and no file was written; export it as safetensors, and report the network's name"
            )


def check_accuracy(parity: Parity) -> None:
    """Raises Refused for an 8-bit file that is right on ``MOST_LOST`` points fewer images than its network."""
    if parity.top1 is None or parity.top1_network is None or parity.top1_network - parity.top1 <= MOST_LOST:
        return
    raise Refused(
        f"in 8 bits the network is right on {parity.top1:.1f} % of the {parity.of} images, in floats on "
        f"{parity.top1_network:.1f} %, and no file was written; export it by --format onnx"
    )


def parity_text(parity: Parity) -> str:
    """Lines for a terminal."""
    lines = [f"Compared with PyTorch (fp32) on {parity.images} {parity.of} images:"]
    ways = ((parity.pictures, "whole pictures, resized in the file"), (parity.resized, "pictures resized by Pillow"))
    for difference, way in ways:
        if difference:
            changed, largest = difference.changed, difference.largest
            lines.append(f"  {way}: {changed} with another class, largest difference of a probability {largest:.1e}")
    if parity.top1 is not None and parity.top1_network is not None:
        lines.append(f"  accuracy {parity.top1:.2f} % (network: {parity.top1_network:.2f} %)")
    return "\n".join(lines)


def resized_pictures(files: Sequence[Path], network: TrainedNetwork, count: int) -> Pictures:
    """Up to ``count`` of the pictures ``files``, evenly chosen, resized: uint8 (N, size, size, 3)."""
    own = network.preprocessing
    chosen = LabelledImages(files, "").at_most(count).files
    cached = [pixels for batch in picture_batches(chosen, network) for _, pixels in batch]
    return np.stack([resize_pixels(pixels, own.size, own.interpolation) for pixels in cached])
