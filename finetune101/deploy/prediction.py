"""The labels of one image, and what counts as an image; knows no torch."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from finetune101.config import Count, Preprocessing
from finetune101.data.decode import Unreadable, decode, decode_image, opened
from finetune101.errors import Refused, escaped
from finetune101.files import typed
from finetune101.standalone import UNLIKE_TEXT, Pixels, upright

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
    unlike: bool | None = None
    """Whether the image is unlike the training images; None where the network cannot tell."""
    unlike_score: float | None = None
    """The score behind ``unlike``: higher is more unlike (see ``evaluation.unlike``)."""

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

    def without_label(self) -> Prediction:
        """This prediction; without its classes where the image is unlike the training images."""
        return dataclasses.replace(self, classes=()) if self.unlike else self

    def __repr__(self) -> str:
        names = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in self.classes)
        names += f" ({UNLIKE_TEXT})" if self.unlike else ""
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


def in_batches(
    images: Image | Sequence[Image],
    top_k: int,
    batch_size: int,
    classify: Callable[[Sequence[Image], int], list[Prediction]],
) -> Prediction | list[Prediction]:
    """``classify`` (images, top_k) of one image, or of a list, ``batch_size`` at a time.

    Raises Refused for what is no image, and for numbers below 1.
    """
    top_k, batch_size = typed(Count, top_k, "top_k is"), typed(Count, batch_size, "batch_size is")
    if isinstance(images, str | Path | Pillow.Image | np.ndarray):
        return classify([images], top_k)[0]
    if isinstance(images, bytes | bytearray) or not isinstance(images, Iterable):
        raise Refused(f"{type(images).__name__} is no image; {IMAGES}")
    several = list(images)
    starts = range(0, len(several), batch_size)
    return [one for start in starts for one in classify(several[start : start + batch_size], top_k)]


def cached_pixels(image: Image, preprocessing: Preprocessing) -> Pixels:
    """An image as ``preprocessing`` caches it: uint8 (cache_size, cache_size, 3), RGB. Raises Refused for no image."""
    size, interpolation = preprocessing.cache_size, preprocessing.interpolation
    if isinstance(image, str | Path):
        try:
            return decode(Path(image), size, interpolation)
        except Unreadable as error:
            raise Refused(f"{escaped(str(image))} cannot be read ({error.reason}); leave it out") from error
    return decode_image(pillow_image(image), size, interpolation)


def pillow_image(image: Image) -> Pillow.Image:
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
            small = upright(pillow_image(image))
    small.thumbnail((side, side))
    return small
