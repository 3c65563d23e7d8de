"""An exported network at work: classifies images by ONNX Runtime, without PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from finetune101.config import Preprocessing
from finetune101.data.decode import photo_reader
from finetune101.deploy.prediction import Image, Prediction, cached_pixels, in_batches
from finetune101.errors import Refused
from finetune101.files import checked, parse_json
from finetune101.host import usable_cores
from finetune101.standalone import (
    METADATA,
    PASS,
    ExportedNetwork,
    Outputs,
    Pixels,
    UnusableFile,
    decoded_passes,
    resize_pixels,
)

_REMEDY = "give a file that finetune101 export wrote"

Name = Annotated[str, Meta(min_length=1, max_length=1000)]
Reason = Annotated[str, Meta(max_length=1000)]
Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How the answers of a file differ from those of the network that it was made of."""

    largest: Share
    """The largest difference of a probability."""
    changed: Annotated[int, Meta(ge=0)]
    """Images whose most probable class is another one."""
    unlike: Annotated[float, Meta(ge=0, le=10)] | None = None
    """The largest difference of a score for unlike images; None without a score, as the next two."""
    marks_changed: Annotated[int, Meta(ge=0)] | None = None
    """Images that only one of both marks as unlike the training images."""
    marks_added: Annotated[int, Meta(ge=0)] | None = None
    """Those of them that the file marks."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The answers of a file beside those of its network in PyTorch (fp32) on the same images."""

    images: Annotated[int, Meta(ge=1)]
    of: Name
    """Which images, such as "validation"."""
    pictures: Difference | None = None
    """Whole pictures given to the file, which resizes them."""
    resized: Difference
    """Pictures that Pillow resized."""
    top1: Annotated[float, Meta(ge=0, le=100)] | None = None
    """Accuracy of the file on the resized pictures, in percent, where their classes are known."""
    top1_network: Annotated[float, Meta(ge=0, le=100)] | None = None
    """Accuracy of the network on the same pictures, in percent."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The test accuracy of the network before the export, in percent, over ``n`` images."""

    top1: Annotated[float, Meta(ge=0, le=100)]
    n: Annotated[int, Meta(ge=1)]


@dataclass(frozen=True, kw_only=True)
class ExportedInfo:
    """What is written in an exported file beside its graph."""

    name: str
    model: Name
    classes: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=100_000)]
    preprocessing: Preprocessing
    input: Literal["images", "resized"]
    """Pictures of any size, uint8 (N, H, W, 3), or resized ones, uint8 (N, 3, size, size)."""
    precision: Literal["fp32", "int8"] = "fp32"
    temperature: Annotated[float, Meta(gt=0, le=1e3)] | None = None
    """The logits were divided by this; None where none is known."""
    temperature_reason: Reason = ""
    unlike_threshold: Annotated[float, Meta(ge=-1, le=10)] | None = None
    """Images with a higher score (the output "unlike") are unlike the training images; None without such an output."""
    unlike_reason: Reason = ""
    frozen_backbone: bool = False
    protocol: str | None = None
    split: str | None = None
    """Hash of the split that the network was trained on."""
    accuracy: Accuracy | None = None
    parity: Parity | None = None
    weights: str = ""
    """sha256 (hex) of the checkpoint."""
    version: str = ""
    """Of finetune101."""
    format: Literal[1] = 1

    def to_metadata(self) -> dict[str, str]:
        """Key and value for the metadata of a file."""
        return {METADATA: json.dumps(dataclasses.asdict(self), allow_nan=False)}


