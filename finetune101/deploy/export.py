"""A trained network as one file for other programs, compared with the network itself on real pictures."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch

import finetune101
from finetune101.deploy.card import released_score
from finetune101.deploy.graph import halve, onnx_graph, prepend_resize, program
from finetune101.deploy.inputs import image_inputs
from finetune101.deploy.onnx_network import Accuracy, ExportedInfo, OnnxNetwork, Parity
from finetune101.deploy.parity import (
    LabelledImages,
    Outcome,
    check_8_bits,
    check_parity,
    measure_parity,
    parity_text,
    resized_pictures,
)
from finetune101.deploy.quantize import FROM, LOSS, TRIED, Quantized, quantized
from finetune101.deploy.released import open_reference, open_released
from finetune101.deploy.released_files import RELEASED
from finetune101.deploy.tables import check_out_file
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import TrainedNetwork, as_checkpoint, open_file, open_network
from finetune101.evaluation.evaluate import Opened, open_scored
from finetune101.files import atomic
from finetune101.run import Run, open_run, save_checkpoint
from finetune101.standalone import METADATA, MOST_BYTES, PICTURES

Format = Literal["onnx", "onnx-int8", "torch-export", "safetensors"]
SUFFIXES: dict[str, str] = {
    "onnx": ".onnx", "onnx-int8": ".int8.onnx", "torch-export": ".pt2", "safetensors": ".safetensors"
}  # fmt: skip
BATCH = 64  # images per forward pass


@dataclass(frozen=True)
class Source:
    """A network to export, the images of its split, and what its run says of it.

    ``validation`` measures the parity, ``training`` gives the ranges of 8-bit integers. Both are None where no image of
    the split is at hand, and ``missing`` says why.
    """

    network: TrainedNetwork
    validation: LabelledImages | None = None
    training: LabelledImages | None = None
    protocol: str | None = None
    split: str | None = None
    accuracy: Accuracy | None = None
    missing: str = ""


@dataclass(frozen=True)
class Exported:
    """A file that ``export_network`` wrote."""

    file: Path
    """Or the folder of a web page."""
    format: Format | Literal["web", "bundle"]
    seconds: float
    parity: Parity | None
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes on the disk."""
        files = [self.file] if self.file.is_file() else self.file.rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def __str__(self) -> str:
        size = f"{self.bytes / 1e6:.1f} MB"
        lines = [f"{self.file} ({self.format}, {size}, {self.seconds:.0f} s)", *self.notes]
        return "\n".join([*lines, *([parity_text(self.parity)] if self.parity else [])])


def open_source(name: str | Run, data: str | None = None, runs: str = "runs") -> Source:
    """The network of a run, a released one or a checkpoint, with the images of its split.

    Images are looked for in ``data``, else where the run found them. A temperature is found on the validation images
    where none is kept. Raises Refused for a network that is not there or damaged.
    """
    if isinstance(name, str) and name in RELEASED:
        network, info = open_released(name)
        score = released_score(name)
        accuracy = Accuracy(top1=score[0], n=score[1]) if score else None
        source = Source(network, split=info.split.hash if info.split else None, accuracy=accuracy)
        return _with_images(source, lambda: open_reference(network, data, name, info.split), data is not None)
    if isinstance(name, str) and name.endswith(".safetensors") and Path(name).is_file():
        return Source(open_file(Path(name)), missing="a checkpoint alone names no images")
    run = name if isinstance(name, Run) else open_run(name, runs)
    tested = run.read_json("test.json") if run.has("test.json") else None
    accuracy = Accuracy(top1=tested["top1"], n=tested["n"]) if tested else None
    network = dataclasses.replace(open_network(run), name=run.name)
    return _with_images(Source(network, accuracy=accuracy), lambda: open_scored(run, data), data is not None)


