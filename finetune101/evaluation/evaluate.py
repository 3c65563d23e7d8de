"""A finished run -> test.json and predictions.csv: the only place where the test set of a run is scored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune101.config import DataConfig
from finetune101.data import cache, duplicates, splits
from finetune101.data.batches import eval_batches
from finetune101.data.images import Index, class_of, find_data, index_images
from finetune101.data.layouts import layout_for
from finetune101.errors import Refused
from finetune101.evaluation import metrics
from finetune101.evaluation.checkpoint import TrainedNetwork, keep_temperature, open_network
from finetune101.evaluation.forward import logits
from finetune101.evaluation.metrics import Calibrated
from finetune101.evaluation.predictions import write_pair
from finetune101.evaluation.unlike_run import keep_unlike
from finetune101.files import FORMAT
from finetune101.run import Run


def scores(output: Tensor, labels: Tensor) -> dict[str, Any]:
    """Every number of one evaluation of logits (N, classes) against labels (N,); accuracies in percent.

    Raises Refused for logits that are not finite.
    """
    if bad := int((~torch.isfinite(output)).any(1).sum()):
        raise Refused(f"the network's output is not finite for {bad} of {len(output)} images; train it again")
    prediction = output.argmax(1)
    correct = int((prediction == labels).sum())
    low, high = metrics.wilson(correct, len(labels))
    return {
        "n": len(labels),
        "correct": correct,
        "loss": metrics.cross_entropy(output, labels),
        "top1": 100 * correct / len(labels),
        "top1_interval": [low, high],
        "top5": metrics.top_k(output, labels, 5),
        "mean_per_class": metrics.mean_per_class(prediction, labels, output.shape[1]),
    }


NO_HELP = "no temperature helped on the validation images"


@dataclass(frozen=True)
class Opened:
    """A network that is ready to be scored, its split and the images of it."""

    network: TrainedNetwork
    manifest: splits.Manifest
    index: Index
    config: DataConfig
    mirror: bool = False

    def logits(self, subset: str, batch_size: int) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and labels (N,) of ``subset``, in the manifest's order. Raises Refused without any."""
        paths, labels, network = self.manifest.subsets[subset], self.manifest.labels(subset), self.network
        if not paths:
            raise Refused(f"the split has no {subset} images; {_instead(subset)}")
        batches = eval_batches(self.images(), paths, labels, batch_size=batch_size, world=network.world)
        fast = network.fast_kernels
        return logits(network.model, batches, network.world, fast=fast, mirror=self.mirror)

    def images(self) -> cache.Images:
        """The images of the split, as the network's preprocessing wants them."""
        wanted, skipped = (path for paths in self.manifest.subsets.values() for path in paths), self.manifest.skipped
        return cache.open_images(self.index, self.network.preprocessing, self.config.cache, skipped, wanted)

    @property
    def chosen_on_val(self) -> bool:
        """Whether there are validation images that were not trained on."""
        return validates(self.manifest, self.config)

    def calibrated(self, batch_size: int) -> Calibrated:
        """The temperature of the network, found on its validation images where none is stored with its weights."""
        stored = self.network.temperature
        if stored is not None and not self.mirror:
            return Calibrated(temperature=stored, reason=self._stored_reason() if stored == 1 else "")
        if not self.chosen_on_val:
            return Calibrated(temperature=1.0, reason="no validation images were kept from training")
        return metrics.calibrate(*self.logits("val", batch_size))

    def _stored_reason(self) -> str:
        """Why the stored temperature is 1; older checkpoints do not say it."""
        if self.network.temperature_reason:
            return self.network.temperature_reason
        few = metrics.too_few(len(self.manifest.subsets["val"])) if self.chosen_on_val else ""
        return few or NO_HELP


def _instead(subset: str) -> str:
    """What can be scored where the split has no images of ``subset``."""
    if subset != "test":
        return "choose another --subset"
    return (
        "score its validation images by --subset val, or another folder of labelled images by --data FOLDER --as-test"
    )


def open_scored(run: Run, data: str | None = None, index: Index | None = None, mirror: bool = False) -> Opened:
    """``run`` with its images, from ``data`` where that is given; ``index`` saves reading them again where it fits.

    Raises Refused when the images are not those of the split.
    """
    config = run.config().data
    config = dataclasses.replace(config, root=run.image_folder(data))
    manifest = splits.from_json(run.read_json("split.json"))
    network = open_network(run)
    if tuple(network.classes) != manifest.classes:
        raise Refused(f"{run.best} knows other classes than the split of {run.path}; train the run again")
    root = find_data(config.root)
    if index is None or index.root != root:
        index = index_images(root, layout_for(manifest.protocol))
    splits.check_split(manifest, index)
    return Opened(network, manifest, index, config, mirror)


