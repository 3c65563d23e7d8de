"""The four original commands, as a user types them, on small real images."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from finetune101 import original
from finetune101.errors import Refused

ROOT = Path(__file__).parents[1]
SPACE = {"batch_size": [8], "lr": [0.01, 0.001]}


@pytest.fixture
def here(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; the data set is found through the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE101_DATA", str(tiny_data))
    monkeypatch.delenv("FINETUNE101_WEIGHTS", raising=False)
    return tmp_path


def weights(name: str, folder: Path) -> str:
    """A state dict of a seeded torchvision network: stands in for ImageNet weights that need a download."""
    torch.manual_seed(1)
    file = folder / f"{name}.pth"
    torch.save(torchvision.models.get_model(name).state_dict(), file)
    return str(file)


ORIGINAL = "--exp best --epochs 1 --batch_size 8 --lr 0.01 --step_size 10 --gamma 0.5 --weight_decay 1e-5"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("resnet18", "32"), ("alexnet", "64")])
def test_fine_tuning_then_test(here: Path, model: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = weights(model, here)
    assert original.train([*ORIGINAL.split(), "--model", model, "--weights", file, "--size", size]) == 0
    state = torch.load("best_best.pth", weights_only=True)
    torchvision.models.get_model(model, num_classes=3).load_state_dict(state)
    with Image.open("training_plots_finetune/best.png") as picture:
        assert picture.width > 300
    assert list(Path("runs/best").glob("events.out.tfevents.*"))
    capsys.readouterr()
    assert original.test(["--exp", "best", "--batch_size", "--64"]) == 0
    said = capsys.readouterr().out
    assert "note: read --batch_size --64 as --batch_size 64" in said
    result = json.loads(Path("runs/best/test.json").read_text())
    assert f"Test loss: {result['loss']:.4f}" in said
    assert f"Test accuracy: {result['top1']:.2f} %" in said


@pytest.mark.slow
def test_the_commands_of_the_readme(
    here: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, one after the other, in one epoch of small images; the grid is only planned."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python (\w+\.py) (.*)", text, re.MULTILINE)
    assert [script for script, _ in commands] == ["train.py", "train.py", "search.py", "test.py"] * 2
    short = ["--model", "efficientnet_lite0", "--size", "64", "--threads", "1", "--epochs", "1", "--batch_size", "8"]
    cut = "|".join(short[::2])
    for script, words in commands:
        words = re.sub(rf"({cut}) \S+", "", words)
        line = words.replace("--train-per-class 12", "--train-per-class 6").split()
        line += {"train.py": short, "search.py": [*short, "--dry-run"]}.get(script, [])
        monkeypatch.setattr("sys.argv", [script, *line])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert end.value.code == 0, f"{script} {words}: {capsys.readouterr().err}"
    said = capsys.readouterr().out
    assert "72 trials" in said and "Test accuracy:" in said
    for file in ("best_finetune_best.pth", "training_plots_random/best_random.png", "runs/best_finetune/test.json"):
        assert Path(file).is_file(), file
    (folder,) = re.findall(r"^tensorboard --logdir (\S+)", text, re.MULTILINE)
    assert len({file.parent for file in Path(folder).rglob("events.out.tfevents.*")}) == 4


def test_from_scratch_uses_the_other_folder(here: Path) -> None:
    assert (
        original.train(["--exp", "random", "--no-pretrain", "--epochs", "1", "--batch_size", "8", "--size", "32"]) == 0
    )
    assert Path("training_plots_random/random.png").is_file()
    assert not Path("training_plots_finetune").exists()


def test_missing_weights_name_the_ways(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(here / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: the download fails at once
    assert original.train(ORIGINAL.split()) == 2
    said = capsys.readouterr().err
    assert "--weights" in said and "FINETUNE101_WEIGHTS" in said and "--model efficientnet_lite0" in said
    assert not Path("runs/best").exists()


def test_a_foreign_state_dict_needs_no_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), "foreign_best.pth")
    assert original.test(["--exp", "foreign"]) == 0
    assert "Test accuracy:" in capsys.readouterr().out
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), "five_best.pth")
    assert original.test(["--exp", "five"]) == 2
    assert "knows 5 classes, the data set has 3" in capsys.readouterr().err


def test_another_foreign_network_is_named_by_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), "theirs_best.pth")
    assert original.test(["--exp", "theirs", "--model", "squeezenet1_1"]) == 0
    assert "Test accuracy:" in capsys.readouterr().out
    assert original.test(["--exp", "theirs"]) == 2
    assert "does not fit resnet18" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--exp", "none"], "none_best.pth"),
        (["--exp", "none", "--batch_size", "0"], "--batch_size"),
    ],
)
def test_mistakes_of_test_py(here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert original.test(words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1


def test_the_grid_is_saved_and_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--exp", "grid", "--epochs", "1", "--no-pretrain", "--size", "32"]
    assert original.search({**SPACE, "lr": [0.01]}, flags) == 0
    first = json.loads(Path("gridsearch_results_grid.json").read_text())
    trained = {file: file.stat().st_mtime_ns for file in Path("runs/grid").glob("*/metrics.jsonl")}
    assert original.search(SPACE, flags) == 0
    both = json.loads(Path("gridsearch_results_grid.json").read_text())
    assert sorted(point["lr"] for point, _ in both) == [0.001, 0.01] and first[0] in both
    assert len(trained) == 1 and all(file.stat().st_mtime_ns == time for file, time in trained.items())
    scores = [score for _, score in both]
    assert scores == sorted(scores, reverse=True)
    assert len(list(Path("training_plots_random").glob("grid_*.png"))) == 2


def test_get_dataloaders(here: Path, tiny_data: Path) -> None:
    from utils import get_dataloaders

    (here / "data").mkdir()
    (here / "data" / "101_ObjectCategories").symlink_to(tiny_data)
    loaders = get_dataloaders(batch_size=4)  # root_path is ./data
    assert [len(loader.dataset) for loader in loaders] == [21, 6, 9]  # type: ignore[arg-type]
    for loader in loaders:
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 224, 224) and images.dtype == torch.float32
        assert labels.shape == (4,) and labels.dtype == torch.int64
        assert -2.2 < images.min() < 0 < images.max() < 2.7  # standardised


def test_get_dataloaders_without_data_says_what_to_do(here: Path) -> None:
    from utils import get_dataloaders

    with pytest.raises(Refused, match="data download"):
        get_dataloaders()