def _with_images(source: Source, open_split: Callable[[], Opened], required: bool) -> Source:
    """``source`` with the images of its split; without them where they are not at hand and not ``required``."""
    try:
        opened = open_split()
    except Refused as error:
        if required:
            raise
        return dataclasses.replace(source, missing=str(error).split(";")[0])
    manifest, root, network = opened.manifest, opened.index.root, source.network
    if network.temperature is None and opened.chosen_on_val:
        network = dataclasses.replace(network, temperature=opened.calibrated(BATCH).temperature)

    def images(subset: str, of: str) -> LabelledImages | None:
        files = [root / path for path in manifest.subsets[subset]]
        return LabelledImages(files, of, manifest.labels(subset)) if files else None

    training = images("train", "training")
    return dataclasses.replace(
        source,
        network=network,
        validation=images("val", "validation") or training,
        training=training,
        protocol=manifest.protocol,
        split=manifest.hash(),
    )


def export_network(
    source: Source,
    out: Path,
    *,
    format: Format = "onnx",
    resized: bool = False,
    parity: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the network of ``source`` to the file ``out``, and measures whether it gives the same answers.

    Args:
        source: see ``open_source``.
        out: the file to write, whole or not at all.
        format: "onnx"; "onnx-int8", in 8-bit integers; "torch-export", PyTorch's own; "safetensors", the weights with
            classes, preprocessing and temperature, which finetune101 reads.
        resized: the ONNX file takes resized pictures, uint8 (N, 3, size, size), in place of pictures of any size.
        parity: a folder of pictures to compare the answers on; by default the validation images of the split.
        overwrite: replace a file that is there.

    Raises Refused for a file that is there, and where the answers differ: no file is left then.
    """
    check_out_file(out, [f".{SUFFIXES[format].rpartition('.')[2]}"], overwrite, example="network")
    started = time.perf_counter()
    if format == "safetensors":
        with atomic(out) as part:
            save_checkpoint(part, *as_checkpoint(source.network))
        return Exported(out, format, time.perf_counter() - started, None)
    images = source.validation if parity is None else _pictures_in(parity)
    info = exported_info(source, "images" if format.startswith("onnx") and not resized else "resized")
    notes = []
    if images is None:
        notes.append(
            f"The answers were NOT compared with the network's ({source.missing or 'its split has no images'}): "
            "give --data, or --parity FOLDER"
        )
    if format == "torch-export":
        measured = _write_program(source.network, info, images, out)
        return Exported(out, format, time.perf_counter() - started, measured, tuple(notes))
    if format == "onnx-int8" and source.training is None:
        raise Refused(f"8-bit integers need training images ({source.missing or 'there are none'}); give --data")
    graph = onnx_graph(source.network)
    if format == "onnx-int8":
        result = _in_8_bits(graph, source)
        graph, info = result.graph, dataclasses.replace(info, precision="int8")
        halve(graph)  # the layers that stay in floats
        notes += [_layers_text(result), _speed_text(result)]
    if not resized:
        prepend_resize(graph, source.network.preprocessing)
    measured = _write_graph(graph, source.network, info, images, out)
    return Exported(out, format, time.perf_counter() - started, measured, tuple(notes))


def _pictures_in(folder: str) -> LabelledImages:
    inputs = image_inputs([folder])
    if not inputs.files:
        raise Refused(f"--parity {folder} holds no picture; name a folder of pictures")
    remedy = "repair it, or take it out of the folder of --parity"
    return LabelledImages([Path(file) for file in inputs.files], "given", remedy=remedy)


def exported_info(source: Source, input_: str) -> ExportedInfo:
    """What an exported file of ``source`` says of its network; ``input_`` is the name of its input."""
    network = source.network
    return ExportedInfo(
        name=network.name,
        model=network.architecture,
        classes=tuple(network.classes),
        preprocessing=network.preprocessing,
        input="images" if input_ == PICTURES else "resized",
        temperature=network.temperature,
        temperature_reason=network.temperature_reason,
        unlike_threshold=network.unlike.threshold if network.unlike else None,
        unlike_reason=network.unlike_reason,
        frozen_backbone=network.frozen_backbone,
        protocol=source.protocol,
        split=source.split,
        accuracy=source.accuracy,
        weights=network.checkpoint_hash,
        version=finetune101.__version__,
    )


def _in_8_bits(graph: onnx.ModelProto, source: Source) -> Quantized:
    assert source.training
    pixels = resized_pictures(source.training, source.network, FROM + TRIED)
    return quantized(graph, np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def _layers_text(result: Quantized) -> str:
    if not result.kept:
        return f"All {result.layers} layers are in 8 bits"
    rest = "" if result.divergence <= LOSS else f"; the answers still differ by {result.divergence:.1e} nats, see below"
    worst = ", ".join(f"{name} ({cost:.1e} nats)" for name, cost in result.kept.items())
    return f"{len(result.kept)} of {result.layers} layers stay in fp32, as they lose most: {worst}{rest}"


def _speed_text(result: Quantized) -> str:
    whole, small = result.milliseconds
    return f"One picture takes {small:.1f} ms here, in floats {whole:.1f} ms ({whole / small:.1f} times as fast)"


def _write_graph(
    graph: onnx.ModelProto, network: TrainedNetwork, info: ExportedInfo, images: LabelledImages | None, out: Path
) -> Parity | None:
    """Writes ``graph`` with ``info`` and the measured parity into its metadata."""
    measured = None
    with atomic(out) as part:
        save_graph(graph, info, part)
        if images:
            exported = OnnxNetwork(part)

            def answers(pixels: np.ndarray) -> Outcome:
                outputs = exported.outputs(pixels)
                return outputs.probabilities, outputs.unlike

            measured = measure_parity(network, images, answers, answers if info.input == "images" else None)
            if info.precision == "fp32":
                check_parity(measured)
            else:
                check_8_bits(measured)
            save_graph(graph, dataclasses.replace(info, parity=measured), part)
    return measured


def save_graph(graph: onnx.ModelProto, info: ExportedInfo, file: Path) -> None:
    """Writes ``graph`` with ``info`` as its metadata. Raises Refused for one that is too large."""
    if (size := graph.ByteSize()) > MOST_BYTES:
        raise Refused(f"{info.model} has {size / 1e9:.1f} GB, more than an ONNX file holds; take --format safetensors")
    onnx.helper.set_model_props(graph, info.to_metadata())
    graph.producer_name, graph.producer_version = "finetune101", info.version
    file.write_bytes(graph.SerializeToString())


def _write_program(
    network: TrainedNetwork, info: ExportedInfo, images: LabelledImages | None, out: Path
) -> Parity | None:
    """PyTorch's own format; its input is resized pictures, uint8 (N, 3, size, size)."""
    exported, measured = program(network), None
    if images:
        module: Callable[..., tuple[torch.Tensor, ...]] = exported.module()

        def answers(pixels: np.ndarray) -> Outcome:
            with torch.no_grad():
                outputs = module(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
            return outputs[0].numpy(), outputs[2].numpy() if network.unlike else None

        measured = measure_parity(network, images, answers)
        check_parity(measured)
        info = dataclasses.replace(info, parity=measured)
    with atomic(out) as part:
        extra = {METADATA: json.dumps(dataclasses.asdict(info), allow_nan=False)}
        with part.open("wb") as file:
            torch.export.save(exported, file, extra_files=extra)
    return measured


def usual_file(source: Source, format: Format | Literal["web", "bundle"]) -> Path:
    """Where an export is written to when no place is named: NAME.onnx in the working folder, NAME_web, NAME_bundle."""
    name = Path(source.network.name).name.removesuffix(".safetensors") or "network"
    return Path(f"{name}{SUFFIXES.get(format, f'_{format}')}")