def evaluate(
    run: Run,
    *,
    subset: str = "test",
    data: str | None = None,
    batch_size: int = 64,
    mirror: bool = False,
    with_unlike: bool = False,
) -> dict[str, Any]:
    """Scores the best checkpoint of ``run`` on ``subset`` of its own split; "test" is written to the run directory.

    ``data`` overrides where the images are; with ``mirror`` each is seen twice (see ``forward.Forward``). The loss is
    that of the outputs as they are; the confidence in predictions.csv is calibrated by the temperature in the result.
    ``with_unlike`` fits the score for images unlike the training images where the run has none.
    Raises Refused when the images are not those of the split, before anything is written.
    """
    check_batch_size(batch_size)
    check_not_trained(run, subset)
    opened = open_scored(run, data, mirror=mirror)
    output, labels = opened.logits(subset, batch_size)
    result = scores(output, labels)
    if opened.network.frozen_backbone:
        result["frozen_backbone"] = True
    if layers := run.config().model.random_layers:
        result["random_layers"] = list(layers)
    if subset == "test":
        calibrated = opened.calibrated(batch_size)
        result |= {
            "manifest_hash": opened.manifest.hash(),
            "protocol": opened.manifest.protocol,
            "epoch": opened.network.epoch or 0,
            "times_scored": times_scored(run) + 1,
            "mirror": mirror,
            "world": opened.network.world.describe(),
        }
        result |= calibrations(output, labels, calibrated, opened.chosen_on_val)
        result["without_duplicates"] = _without_duplicates(opened, output.argmax(1) == labels)
        if opened.network.temperature is None and opened.chosen_on_val and not mirror:
            keep_temperature(run, opened.network, calibrated)
        rows = prediction_rows(opened.manifest, output, calibrated.temperature)
        write_pair(run.path, "", {"format": FORMAT, **result}, rows)
    if with_unlike:
        keep_unlike(run, opened.network, opened.manifest, opened.images)
    return result


def check_not_trained(run: Run, subset: str) -> None:
    """Raises Refused where ``subset`` is the validation images and ``run`` was trained on them."""
    if subset == "val" and run.config().data.fit_on == "train+val":
        raise Refused(
            f"{run.path} was trained on the validation images too (--fit-on train+val): a score on them says nothing;"
            " test it on other images: --data FOLDER --as-test"
        )


def check_batch_size(batch_size: int) -> None:
    """Raises Refused for one that cannot be."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise Refused(f"--batch-size is {batch_size}; give at least 1")


def times_scored(run: Run) -> int:
    """How often the test images of ``run`` were looked at: a test set that is looked at often is no test set."""
    return int(run.read_json("test.json").get("times_scored", 0)) if run.has("test.json") else 0


def _without_duplicates(opened: Opened, correct: Tensor) -> dict[str, Any]:
    """Top-1 (percent) on the test images of which no near-duplicate was trained on, and how many those are."""
    test = opened.manifest.subsets["test"]
    doubled = duplicates.with_duplicate(opened.index, test, trained_on(opened.manifest, opened.config))
    alone = torch.tensor([path not in doubled for path in test])
    n = int(alone.sum())
    return {"n": n, "top1": 100 * int(correct[alone].sum()) / n if n else None}


def trained_subsets(config: DataConfig) -> tuple[str, ...]:
    """The subsets of the split that a run with these settings trains on."""
    return ("train", "val") if config.fit_on == "train+val" else ("train",)


def trained_on(manifest: splits.Manifest, config: DataConfig) -> list[str]:
    """Paths of the images that a run with these settings trains on."""
    return [path for subset in trained_subsets(config) for path in manifest.subsets[subset]]


def validates(manifest: splits.Manifest, config: DataConfig) -> bool:
    """Whether there are validation images that a run with these settings does not train on."""
    return bool(manifest.subsets["val"]) and config.fit_on == "train"


def calibrations(output: Tensor, labels: Tensor, calibrated: Calibrated, scaled: bool = True) -> dict[str, Any]:
    """The temperature and why it is 1 where it is; calibration of logits as they are and, ``scaled``, by it."""
    t, reason = calibrated.temperature, calibrated.reason
    result: dict[str, Any] = {"temperature": t} | ({"temperature_reason": reason} if reason else {})
    result["calibration"] = calibration(output, labels)
    if scaled:
        result["calibration_scaled"] = {"temperature": t, **calibration(output, labels, t)}
    return result


def calibration(output: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, Any]:
    """Expected calibration error (a share) of logits (N, classes) over ``temperature``, and the bins behind it."""
    bins = metrics.reliability(*metrics.confidences(output, temperature, labels))
    return {"ece": metrics.ece(bins), "bins": bins}


def prediction_rows(manifest: splits.Manifest, output: Tensor, temperature: float) -> list[tuple[str, str, str, float]]:
    """The rows of predictions.csv for the logits (N, classes) of the test images; the confidence is calibrated."""
    confidence, prediction = metrics.probabilities(output, temperature).max(1)
    columns = zip(manifest.subsets["test"], prediction.tolist(), confidence.tolist(), strict=True)
    return [(path, class_of(path), manifest.classes[p], c) for path, p, c in columns]
