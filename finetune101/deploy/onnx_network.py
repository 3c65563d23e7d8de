"""An exported network at work: classifies images by ONNX Runtime, without PyTorch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import onnxruntime
from msgspec import Meta
from numpy.typing import NDArray

from finetune101.config import Preprocessing
from finetune101.deploy.prediction import Image, Prediction, cached_pixels, in_batches
from finetune101.deploy.resize import resize_pixels
from finetune101.errors import Refused, shortened
from finetune101.files import checked, parse_json
from finetune101.host import usable_cores

METADATA = "finetune101"
"""The key of an exported file's metadata that holds an ``ExportedInfo`` as JSON."""
MOST_BYTES = 2 * 10**9  # of a file: protobuf's own bound
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


class Outputs(NamedTuple):
    """What a file gives for N pictures, float32."""

    probabilities: NDArray[np.float32]
    """(N, classes), calibrated."""
    features: NDArray[np.float32]
    """(N, D): what the output layer sees."""
    unlike: NDArray[np.float32] | None = None
    """(N,): how unlike the training images each is (see ``evaluation.unlike``)."""


class OnnxNetwork:
    """An exported network, ready for images. It needs ONNX Runtime, Pillow and NumPy, and no PyTorch."""

    def __init__(self, file: str | Path, threads: int | None = None) -> None:
        """Opens ``file``. Raises Refused when it is missing, damaged or not written by ``finetune101 export``."""
        self.file = Path(file)
        content = _content(self.file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a damaged file can raise nearly anything
            raise Refused(f"{file} is damaged ({shortened(str(error))}); {_REMEDY}") from error
        self.info = _info(self.session.get_modelmeta().custom_metadata_map, self.file)
        if [one.name for one in self.session.get_inputs()] != [self.info.input]:
            raise Refused(f"{file} has other inputs than its metadata says; {_REMEDY}")
        shapes = {one.name: one.shape for one in self.session.get_outputs()}
        wanted = {"probabilities", "features"} | ({"unlike"} if self.info.unlike_threshold is not None else set())
        if not wanted <= shapes.keys() or shapes["probabilities"][-1] not in (len(self.info.classes), None):
            raise Refused(f"{file} has other outputs than its metadata says; {_REMEDY}")

    @property
    def name(self) -> str:
        """The name of the network that was exported."""
        return self.info.name or str(self.file)

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

    def outputs(self, pixels: NDArray[np.uint8]) -> Outputs:
        """As ``probabilities``, with all outputs. A file for resized pictures takes its own size only."""
        if self.info.input == "resized":
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        names = ["probabilities", "features", *(["unlike"] if self.unlike is not None else [])]
        return Outputs(*self.session.run(names, {self.info.input: pixels}))

    def probabilities(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
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

    def _classify(self, images: Sequence[Image], top_k: int) -> list[Prediction]:
        own = self.preprocessing
        pixels = [resize_pixels(cached_pixels(image, own), own) for image in images]
        return self.label(np.stack(pixels), images, top_k)

    def label(self, pixels: NDArray[np.uint8], images: Sequence[Image], top_k: int) -> list[Prediction]:
        """The ``top_k`` most probable classes of each of ``images``, whose pixels are uint8 (N, size, size, 3).

        Raises Refused when the output is not finite.
        """
        probabilities, _, scores = self.outputs(pixels)
        if not np.isfinite(probabilities).all():
            raise Refused(f"the output of {self.name} is not finite; export it again")
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        classes = [
            tuple((self.info.classes[k], float(row[k])) for k in best)
            for row, best in zip(probabilities, order, strict=True)
        ]
        if scores is None or self.unlike is None:
            return [Prediction(one, image) for one, image in zip(classes, images, strict=True)]
        rows = zip(classes, images, (scores > self.unlike).tolist(), scores.tolist(), strict=True)
        return [Prediction(*row) for row in rows]


def read_exported_info(file: Path) -> ExportedInfo:
    """What is written in the ONNX file ``file``. Raises Refused as ``OnnxNetwork`` does."""
    return OnnxNetwork(file).info


def _content(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise Refused(f"there is no file {file}; {_REMEDY}")
        if file.stat().st_size > MOST_BYTES:
            raise Refused(f"{file} is larger than an ONNX file can be; {_REMEDY}")
        return file.read_bytes()
    except OSError as error:
        raise Refused(f"{file} cannot be read ({error.strerror}); {_REMEDY}") from error


def _info(metadata: dict[str, Any], file: Path) -> ExportedInfo:
    """The metadata of ``file`` by its types and bounds. Raises Refused naming what is wrong."""
    if METADATA not in metadata:
        raise Refused(f"{file} does not say of which classes its network is; {_REMEDY}")
    value = parse_json(metadata[METADATA], f"the metadata of {file}", _REMEDY)
    info: ExportedInfo = checked(value, ExportedInfo, f"{file}", remedy=_REMEDY)
    return info
