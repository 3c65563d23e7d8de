"""A trained network to work with: classify a file, a Pillow image, an array, or a list of them."""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from finetune101.config import Count, Preprocessing
from finetune101.data.batches import to_input
from finetune101.data.decode import Pixels, Unreadable, decode, decode_image, opened, upright
from finetune101.deploy.released import RELEASED, open_released
from finetune101.errors import Refused, escaped
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import TrainedNetwork, open_file, open_network
from finetune101.files import typed
from finetune101.run import Run, open_run, run_name

if TYPE_CHECKING:
    from finetune101.deploy.explain import Explainer, Explanation

Image = str | Path | Pillow.Image | NDArray[np.uint8]
"""A file, a Pillow image, or an array of height x width x 3 (RGB) or height x width (grey) of type uint8."""
IMAGES = "give a file, a Pillow image, an array of uint8, or a list of them"
THUMBNAIL = 128  # pixels of its longer side


@dataclass(frozen=True)
class Prediction:
    """The classes of one image with their probabilities from 0 to 1, most probable first."""

    classes: tuple[tuple[str, float], ...]
    image: Image = field(repr=False, compare=False)
    """The image as it was given."""

    @property
    def source(self) -> str:
        """The image's file; "" for an image that is no file."""
        return str(self.image) if isinstance(self.image, str | Path) else ""

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[0][0]

    @property
    def probability(self) -> float:
        """The probability of ``label``."""
        return self.classes[0][1]

    def __repr__(self) -> str:
        names = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in self.classes)
        return f"{self.source}: {names}" if self.source else names

    def _repr_html_(self) -> str:
        """The image beside bars, for notebooks."""
        bar = "background:#4c72b0;height:0.8em"
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td style='text-align:left'>"
            f"<div style='{bar};width:{120 * p:.0f}px'></div></td><td>{100 * p:.1f} %</td></tr>"
            for name, p in self.classes
        )
        picture = f"<img src='{_data_url(self.image)}' alt=''>"
        return f"<div style='display:flex;gap:1em;align-items:center'>{picture}<table>{rows}</table></div>"


class Network:
    """A trained network, ready for images: ``load`` opens one."""

    def __init__(self, trained: TrainedNetwork) -> None:
        self.trained = trained
        self.forward = trained.forward()

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

        In a notebook the result is the picture beside its overlays; ``maps`` holds the numbers. Raises Refused for
        what is no image, and for a class that is not there.
        """
        from finetune101.deploy.explain import explained

        return explained(self, image, target, top_k=typed(Count, top_k, "top_k is"))

    def _classify(self, images: Sequence[Image], top_k: int) -> list[Prediction]:
        ranked = ranked_classes(self.trained, self.logits(images), top_k)
        return [Prediction(tuple(classes), image) for image, classes in zip(images, ranked, strict=True)]

    def _pixels(self, image: Image) -> Pixels:
        size, interpolation = self.preprocessing.cache_size, self.preprocessing.interpolation
        if isinstance(image, str | Path):
            try:
                return decode(Path(image), size, interpolation)
            except Unreadable as error:
                raise Refused(f"{escaped(str(image))} cannot be read ({error.reason}); leave it out") from error
        return decode_image(_pillow(image), size, interpolation)


def _pillow(image: Image) -> Pillow.Image:
    """An image that is no file as a Pillow image. Raises Refused for what is no image."""
    if isinstance(image, np.ndarray):
        fits = image.dtype == np.uint8 and image.size and (image.ndim == 2 or image.shape[2:] == (3,))
        if not fits:
            raise Refused(
                f"an array of {image.dtype} of shape {image.shape} is no image; give uint8 of height x width x 3"
            )
        return Pillow.fromarray(image)
    if not isinstance(image, Pillow.Image):
        raise Refused(f"{type(image).__name__} is no image; {IMAGES}")
    try:
        image.load()
    except (OSError, ValueError) as error:  # Pillow's, of a closed or damaged file
        raise Refused(f"the Pillow image cannot be read ({error}); open it again") from error
    return image


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


def _data_url(image: Image) -> str:
    """A thumbnail of ``image`` for a page."""
    file = io.BytesIO()
    thumbnail_of(image, THUMBNAIL).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def thumbnail_of(image: Image, side: int) -> Pillow.Image:
    """A small copy of ``image``, upright, in RGB, its longer side at most ``side`` pixels."""
    with contextlib.ExitStack() as stack:
        if isinstance(image, str | Path):
            small = stack.enter_context(opened(Path(image), side)).image.copy()
        else:
            small = upright(_pillow(image))
    small.thumbnail((side, side))
    return small
