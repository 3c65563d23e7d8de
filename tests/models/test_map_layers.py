"""The layers of class activation maps: of which shape their outputs are, and where tokens belong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune101.errors import Refused
from finetune101.models.build import build
from finetune101.models.map_layers import as_maps, map_layers
from finetune101.models.table import MapLayer, names


def output_of(model: nn.Module, layer: MapLayer, size: int) -> Tensor:
    outputs: list[Tensor] = []
    hook = model.get_submodule(layer.name).register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    hook.remove()
    return outputs[0]


TIMM = ("timm:resnet10t", "timm:convnext_atto", "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("name", [*(name for name in names() if name != "vit_b_16"), *TIMM])
def test_a_coarse_map_and_where_there_is_one_a_fine_map(name: str) -> None:
    size = 224 if "224" in name else 128
    model = build(name, 2, pretrain=False, size=size).model
    for layers in map_layers(name, model, size):
        sides = [as_maps(output_of(model, layer, size), layer).shape[2:] for layer in layers]
        assert all(height == width for height, width in sides)
        sides_of_part = [height for height, _ in sides]
        if "vit" in name:
            assert sides_of_part == [14]
        else:
            coarse, fine = sides_of_part
            assert 3 <= coarse < fine and fine >= size * 0.85 / 8 * 0.85


def test_tokens_go_row_by_row_without_the_class_token() -> None:
    tokens = torch.arange(7.0).view(1, 7, 1)[:, :5]
    maps = as_maps(tokens, MapLayer("norm", "tokens", extra=1))
    assert maps.tolist() == [[[[1, 2], [3, 4]]]]
    with pytest.raises(Refused, match="no square"):
        as_maps(tokens, MapLayer("norm", "tokens"))
