"""What a trained network sees in image files: one prediction after the other, with calibrated probabilities."""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from finetune101.config import Count
from finetune101.deploy.inputs import Inputs
from finetune101.deploy.network import ranked_classes
from finetune101.deploy.prediction import Prediction
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.photos import decoded
from finetune101.fast import tune_allocator
from finetune101.files import typed


def predict_files(
    network: TrainedNetwork, inputs: Inputs, top_k: int = 5, batch_size: int = 64, show_progress: bool = True
) -> Iterator[Prediction]:
    """The ``top_k`` most probable classes of every image in ``inputs``, in order; ``Prediction.image`` is its path.

    One batch of images is in memory at a time. (path, reason) of images that cannot be read are added to
    ``inputs.failed``. With fewer classes than ``top_k``, all are given. A progress bar counts images on a terminal.
    Raises Refused when a number is below 1, or the network's output is not finite.
    """
    top_k = typed(Count, top_k, "--top-k is")
    batch_size = typed(Count, batch_size, "--batch-size is")
    return _predictions(network, inputs, top_k, batch_size, show_progress)


def _predictions(
    network: TrainedNetwork, inputs: Inputs, top_k: int, batch_size: int, show_progress: bool
) -> Iterator[Prediction]:
    if network.fast_kernels:
        tune_allocator()
    forward = network.forward()
    files = list(inputs.files)
    with tqdm(total=len(files), unit="img", leave=False, disable=None if show_progress else True) as bar:
        for paths, x in decoded(files, network.preprocessing, network.world, batch_size, inputs.failed):
            ranked = ranked_classes(network, forward(x).cpu(), top_k)
            yield from (Prediction(tuple(classes), path) for path, classes in zip(paths, ranked, strict=True))
            bar.update(len(paths))
