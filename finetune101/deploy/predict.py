"""What a trained network sees in image files: one prediction after the other, with calibrated probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

from finetune101.config import Count
from finetune101.deploy.inputs import Inputs
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.deploy.prediction import Prediction
from finetune101.files import typed

if TYPE_CHECKING:
    from finetune101.evaluation.checkpoint import TrainedNetwork


def predict_files(
    network: TrainedNetwork | OnnxNetwork,
    inputs: Inputs,
    top_k: int = 5,
    batch_size: int = 64,
    show_progress: bool = True,
) -> Iterator[Prediction]:
    """The ``top_k`` most probable classes of every image in ``inputs``, in order; ``Prediction.image`` is its path.

    Threads decode while the network runs; few images are in memory at a time. (path, reason) of images that cannot be
    read are added to ``inputs.failed``. With fewer classes than ``top_k``, all are given. A progress bar counts images
    on a terminal. Raises Refused when a number is below 1, or the network's output is not finite.
    """
    top_k = typed(Count, top_k, "--top-k is")
    batch_size = typed(Count, batch_size, "--batch-size is")
    if isinstance(network, OnnxNetwork):
        batches = _exported_labels(network, inputs, top_k, batch_size)
    else:
        batches = _labels(network, inputs, top_k, batch_size)
    return _with_progress(batches, len(inputs.files), show_progress)


def _with_progress(batches: Iterator[list[Prediction]], total: int, show_progress: bool) -> Iterator[Prediction]:
    with tqdm(total=total, unit="img", leave=False, disable=None if show_progress else True) as bar:
        for predictions in batches:
            yield from predictions
            bar.update(len(predictions))


def _labels(network: TrainedNetwork, inputs: Inputs, top_k: int, batch_size: int) -> Iterator[list[Prediction]]:
    from finetune101.deploy.labels import Labeller
    from finetune101.evaluation.photos import decoded
    from finetune101.fast import tune_allocator

    if network.fast_kernels:
        tune_allocator()
    label = Labeller(network)
    for paths, x in decoded(list(inputs.files), network.preprocessing, network.world, batch_size, inputs.failed):
        yield label(x, paths, top_k)


def _exported_labels(network: OnnxNetwork, inputs: Inputs, top_k: int, batch_size: int) -> Iterator[list[Prediction]]:
    for paths, pixels in network.decoded(inputs.files, inputs.failed, batch_size):
        yield network.label(pixels, paths, top_k)
