"""torchvision as PyTorch's tutorial "Transfer Learning for Computer Vision" writes it: ImageFolder and a plain loop.

Its reference script is not in the package and cannot fine-tune to other classes than ImageNet's without a change. The
tutorial's own rates: SGD with .001, batches of 4. Channels-last as the tutorial of that name says. torchvision has no
EfficientNet-Lite0: it is timm's network. Prediction as torchvision's page on models: one image after the other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from clock import Clock, Work, do, write_labels
from torch import nn
from torchvision import datasets, models, transforms
from torchvision.io import ImageReadMode, decode_image


def network(work: Work) -> nn.Module:
    """The network with the weights of the work, in channels-last."""
    classes = len(work["classes"])
    if work["network"] == "efficientnet_lite0":
        import timm

        model = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    else:
        model = models.get_model(work["network"], num_classes=classes)
    if work["weights"]:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(work["weights"]), strict=False)  # the new output layer is not in the file
    return model.to(memory_format=torch.channels_last)


def train(work: Work, clock: Clock) -> None:
    """The tutorial's loop."""
    own = work["recipe"] == "own"
    scale = {} if own else {"scale": (0.35, 1.0)}
    last = [transforms.ToTensor(), transforms.Normalize(work["mean"], work["std"])]
    steps = {
        "train": [transforms.RandomResizedCrop(224, **scale), transforms.RandomHorizontalFlip(), *last],
        "val": [transforms.Resize(256), transforms.CenterCrop(224), *last],
    }
    images = {
        x: datasets.ImageFolder(str(Path(work["data"]) / x), transforms.Compose(steps[x])) for x in ("train", "val")
    }
    size = 4 if own else work["batch_size"]
    loaders = {
        x: torch.utils.data.DataLoader(
            images[x], batch_size=size, shuffle=x == "train", num_workers=work["workers"], drop_last=False
        )
        for x in images
    }
    model, criterion = network(work), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001 if own else 0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    for epoch in range(work["epochs"]):
        model.train()
        with clock.part("train_s"):
            for inputs, labels in loaders["train"]:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=work["bf16"]):
                    outputs = model(inputs.to(memory_format=torch.channels_last))
                    loss = criterion(outputs, labels)
                loss.backward()
                optimizer.step()
                loss.item()
                clock.step()
            scheduler.step()
        if own and epoch < work["epochs"] - 1:
            continue
        model.eval()
        with clock.part("val_s"), torch.no_grad():
            right = 0.0
            for inputs, labels in loaders["val"]:
                right += float((model(inputs.to(memory_format=torch.channels_last)).argmax(1) == labels).sum())
        clock.top1(right, len(images["val"]))
        torch.save(model.state_dict(), Path(work["folder"]) / "best_model_params.pt")


def predict(work: Work) -> None:
    """Labels of a folder of photos, one after the other."""
    model = network(work).eval()
    photos = sorted(Path(work["photos"]).iterdir())
    preprocess = transforms.Compose(
        [
            transforms.Resize(256, antialias=True),
            transforms.CenterCrop(224),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(work["mean"], work["std"]),
        ]
    )
    labels, scores = [], []
    with torch.no_grad():
        for photo in photos:
            batch = preprocess(decode_image(str(photo), mode=ImageReadMode.RGB)).unsqueeze(0)
            prediction = model(batch.to(memory_format=torch.channels_last)).squeeze(0).softmax(0)
            labels.append(int(prediction.argmax()))
            scores.append(float(prediction[labels[-1]]))
    write_labels(work, photos, labels, scores)


if __name__ == "__main__":
    do(train, predict=predict)
