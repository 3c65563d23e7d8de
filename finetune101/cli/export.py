"""The verb export: a trained network as a file for other programs. A signature is its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from finetune101.cli.parse import Flag
from finetune101.errors import Refused


def export(
    run: tyro.conf.Positional[str],
    *,
    format: Literal["onnx", "onnx-int8", "torch-export", "safetensors", "web", "bundle"] = "onnx",
    out: str | None = None,
    resized: Flag = False,
    parity: str | None = None,
    runtime: str | None = None,
    data: str | None = None,
    overwrite: Flag = False,
    runs: str = "runs",
) -> int:
    """Write a network as one file for other programs, and compare its answers with the network's.

    Args:
        run: Folder or name of a run, a best.safetensors, or released_finetune, released_random or released_probe.
        format: onnx: pictures in, calibrated probabilities out. onnx-int8: the same in 8-bit integers. torch-export:
            PyTorch's own format. safetensors: weights with classes, preprocessing and temperature. web: a folder for a
            static web host; the network runs in the visitor's browser. bundle: a folder with the network and a program
            that labels photos on a machine without finetune101 and without PyTorch.
        out: File or folder to write. Without: NAME.onnx in the working folder.
        resized: The ONNX file takes pictures that are resized already, N x 3 x size x size.
        parity: Folder of pictures to compare the answers on. Without: the validation images of the run.
        runtime: For web: the folder dist of the npm package onnxruntime-web, if not in node_modules.
        data: Where the images of the run are, if not where the run found them.
        overwrite: Replace a file that is there.
        runs: Folder of all runs.
    """
    from finetune101.deploy.export import export_network, open_source, usual_file

    if resized and not format.startswith("onnx"):
        raise Refused(f"--resized is for onnx and onnx-int8; leave it out for {format}")
    if parity and format == "safetensors":
        raise Refused("a file of weights has no answers to compare; leave --parity out")
    if runtime and format != "web":
        raise Refused("--runtime is for --format web; leave it out")
    if format == "bundle" and out and Path(out).exists() and not overwrite:
        raise Refused(f"{out} exists; give another --out, or --overwrite")
    source = open_source(run, data, runs)
    file = usual_file(source, format) if out is None else Path(out)
    if format == "web":
        from finetune101.serve.web import RUNTIME, export_web

        print(export_web(source, file, RUNTIME if runtime is None else Path(runtime), parity, overwrite))
        return 0
    if format == "bundle":
        from finetune101.deploy.bundle import export_bundle
        from finetune101.run import find_run

        print(export_bundle(source, file, find_run(run, runs), parity, overwrite))
        return 0
    print(export_network(source, file, format=format, resized=resized, parity=parity, overwrite=overwrite))
    return 0
