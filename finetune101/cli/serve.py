"""The verb serve: a page on this machine that tries a network."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from finetune101.cli.console import watched
from finetune101.cli.parse import Flag
from finetune101.errors import Refused

if TYPE_CHECKING:
    from finetune101.deploy.network import Network
    from finetune101.serve.worker import Classifier


def serve(
    network: tyro.conf.Positional[str] = "released_finetune",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_mb: int = 32,
    neighbours: Flag = False,
    data: str | None = None,
    runs: str = "runs",
) -> int:
    """Open a page on this machine that tries a network in the browser, and answers POST /predict.

    Ctrl-C ends it. GET /openapi.json describes the interface for programs.

    Args:
        network: A run (folder or name), a best.safetensors, a released network, or an exported FILE.onnx.
        host: Address to listen at; with another than 127.0.0.1 others on the network can use the page.
        port: Port to listen at; 0 takes a free one.
        max_mb: Megabytes that one request may have.
        neighbours: Show the nearest training images beside where the network looked. The first time this takes a
            pass over training images.
        data: Where the training images are, if not where the run found them.
        runs: Folder of all runs.
    """
    try:
        from finetune101.serve import app as pages
        from finetune101.serve import listen
        from finetune101.serve.uploads import Limits
    except ModuleNotFoundError as error:
        raise Refused(f"serve needs {error.name}; install it by: pip install 'finetune101[serve]'") from error
    if not 0 <= port <= 65535:
        raise Refused(f"--port is {port}; give a number from 0 to 65535")
    if not 1 <= max_mb <= 1000:
        raise Refused(f"--max-mb is {max_mb}; give a number from 1 to 1000")
    limits = Limits(megabytes=max_mb)
    with listen.listening(host, port) as server:
        classifier = open_classifier(network, runs, neighbours=neighbours or data is not None, data=data)
        if host not in pages.LOOPBACK:
            print(f"warning: everybody who reaches {host} can use this page; it asks for no password", file=sys.stderr)
        app = pages.application(classifier, limits, host)
        pages.warm_up(classifier)
        here, *elsewhere = listen.addresses_of(server)
        others = f", from other devices at {elsewhere[0]}" if elsewhere else ""
        print(f"Try {network} at {here}{others} (Ctrl-C ends it)", flush=True)
        with watched(Path(network), lambda: "the page is closed"):
            listen.http_server(app, limits).run(sockets=[server])
    return 0


def open_classifier(name: str, runs: str, neighbours: bool = False, data: str | None = None) -> Classifier:
    """The network that ``name`` means, with its training images if ``neighbours`` are wanted.

    Raises Refused where one of both is not there.
    """
    from finetune101.deploy.choose import named_network
    from finetune101.deploy.kept import answering_network
    from finetune101.deploy.onnx_network import OnnxNetwork
    from finetune101.run import open_run

    chosen = named_network(name, runs)
    if chosen is None:
        open_run(name, runs)  # says which runs there are
        raise AssertionError(name)
    if neighbours and chosen.file and chosen.file.suffix == ".onnx":
        raise Refused(f"{name} names no training images; serve its run, or leave --neighbours out")
    answering = answering_network(chosen)
    if isinstance(answering, OnnxNetwork):
        if (chosen.file and chosen.file.suffix == ".onnx") or find_spec("torch") is None:
            if neighbours:
                raise Refused("--neighbours needs PyTorch; install it by: pip install torch torchvision timm")
            return answering
        from finetune101.serve.quick import QuickNetwork

        network: QuickNetwork | Network = QuickNetwork(answering, chosen)
    else:
        from finetune101.deploy import network as by_pytorch

        network = by_pytorch.Network(answering, chosen.run)
    if neighbours:
        network.find_training_images(data)
    return network
