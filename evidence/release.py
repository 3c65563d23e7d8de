"""Puts the best epoch of a tested run into the package, in half precision, with its card.

python evidence/release.py RUN released_finetune|released_random|released_probe [--card]
python evidence/release.py released_finetune|released_random|released_probe [--onnx]

With --card the weights stay as they are: published evidence of the run is enough. Without RUN, only the score for
images unlike its training images is fitted again, on the images in $FINETUNE101_DATA, and the ONNX file made
anew; with --onnx the ONNX file alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import onnx
from onnx.numpy_helper import to_array

from finetune101.deploy.card import card_of, card_text
from finetune101.deploy.export import Source, exported_info, save_graph
from finetune101.deploy.graph import MEANS, onnx_graph, prepend_resize, stored_in
from finetune101.deploy.kept import check_same
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.deploy.released import open_reference, open_released, score_released
from finetune101.deploy.released_files import FOLDER, RELEASED
from finetune101.evaluation.checkpoint import read_checkpoint
from finetune101.evaluation.unlike import UNLIKE, no_unlike_reason, write_unlike
from finetune101.evaluation.unlike_run import unlike_of
from finetune101.files import atomic
from finetune101.run import Run, save_checkpoint
from finetune101.standalone import PICTURES

LICENCE = "apache-2.0"
"""Of all released weights, also of those from random initialisation."""


def release(run: Run, name: str) -> None:
    """Writes the best epoch of ``run`` to finetune101/weights/<file>.safetensors, in half precision.

    Raises ValueError when the run has no temperature.
    """
    test, split = run.read_json("test.json"), run.read_json("split.json")
    if "calibration_scaled" not in test:
        raise ValueError(f"{run.path} has no temperature: it must have validation images that it was not trained on")
    state, info = read_checkpoint(run.best)
    head = name == "released_probe"
    tensors = {key: value for key, value in state.items() if not head or key.startswith("classifier.")}
    small = {
        key: value.half() if value.is_floating_point() and value.dim() > 1 else value for key, value in tensors.items()
    }
    temperature = test["calibration_scaled"]["temperature"]
    info |= {"temperature": str(temperature), "split": json.dumps({"seed": split["seed"], "hash": split["hash"]})}
    info |= {"part": "head"} if head else {}
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{RELEASED[name]}.safetensors"
    save_checkpoint(file, small, info)
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB)")


def release_card(run: Run, name: str) -> None:
    """Writes finetune101/weights/<file>.md about the released network ``name``, which was made of ``run``.

    Scores the released file on the test images: in half precision an image or two may differ from the run's. Raises
    ValueError when the run is not tested, or its images are not there.
    """
    config, (network, info) = run.config(), open_released(name)
    scored = score_released(name, config.data.root)
    low, high = scored["top1_interval"]
    command = f"finetune101 train --recipe {config.recipe} --model {config.model.name}"
    command += "" if config.model.pretrain else " --no-pretrain"
    part = "the output layer only; the ImageNet weights are those of its package" if info.part else "all layers"
    note = (
        f"The file is {RELEASED[name]}.safetensors: {part}, in half precision (biases and batch-norm statistics in"
        f" single precision). Scored again on the same {scored['n']} test images, this file has {scored['top1']:.2f} %"
        f" (95 % interval {low:.2f} to {high:.2f} %), mean per class {scored['mean_per_class']:.2f} %; all other"
        f" numbers are those of the run that it was made of. python test.py --exp {name} scores it."
    )
    card = dataclasses.replace(
        card_of(run), name=name, file=name, licence=LICENCE, input=info.preprocessing, temperature=network.temperature,
        marks_unlike=network.unlike is not None,
        command=f"{command} --seed {config.system.seed} --exp NAME",
        notes=(note, "These weights are released under Apache-2.0: to try the tool, to teach, and as a baseline."),
    )  # fmt: skip
    file = FOLDER / f"{RELEASED[name]}.md"
    with atomic(file) as part_file:
        part_file.write_text(card_text(card), encoding="utf-8")
    print(f"{file}")


def release_unlike(name: str, data: str | None) -> None:
    """Writes the score for images unlike the training images of the released network ``name`` beside its weights."""
    network, info = open_released(name)
    opened = open_reference(network, data, name, info.split)
    if reason := no_unlike_reason(len(opened.manifest.subsets["val"]), opened.config.fit_on):
        print(f"No score for unlike images: {reason}")
        return
    file = FOLDER / f"{RELEASED[name]}.{UNLIKE}"
    unlike = unlike_of(network, opened.manifest, opened.images())
    write_unlike(file, unlike, network.checkpoint_hash)
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB): threshold {unlike.threshold:.4f}")


def release_onnx(name: str) -> None:
    """Writes the released network ``name`` as ONNX, whose weights are those of the safetensors files beside it."""
    network, info = open_released(name)
    if info.part:
        print(f"{name} stands on ImageNet weights, which are no part of the package: no ONNX file")
        return
    graph, stem = onnx_graph(network, fused=False), FOLDER / RELEASED[name]
    prepend_resize(graph, network.preprocessing)
    drop_zero_biases(graph)
    constants = {one.name for one in graph.graph.initializer}
    weights = {key: f"model.{key}" for key in network.model.state_dict() if f"model.{key}" in constants}
    files = [(stem.with_name(f"{stem.name}.safetensors"), weights)]
    if network.unlike:
        files.append((stem.with_name(f"{stem.name}.{UNLIKE}"), {"means": MEANS}))
    stored_in(graph, files)
    file = stem.with_name(f"{stem.name}.onnx")
    save_graph(graph, exported_info(Source(network, split=info.split.hash if info.split else None), PICTURES), file)
    check_same(OnnxNetwork(file, in_place=True), network)
    print(f"{file} ({file.stat().st_size / 1e6:.2f} MB)")


def drop_zero_biases(graph: onnx.ModelProto) -> None:
    """Removes the biases of convolutions that are all 0: batch norm adds its own."""
    zeros = {one.name for one in graph.graph.initializer if not to_array(one).any()}
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv" and len(node.input) == 3]
    dropped = {node.input[2] for node in convolutions} & zeros
    for node in convolutions:
        if node.input[2] in dropped:
            del node.input[2]
    kept = [one for one in graph.graph.initializer if one.name not in dropped]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("name", choices=list(RELEASED))
    parser.add_argument("--card", action="store_true", help="write the card only")
    parser.add_argument("--onnx", action="store_true", help="write the ONNX file only")
    arguments = parser.parse_args()
    if arguments.run is None:
        if not arguments.onnx:
            release_unlike(arguments.name, None)
        release_onnx(arguments.name)
    else:
        run = Run(arguments.run)
        if not arguments.card:
            release(run, arguments.name)
            release_unlike(arguments.name, run.config().data.root)
            release_onnx(arguments.name)
        release_card(run, arguments.name)
