"""Weights that other programs saved: wrappers come off, and what would not work is refused before anything is built."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from finetune101.errors import Refused
from finetune101.models.build import build, check_size, load_foreign, norms_single_values
from finetune101.models.weights import read_weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """The tensors of a seeded SqueezeNet with its 1000-way head."""
    torch.manual_seed(5)
    return torchvision.models.squeezenet1_1().state_dict()


def prefixed(prefix: str) -> Callable[[State], dict[str, Any]]:
    return lambda state: {prefix + key: value for key, value in state.items()}


def lightning(state: State) -> dict[str, Any]:
    """As a LightningModule saves itself, with a loss that has weights."""
    tensors = {"criterion.weight": torch.ones(3), **prefixed("model._orig_mod.")(state)}
    return {"epoch": 3, "global_step": 7, "state_dict": tensors, "optimizer_states": [], "hyper_parameters": {"lr": 1}}


def inside(state: State) -> dict[str, Any]:
    """Layers that are wrapped within the network, as ``DataParallel(model.features)`` and ``compile`` do."""
    return {key.replace("features.", "features.module.").replace(".squeeze.", "._orig_mod.squeeze."): value
            for key, value in state.items()}  # fmt: skip


WRAPPED: dict[str, Callable[[State], dict[str, Any]]] = {
    "DataParallel": prefixed("module."),
    "compile": prefixed("_orig_mod."),
    "compiled in DDP": prefixed("module._orig_mod."),
    "DDP compiled": prefixed("_orig_mod.module."),
    "Lightning's model": prefixed("model."),
    "Lightning's net": prefixed("net."),
    "any name": prefixed("my_backbone.inner."),
    "Lightning": lightning,
    "within": inside,
    "state_dict": lambda state: {"state_dict": prefixed("module.")(state), "epoch": 1},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
    "net": lambda state: {"net": state, "acc": 91.0},
    "ema": lambda state: {"ema": {"module": prefixed("module.")(state)}, "updates": 4},
    "nested": lambda state: {"model": {"state_dict": prefixed("module.model.")(state)}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_come_off(kind: str, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrapped.pth"
    torch.save(WRAPPED[kind](state), file)
    model = build("squeezenet1_1", 7, weights=str(file)).model.state_dict()
    for key, value in model.items():
        assert key.startswith("classifier.1.") or torch.equal(value, state[key])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 2 and all("wrapped.pth" in line for line in lines) and (lines or kind == "state_dict")
    whole, classes = load_foreign(file, "squeezenet1_1")
    assert classes == 1000 and all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


def test_a_plain_file_is_not_talked_about(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state, tmp_path / "plain.pth")
    build("squeezenet1_1", 7, weights=str(tmp_path / "plain.pth"))
    assert capsys.readouterr() == ("", "")


def test_a_wrapped_file_of_another_network_stays_one(state: State, tmp_path: Path) -> None:
    torch.save(prefixed("module.")(state), tmp_path / "other.pth")
    with pytest.raises(Refused, match="does not fit resnet18"):
        build("resnet18", 7, weights=str(tmp_path / "other.pth"))
    two = prefixed("parts.0.")(state) | prefixed("parts.1.")(state)  # one of two would be half of what was trained
    torch.save(two, tmp_path / "two.pth")
    with pytest.raises(Refused, match="does not fit"):
        build("squeezenet1_1", 7, weights=str(tmp_path / "two.pth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, state: State, tmp_path: Path) -> None:
    bad = {**state, "features.0.weight": torch.full_like(state["features.0.weight"], value)}
    torch.save(bad, tmp_path / "bad.pth")
    for load in (lambda: build("squeezenet1_1", 7, weights=str(tmp_path / "bad.pth")),
                 lambda: load_foreign(tmp_path / "bad.pth", "squeezenet1_1")):  # fmt: skip
        with pytest.raises(Refused, match=r"features\.0\.weight"):
            load()


@pytest.mark.parametrize(
    "content",
    [
        {1: torch.ones(2)},
        {b"a": torch.ones(2)},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
        {"state_dict": {"a": 1}},
        {"model": {"model": {"model": {"model": {"model": {"a": torch.ones(2)}}}}}},
    ],
    ids=["number", "bytes", "complex", "sparse", "meta", "no tensor", "too deep"],
)
def test_what_is_no_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(Refused, match=r"odd\.pth"):
        read_weights(tmp_path / "odd.pth")


def test_a_file_that_unpacks_to_more_than_its_size_is_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(5_000_000)}, tmp_path / "flat.pth")
    with zipfile.ZipFile(tmp_path / "flat.pth") as flat, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for name in flat.namelist():
            bomb.writestr(name, flat.read(name), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(Refused, match="would unpack"):
        read_weights(tmp_path / "bomb.pth")
    assert len(read_weights(tmp_path / "flat.pth")["a"]) == 5_000_000


def test_a_head_of_millions_of_classes_is_not_built(state: State, tmp_path: Path) -> None:
    for bias in (torch.zeros(10**6), torch.zeros(0), torch.zeros(2, 2)):
        torch.save({**state, "classifier.1.bias": bias}, tmp_path / "wide.pth")
        with pytest.raises(Refused, match="bias"):
            load_foreign(tmp_path / "wide.pth", "squeezenet1_1")


def test_a_large_size_is_tried_without_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 px would take gigabytes and a minute."""
    model = torchvision.models.squeezenet1_1()
    hooked: list[str] = []
    model.features[0].register_forward_pre_hook(lambda _, inputs: hooked.append(inputs[0].device.type))
    check_size("squeezenet1_1", model, 4096)
    check_size("squeezenet1_1", model, 64)
    assert hooked == ["meta", "cpu"]
    assert model.training and not next(model.parameters()).is_meta


def test_batch_norms_that_see_a_single_value() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert norms_single_values(network, 4) and not norms_single_values(network, 8)
    assert not norms_single_values(nn.Sequential(nn.Conv2d(3, 4, 3)), 3)
    assert network.training and all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
