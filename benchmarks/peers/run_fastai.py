"""fastai as its quick start does it: ImageDataLoaders.from_folder, vision_learner, fine_tune; load_learner to predict.

fine_tune with its own rates and batches of 64: an epoch of the new head alone, then all layers. Channels-last by its
callback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Clock, Work, do, write_labels
from fastai.callback.channelslast import ChannelsLast
from fastai.learner import Learner, load_learner
from fastai.vision.all import (
    SGD,
    Adam,
    Callback,
    FlipItem,
    ImageDataLoaders,
    Normalize,
    RandomResizedCrop,
    Resize,
    accuracy,
    get_image_files,
    resnet18,
    vision_learner,
)


class Hands(Callback):
    """Tells the clock when training and validation of an epoch begin and end."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.running = clock, clock.part("train_s")

    def _begin(self, name: str) -> None:
        self.running = self.clock.part(name)
        self.running.__enter__()

    def before_train(self) -> None:
        """Training begins."""
        self._begin("train_s")

    def after_step(self) -> None:
        """A step has ended."""
        self.clock.step()

    def after_train(self) -> None:
        """Training ends."""
        self.running.__exit__(None, None, None)

    def before_validate(self) -> None:
        """Validation begins."""
        self._begin("val_s")

    def after_validate(self) -> None:
        """Validation ends."""
        self.running.__exit__(None, None, None)


def loaders(work: Work, own: bool) -> Any:
    """The images of train/ and val/."""
    changes = Resize(224) if own else [RandomResizedCrop(224, min_scale=0.35), FlipItem()]
    size = 64 if own else work["batch_size"]
    options = {"bs": size, "num_workers": work["workers"], "item_tfms": changes, "device": "cpu"}
    return ImageDataLoaders.from_folder(work["data"], train="train", valid="val", **options)


def train(work: Work, clock: Clock) -> None:
    """One cycle over all layers, or fine_tune with fastai's own rates."""
    own = work["recipe"] == "own"
    images = loaders(work, own)
    if work["network"] == "efficientnet_lite0":
        file = {"pretrained_cfg_overlay": {"file": work["weights"]}}
        options: dict[str, Any] = {"arch": "tf_efficientnet_lite0", "pretrained": True, **file}
    else:
        options = {"arch": resnet18, "pretrained": False}
    learn = vision_learner(
        images, metrics=accuracy, opt_func=Adam if own else SGD, cbs=[ChannelsLast(), Hands(clock)], **options
    )
    learn.path = Path(work["folder"])
    with learn.no_bar():
        if own:
            learn.fine_tune(work["epochs"])
        else:
            learn.unfreeze()
            learn.fit_one_cycle(work["epochs"], 0.01)
    for values in learn.recorder.values:
        clock.top1(values[-1], 1)
    learn.remove_cbs(learn.hands)  # the clock cannot be pickled
    learn.export("export.pkl")


def export(work: Work) -> None:
    """Writes the learner that ``predict`` reads: timm's network with the weights that everybody has."""
    import timm
    from safetensors.torch import load_file

    model = timm.create_model("tf_efficientnet_lite0", num_classes=len(work["classes"]))
    model.load_state_dict(load_file(work["weights"]))
    images = loaders(work, own=True)
    images.add_tfms([Normalize.from_stats(work["mean"], work["std"], cuda=False)], "after_batch")
    learn = Learner(images, model)
    learn.path = Path(work["export"]).parent
    learn.export(Path(work["export"]).name)


def predict(work: Work) -> None:
    """Labels of a folder of photos."""
    learn = load_learner(work["export"])
    learn.add_cb(ChannelsLast())
    photos = sorted(get_image_files(work["photos"]))
    batches = learn.dls.test_dl(photos, bs=64, num_workers=work["workers"])
    with learn.no_bar():
        probabilities, _ = learn.get_preds(dl=batches)
    best = probabilities.max(1)
    write_labels(work, photos, best.indices.tolist(), best.values.tolist())


if __name__ == "__main__":
    do(train, predict=predict, export=export)
