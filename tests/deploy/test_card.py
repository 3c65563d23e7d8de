"""Model cards of tested, untested and released networks."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from written_runs import write_run

from finetune101.cli.main import main
from finetune101.config import ModelConfig, OptimConfig, TrainConfig, to_dict
from finetune101.deploy import card as cards
from finetune101.deploy.card import card_of, card_text, changed_settings, start_of
from finetune101.deploy.released_files import available
from finetune101.errors import Refused
from finetune101.models.table import lookup
from finetune101.run import Run


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Run:
    """A trained and tested run of three classes."""
    shutil.copytree(runs / "a", tmp_path / "a")
    return Run(tmp_path / "a")


def header(text: str) -> dict[str, object]:
    data: dict[str, object] = yaml.safe_load(text.split("---\n")[1])
    return data


def test_a_hub_reads_the_header(run: Run) -> None:
    text, test = card_text(card_of(run)), run.read_json("test.json")
    card = ModelCard(text)
    assert card.data.to_dict()["library_name"] == "finetune101" and card.data.pipeline_tag == "image-classification"
    assert card.data.license and card.data.datasets == ["imagefolder"] and "accuracy" in (card.data.metrics or [])
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert results["accuracy"].metric_value == pytest.approx(test["top1"] / 100, abs=1e-4)
    assert results["balanced_accuracy"].metric_value == pytest.approx(test["mean_per_class"] / 100, abs=1e-4)
    assert results["accuracy"].dataset_split == "test"
    assert card.data.to_yaml().strip() == text.split("---\n")[1].strip()


@pytest.mark.parametrize("lang", cards.LANGUAGES)
def test_layers_that_started_at_random_are_named(run: Run, lang: str) -> None:
    card = card_of(run)
    assert card.random_layers == "" and "fire9" not in card_text(card, lang)
    assert "fire9" in card_text(dataclasses.replace(card, random_layers="fire9"), lang)


@pytest.mark.parametrize("lang", cards.LANGUAGES)
def test_every_number_is_that_of_the_run(run: Run, lang: str) -> None:
    text, test, split = card_text(card_of(run), lang), run.read_json("test.json"), run.read_json("split.json")
    unit = "%" if lang == "zh" else " %"
    for number in (
        f"{test['top1']:.2f}{unit}",
        f"{test['mean_per_class']:.2f}{unit}",
        f"{test['top1_interval'][0]:.2f}",
    ):
        assert number in text
    assert split["hash"] in text and all(f"| {name} |" in text for name in ("ball", "box", "stripes"))
    assert all(f"| {len(split['subsets'][subset])}" in text for subset in ("train", "val", "test"))
    assert "efficientnet" not in text and "squeezenet1_1" in text


def test_a_run_that_is_not_tested_says_so_and_invents_nothing(run: Run) -> None:
    for name in ("test.json", "predictions.csv"):
        (run.path / name).unlink()
    for lang in cards.LANGUAGES:
        text = card_text(card_of(run), lang)
        assert "finetune101 evaluate a" in text and "model-index" not in text and "%" not in text.split("## ")[3]
        assert "| ball |" in text
    assert "model-index" not in header(text) and "metrics" not in header(text)
    (run.best).unlink()
    with pytest.raises(Refused):
        card_of(run)


def test_counts_of_every_class_and_the_pairs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", wrong={0, 1, 2}, test=40, recipe="finetune")
    card = card_of(run)
    assert [(row.name, row.train, row.test, row.right, row.taken_for) for row in card.rows] == [
        ("ant", 3, 30, 28, "bee"), ("bee", 3, 10, 9, "ant"),
    ]  # fmt: skip
    assert card.pairs == (("ant", "bee", 2), ("bee", "ant", 1)) and card.per_class == (3, 3)
    assert [row.name for row in card.worst] == ["bee", "ant"] and card.rarely_tested == 0
    assert "93.3" in card_text(card)


def test_names_of_others_stay_names(tmp_path: Path) -> None:
    classes = ("<script>alert(1)<b>", "a | b\n# c")
    run = write_run(tmp_path / "r", wrong=set(), test=8, classes=classes)
    environment = run.read_json("env.json")
    world = {**environment["world"], "device": "<script>", "precision": "<script>\n# d"}
    run.write_json("env.json", {**environment, "world": world})
    text = card_text(card_of(run))
    assert "<script>" not in text and "<script>" not in card_text(card_of(run), "zh") and "\n# d" not in text
    assert "\n# c" not in text and "a \\| b" in text
    assert ModelCard(text).data.to_dict()["library_name"] == "finetune101"


def test_no_folder_of_the_machine_is_told(run: Run) -> None:
    environment = run.read_json("env.json")
    command = (
        "finetune101 train --exp a --data /home/alice/photos --runs=/home/alice/runs --token hf_0123456789abcdefgh"
    )
    run.write_json("env.json", {**environment, "command": command})
    for lang in cards.LANGUAGES:
        text = card_text(card_of(run), lang)
        assert "alice" not in text and str(run.path.parent) not in text and "hf_0123" not in text
        assert "--data photos --runs=runs" in text


@pytest.mark.parametrize(
    ("model", "start", "licence"),
    [
        (ModelConfig(name="resnet18"), "torchvision", "bsd-3-clause"),
        (ModelConfig(name="efficientnet_lite0"), "efficientnet-lite", "apache-2.0"),
        (ModelConfig(name="efficientnet_lite02"), "efficientnet-lite", "apache-2.0"),
        (ModelConfig(name="timm:resnet10t"), "timm", "unknown"),
        (ModelConfig(name="resnet18", weights="mine.pth"), "file", "unknown"),
        (ModelConfig(name="resnet18", pretrain=False), "random", "unknown"),
    ],
)
def test_the_licence_is_that_of_the_first_weights(
    model: ModelConfig, start: str, licence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network of somebody's own images, that person chooses it."""
    config = TrainConfig(exp="x", model=model)
    assert start_of(config, lookup(model.name)) == start
    run = write_run(tmp_path / "r", wrong={1}, test=8, name=model.name)
    run.write_json("config.json", to_dict(dataclasses.replace(config, recipe="finetune")))
    for lang in cards.LANGUAGES:
        text = card_text(card_of(run), lang)
        assert header(text)["license"] == "other" and "`license: other`" in text
    monkeypatch.setattr(cards, "OFFICIAL_CLASSES", 2)
    monkeypatch.setattr(cards, "SOME_CALTECH", {"ant", "bee"})
    assert header(card_text(card_of(run)))["license"] == licence
    assert ("imagenet" in text.lower()) == (start not in ("file", "random"))


