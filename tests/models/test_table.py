"""Every network of the table builds, takes its own images, and says truly where its head and its input are."""

from __future__ import annotations

import pytest
import torch
import torchvision

from finetune101.models import table
from finetune101.models.build import freeze, parameter_groups


def test_the_table_has_the_promised_networks() -> None:
    assert table.names() == [
        *("alexnet", "resnet18", "resnet34", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
        *("squeezenet1_1", "efficientnet_b0", "convnext_tiny", "vit_b_16"),
        *("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"),
        *("efficientnet_lite02", "efficientnet_lite012"),
    ]


@pytest.mark.parametrize("name", [*table.names(), "timm:mobilenetv3_small_050"])
def test_builds_forwards_and_groups(name: str) -> None:
    entry = table.lookup(name)
    model = entry.build(7).eval()
    size = entry.preprocessing.size
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 7)

    head, backbone = parameter_groups(model, entry.head, lr=0.01, backbone_lr_ratio=0.1)
    assert (head["name"], head["lr"]) == ("head", 0.01)
    assert (backbone["name"], backbone["lr"]) == ("backbone", pytest.approx(0.001))
    assert [len(parameter) for parameter in head["params"]] == [7, 7]  # weight and bias of the 7 outputs
    assert len(head["params"]) + len(backbone["params"]) == len(list(model.parameters()))

    freeze(model, entry.head)
    assert all(parameter.requires_grad for parameter in head["params"])
    assert not any(parameter.requires_grad for parameter in backbone["params"])


@pytest.mark.parametrize("name", [n for n in table.names() if isinstance(table.lookup(n).weights, table.Torchvision)])
def test_preprocessing_is_that_of_the_weights(name: str) -> None:
    entry = table.lookup(name)
    assert isinstance(entry.weights, table.Torchvision)
    weights = torchvision.models.get_weight(entry.weights.name)
    assert weights in torchvision.models.get_model_weights(name)
    published, own = weights.transforms(), entry.preprocessing
    assert published.crop_size == [own.size] and own.cache_size == own.size
    assert (tuple(published.mean), tuple(published.std)) == (own.mean, own.std)
    assert published.interpolation.value == own.interpolation


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0", 224), ("efficientnet_lite2", 260)])
def test_lite_input_is_x_minus_127_over_128(name: str, size: int) -> None:
    ours = table.lookup(name).preprocessing
    assert (ours.size, ours.interpolation) == (size, "bicubic")
    assert (200 / 255 - ours.mean[0]) / ours.std[0] == pytest.approx((200 - 127) / 128)


def test_timm_preprocessing_comes_from_timm() -> None:
    entry = table.lookup("timm:vit_tiny_patch16_224")
    assert (entry.head, entry.fixed_size) == ("head.", True)
    assert entry.preprocessing.mean == entry.preprocessing.std == (0.5, 0.5, 0.5)
    assert (entry.preprocessing.size, entry.preprocessing.interpolation) == (224, "bicubic")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet81", "did you mean resnet18?"),
        ("EfficientNet-Lite0", "did you mean efficientnet_lite0?"),
        ("resnet101", "give timm:resnet101"),
        ("???", "choose one of alexnet, resnet18"),
        ("timm:resnot18", "did you mean timm:resnet18?"),
        ("timm:resnet18.nope", "leave out what follows the dot"),
        ("timm:???", "timm.list_models"),
        ("timm:deit_tiny_distilled_patch16_224", "one output layer"),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError) as error:
        table.lookup(name)
    assert hint in str(error.value)
