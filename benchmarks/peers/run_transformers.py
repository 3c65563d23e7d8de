"""transformers as its guide "Image classification" does it: imagefolder, Trainer; timm's network in TimmWrapper.

The guide's own rates: AdamW with 5e-5, batches of 16, gradients of 4 batches added up, a tenth of the steps warm-up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import Clock, Work, do, write_labels
from datasets import load_dataset
from torchvision import transforms
from transformers import (
    AutoModelForImageClassification,
    DefaultDataCollator,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}


def network(work: Work) -> Any:
    """The network with the weights of the work."""
    names = dict(enumerate(work["classes"]))
    config = TimmWrapperConfig(
        architecture=NAMES.get(work["network"], work["network"]),
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    model = AutoModelForImageClassification.from_config(config)
    if work["weights"]:
        from safetensors.torch import load_file

        model.timm_model.load_state_dict(load_file(work["weights"]), strict=False)  # without the new output layer
    return model


class Hands(TrainerCallback):
    """Tells the clock when training and evaluation of an epoch begin and end."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.running = clock, clock.part("train_s")

    def on_epoch_begin(self, *args: Any, **others: Any) -> None:
        """Training begins."""
        self.running = self.clock.part("train_s")
        self.running.__enter__()

    def on_step_end(self, *args: Any, **others: Any) -> None:
        """A step has ended."""
        self.clock.step()

    def on_epoch_end(self, *args: Any, **others: Any) -> None:
        """Training ends, evaluation begins."""
        self.running.__exit__(None, None, None)
        self.running = self.clock.part("val_s")
        self.running.__enter__()

    def on_evaluate(self, *args: Any, metrics: dict[str, float], **others: Any) -> None:
        """Evaluation ends."""
        self.running.__exit__(None, None, None)
        self.clock.top1(metrics["eval_accuracy"], 1)


def images(work: Work, scale: dict[str, Any]) -> Any:
    """Both subsets, decoded and changed when they are read."""
    data = load_dataset("imagefolder", data_dir=work["data"])
    last = [transforms.ToTensor(), transforms.Normalize(work["mean"], work["std"])]
    steps = {
        "train": [transforms.RandomResizedCrop(224, **scale), transforms.RandomHorizontalFlip(), *last],
        "validation": [transforms.Resize(256), transforms.CenterCrop(224), *last],
    }

    def transform_by(subset: str) -> Any:
        change = transforms.Compose(steps[subset])

        def transform(examples: dict[str, Any]) -> dict[str, Any]:
            pixels = [change(image.convert("RGB")) for image in examples["image"]]
            return {"pixel_values": pixels, "label": examples["label"]}

        return transform

    return {subset: data[subset].with_transform(transform_by(subset)) for subset in steps}


def train(work: Work, clock: Clock) -> None:
    """The guide's Trainer."""
    own = work["recipe"] == "own"
    data = images(work, {} if own else {"scale": (0.35, 1.0)})
    rates: dict[str, Any] = {"learning_rate": 0.01, "optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.0}
    if own:
        rates = {"learning_rate": 5e-5, "gradient_accumulation_steps": 4, "warmup_steps": 0.1}
    settings = TrainingArguments(
        output_dir=work["folder"],
        remove_unused_columns=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        per_device_train_batch_size=16 if own else work["batch_size"],
        per_device_eval_batch_size=work["batch_size"],
        num_train_epochs=work["epochs"],
        dataloader_num_workers=work["workers"],
        logging_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        use_cpu=True,
        bf16=work["bf16"],
        **rates,
    )
    trainer = Trainer(
        model=network(work),
        args=settings,
        data_collator=DefaultDataCollator(),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=lambda x: {"accuracy": float((np.argmax(x.predictions, axis=1) == x.label_ids).mean())},
        callbacks=[Hands(clock)],
    )
    trainer.train()


def predict(work: Work) -> None:
    """Labels of a folder of photos by a pipeline with its batches of one, which were faster than 64 on a CPU."""
    settings = {
        "input_size": [3, 224, 224],
        "mean": work["mean"],
        "std": work["std"],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    }
    model = network(work).eval()
    processor = TimmWrapperImageProcessor(pretrained_cfg=settings, architecture=model.config.architecture)
    photos = sorted(Path(work["photos"]).iterdir())
    with torch.no_grad():
        classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
        best = [answer[0] for answer in classify([str(photo) for photo in photos], top_k=1)]
    numbers = {name: i for i, name in enumerate(work["classes"])}
    write_labels(work, photos, [numbers[one["label"]] for one in best], [one["score"] for one in best])


if __name__ == "__main__":
    do(train, predict=predict)