class OnnxNetwork:
    """An exported network, ready for images. It needs ONNX Runtime, Pillow and NumPy, and no PyTorch."""

    def __init__(
        self, file: str | Path, threads: int | None = None, *, name: str | None = None, in_place: bool = False
    ) -> None:
        """Opens ``file``; ``name`` is what it is called where it is part of a run.

        ``in_place``: see ``standalone.ExportedNetwork``. Raises Refused when the file is missing, damaged or not
        written by ``finetune101 export``.
        """
        self.file = Path(file)
        try:
            self.exported = ExportedNetwork(os.fspath(file), threads or usable_cores(), in_place)
        except UnusableFile as error:
            raise Refused(f"{error}; {_REMEDY}") from error
        value = parse_json(self.exported.metadata, f"the metadata of {file}", _REMEDY)
        self.info: ExportedInfo = checked(value, ExportedInfo, f"{file}", remedy=_REMEDY)
        self._name = name

    @property
    def name(self) -> str:
        """The name of the network that was exported."""
        return self._name or self.info.name or str(self.file)

    @property
    def classes(self) -> list[str]:
        """The names of its classes, in the order of its output."""
        return list(self.info.classes)

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns an image into its input."""
        return self.info.preprocessing

    def __repr__(self) -> str:
        size = self.preprocessing.size
        return f"OnnxNetwork({self.file}: {len(self.info.classes)} classes, images of {size} x {size} pixels)"

    def predict(
        self, images: Image | Sequence[Image], top_k: int = 5, batch_size: int = 16
    ) -> Prediction | list[Prediction]:
        """The ``top_k`` most probable classes of an image, or of each of a list, as ``Network.predict`` gives them."""
        return in_batches(images, top_k, batch_size, self._classify)

    def outputs(self, pixels: Pixels) -> Outputs:
        """As ``standalone.ExportedNetwork.outputs``."""
        return self.exported.outputs(pixels)

    def probabilities(self, pictures: Pixels) -> NDArray[np.float32]:
        """Pictures of one size, uint8 (N, H, W, 3) -> probabilities (N, classes); the file resizes them if need be."""
        return self.outputs(pictures).probabilities

    @property
    def temperature(self) -> float | None:
        """What the logits were divided by; None where none was known at the export."""
        return self.info.temperature

    @property
    def temperature_reason(self) -> str:
        """Why there is no temperature, or why it is 1."""
        return self.info.temperature_reason or "no temperature was known when it was exported"

    @property
    def unlike(self) -> float | None:
        """The score above which an image is unlike the training images; None where the file holds no score."""
        return self.info.unlike_threshold

    @property
    def unlike_reason(self) -> str:
        """Why the file holds no score."""
        return self.info.unlike_reason or "it was exported without a score"

    @property
    def frozen_backbone(self) -> bool:
        """Whether only the output layer was trained."""
        return self.info.frozen_backbone

    def input_of(self, cached: Pixels) -> Pixels:
        """Pixels of ``cache_size``, uint8 (cache_size, cache_size, 3), as its input, uint8 (size, size, 3)."""
        return resize_pixels(cached, self.preprocessing.size, self.preprocessing.interpolation)

    def decoded(
        self, files: Iterable[str], failed: list[tuple[str, str]], batch_size: int = PASS
    ) -> Iterator[tuple[list[str], Pixels]]:
        """Files that can be read and their pixels, uint8 (N, size, size, 3); see ``standalone.decoded_passes``."""
        read = photo_reader(self.preprocessing.cache_size, self.preprocessing.interpolation)
        count = min(batch_size, PASS)
        return decoded_passes(lambda file: self.input_of(read(file)), files, failed, count, usable_cores())

    def _classify(self, images: Sequence[Image], top_k: int) -> list[Prediction]:
        pixels = [self.input_of(cached_pixels(image, self.preprocessing)) for image in images]
        return self.label(np.stack(pixels), images, top_k)

    def label(self, pixels: Pixels, images: Sequence[Image], top_k: int) -> list[Prediction]:
        """The ``top_k`` most probable classes of each of ``images``, whose pixels are uint8 (N, size, size, 3).

        Raises Refused when the output is not finite.
        """
        try:
            labels = self.exported.labels(pixels, [""] * len(images), top_k)
        except UnusableFile as error:
            raise Refused(f"{error}; export it again") from error
        return [
            Prediction(one.classes, image, one.unlike, one.unlike_score)
            for one, image in zip(labels, images, strict=True)
        ]


def read_exported_info(file: Path) -> ExportedInfo:
    """What is written in the ONNX file ``file``. Raises Refused as ``OnnxNetwork`` does."""
    return OnnxNetwork(file).info
