"""The score for images unlike the training images, fitted for a run and kept beside its checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from finetune101.data.cache import Images
from finetune101.data.splits import Manifest
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.features import FeatureExtractor
from finetune101.evaluation.unlike import UNLIKE, Unlike, fit_unlike, no_unlike_reason, write_unlike
from finetune101.run import Run


def keep_unlike(run: Run, network: TrainedNetwork, manifest: Manifest, images: Callable[[], Images]) -> Unlike | None:
    """The score of ``network``, a checkpoint of ``run``; fitted and written into the run where it has none yet.

    None where the run can have none (see ``no_unlike_reason``). Fitting costs a forward pass over the training and the
    validation images, whose features are kept in the cache folder. Raises Refused when the file cannot be written.
    """
    if network.unlike or no_unlike_reason(len(manifest.subsets["val"]), run.config().data.fit_on):
        return network.unlike
    unlike = unlike_of(network, manifest, images())
    write_unlike(run.path / UNLIKE, unlike, network.checkpoint_hash)
    return unlike


def unlike_of(network: TrainedNetwork, manifest: Manifest, images: Images) -> Unlike:
    """The score of ``network`` from the training and the validation images of its split."""
    extract = FeatureExtractor(network)
    features, _ = extract.of_images(images, manifest.subsets["train"])
    return fit_unlike(features, manifest.labels("train"), *extract.of_images(images, manifest.subsets["val"]))
