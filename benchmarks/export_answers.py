"""The answers of exported networks beside those of predict, on the test images of the reference split.

``python benchmarks/export_answers.py --data FOLDER [--network released_finetune]`` exports the network as ONNX and as
8-bit ONNX (calibrated on training images), asks all of them for every test image and writes results/export/:
predictions.csv (one column for each way) and export.json (sizes, layers that stay in fp32, parity, machine).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from finetune101.data.batches import to_input
from finetune101.data.images import class_of
from finetune101.deploy.export import export_network, open_source
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.deploy.parity import LabelledImages, cached_batches, whole_picture
from finetune101.deploy.released import open_reference, open_released
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.forward import Forward
from finetune101.files import write_json
from finetune101.standalone import csv_cell, resize_pixels
from finetune101.training.benchmark import machine_facts

WAYS = ("predict", "predict_fp32", "onnx_pictures", "onnx_resized", "int8_pictures", "int8_resized")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--network", default="released_finetune")
    parser.add_argument("--out", type=Path, default=Path("results/export"))
    parser.add_argument("--keep", type=Path, help="a folder that the exported files are copied to")
    arguments = parser.parse_args()
    trained, info = open_released(arguments.network)
    opened_split = open_reference(trained, arguments.data, arguments.network, info.split)
    paths, root = opened_split.manifest.subsets["test"], opened_split.index.root
    source = open_source(arguments.network, arguments.data)
    facts: dict[str, object] = {"network": arguments.network, "images": len(paths), **machine_facts()}
    facts["predict"] = trained.world.describe()
    with tempfile.TemporaryDirectory() as folder:
        exported = {
            name: export_network(source, Path(folder) / f"{name}.onnx", format=form)  # type: ignore[arg-type]
            for name, form in (("onnx", "onnx"), ("int8", "onnx-int8"))
        }
        for name, one in exported.items():
            assert one.parity
            parity = dataclasses.asdict(one.parity)
            facts[name] = {"bytes": one.file.stat().st_size, "parity": parity, "notes": one.notes}
        if arguments.keep:
            shutil.copytree(folder, arguments.keep, dirs_exist_ok=True)
        files = {name: OnnxNetwork(one.file) for name, one in exported.items()}
        rows = list(_rows([root / path for path in paths], source.network, files))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "predictions.csv", "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("path", "label", *WAYS))
        for path, numbers in zip(paths, rows, strict=True):
            writer.writerow(
                [csv_cell(path), csv_cell(class_of(path)), *(csv_cell(trained.classes[k]) for k in numbers)]
            )
    write_json(arguments.out / "export.json", facts)
    print(json.dumps({way: _changed(rows, way) for way in WAYS}, indent=1))


def _rows(files: list[Path], network: TrainedNetwork, exported: dict[str, OnnxNetwork]) -> Iterator[list[int]]:
    """The number of the most probable class of each image, in the order of ``WAYS``."""
    own, world = network.preprocessing, dataclasses.replace(network.world, precision="fp32")
    forward, exact = network.forward(), Forward(network.model, world)
    for batch, cached in cached_batches(LabelledImages(files, "test"), network):
        x = torch.from_numpy(cached).permute(0, 3, 1, 2)
        answers = [f(to_input(x, own, w)).cpu().numpy() for f, w in ((forward, network.world), (exact, world))]
        small = np.stack([resize_pixels(pixels, own.size, own.interpolation) for pixels in cached])
        for runtime in exported.values():
            answers.append(np.concatenate([runtime.probabilities(whole_picture(file)[None]) for file in batch]))
            answers.append(runtime.probabilities(small))
        yield from np.stack([answer.argmax(1) for answer in answers], 1).tolist()


def _changed(rows: list[list[int]], way: str) -> int:
    column = WAYS.index(way)
    return sum(row[column] != row[0] for row in rows)


if __name__ == "__main__":
    main()