def test_settings_that_differ_from_the_recipe_are_named() -> None:
    from finetune101.recipes import from_recipe

    config = from_recipe("finetune", "x")
    assert changed_settings(config) == ()
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=9, lr=0.5))
    assert changed_settings(other) == (("epochs", "9"), ("lr", "0.5"))
    assert changed_settings(dataclasses.replace(other, recipe="gone", optim=OptimConfig())) == ()


def test_a_network_that_marks_unlike_images_says_so(run: Run) -> None:
    (run.path / "unlike.safetensors").unlink(missing_ok=True)
    assert "unlike the training pictures" not in card_text(card_of(run))
    (run.path / "unlike.safetensors").touch()
    assert "unlike the training pictures" in card_text(card_of(run)) and "不像" in card_text(card_of(run), "zh")


def test_validation_images_that_trained_the_network_are_told(run: Run) -> None:
    settings = run.read_json("config.json")
    assert "choice of the epoch" in card_text(card_of(run))
    run.write_json("config.json", {**settings, "data": {**settings["data"], "fit_on": "train+val"}})
    assert "the weights too" in card_text(card_of(run)) and "choice of the epoch" not in card_text(card_of(run))


def test_a_network_without_temperature_has_none_in_its_table(run: Run) -> None:
    card = card_of(run)
    for temperature, reason, words in ((1.2, "", True), (None, "", False), (1.0, "none helped", False)):
        other = dataclasses.replace(card, temperature=temperature, temperature_reason=reason, val_use="epoch")
        assert ("and the temperature |" in card_text(other)) == words
        assert ("和温度 |" in card_text(other, "zh")) == words


def test_caltech_101_is_known_by_its_classes() -> None:
    run = Run(Path(__file__).parents[2] / "results/study_gain/efficientnet_lite0/finetune/all/split42_seed1")
    text = card_text(card_of(run))
    assert "CC BY 4.0" in text and header(text)["datasets"] == ["caltech101"] and "96.61 %" in text
    assert "trained on 6003 images" in text


def test_the_command(run: Run, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["card", str(run.path)]
    assert main(words) == 0 and (run.path / "card.md").is_file()
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--lang", "zh", "--overwrite"]) == 0
    assert "准确率" in (run.path / "card.md").read_text(encoding="utf-8")
    assert main([*words, "--out", "cards/mine.md"]) == 0 and (here / "cards" / "mine.md").is_file()
    assert main(["card", "nowhere"]) == 2 and main([*words, "--lang", "fr"]) == 2


@pytest.mark.parametrize("name", available())
def test_a_released_network_has_the_card_beside_its_weights(name: str, here: Path) -> None:
    assert main(["card", name]) == 0
    assert name in (here / "card.md").read_text(encoding="utf-8")
    assert main(["card", name, "--lang", "zh", "--overwrite"]) == 2
