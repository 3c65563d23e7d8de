"""Settings survive JSON, and those that cannot work are refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from finetune101.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Preprocessing,
    SystemConfig,
    TrainConfig,
    from_dict,
    read_recipe,
    to_dict,
    validate,
)
from finetune101.errors import Refused
from finetune101.files import checked
from finetune101.recipes import named, original

PARTS: dict[str, type] = {
    "data": DataConfig, "augment": AugmentConfig, "model": ModelConfig, "optim": OptimConfig, "system": SystemConfig
}  # fmt: skip


def config(part: str = "", **values: Any) -> TrainConfig:
    return TrainConfig(exp="x", **({part: PARTS[part](**values)} if part else values))


def test_the_defaults_are_valid() -> None:
    validate(config())


@pytest.mark.parametrize("value", [config(), config("data", root="/d", split="s.json"), original("x", pretrain=False)])
def test_a_configuration_survives_json(value: TrainConfig) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(value)))) == value


def test_preprocessing_survives_json() -> None:
    value = Preprocessing(size=224, cache_size=256, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), interpolation="bicubic")
    assert checked(json.loads(json.dumps(to_dict(value))), Preprocessing, "x", remedy="") == value


@pytest.mark.parametrize("where", ["", "optim"])
def test_unknown_keys_are_refused(where: str) -> None:
    values = to_dict(config())
    (values[where] if where else values)["colour"] = 1
    with pytest.raises(ValueError, match="colour"):
        from_dict(values)


REFUSED: list[tuple[str, str, list[Any], str]] = [
    ("optim", "epochs", [0, -1], "--epochs"),
    ("optim", "batch_size", [0, -8], "--batch-size"),
    ("optim", "lr", [0.0, -0.1, math.nan, math.inf], "--lr"),
    ("optim", "backbone_lr_ratio", [-0.1, math.nan, math.inf], "--backbone-lr-ratio"),
    ("optim", "momentum", [-0.1, 1.0, math.nan], "--momentum"),
    ("optim", "weight_decay", [-1e-5, math.nan, math.inf], "--weight-decay"),
    ("optim", "step_size", [0], "--step-size"),
    ("optim", "gamma", [0.0, 1.1, math.nan], "--gamma"),
    ("optim", "warmup_epochs", [-1.0, 20.0, math.nan], "--warmup-epochs"),
    ("optim", "label_smoothing", [-0.1, 1.0, math.nan], "--label-smoothing"),
    ("augment", "crop_scale", [0.0, 1.5, math.nan], "--crop-scale"),
    ("model", "size", [0, 31], "--size"),
    ("data", "test_size", [0.0, 1.0, math.nan], "--test-size"),
    ("data", "val_size", [-0.1, 0.8, math.nan], "--val-size"),
    ("data", "train_per_class", [0], "--train-per-class"),
    ("data", "max_test_per_class", [0], "--max-test-per-class"),
    ("system", "threads", [0, -2], "--threads"),
]
CASES = [(part, name, value, flag) for part, name, values, flag in REFUSED for value in values]


@pytest.mark.parametrize(("part", "name", "value", "flag"), CASES)
def test_a_setting_that_cannot_work_is_named(part: str, name: str, value: Any, flag: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag} ") as refusal:
        validate(config(part, **{name: value}))
    assert "\n" not in str(refusal.value) and str(refusal.value)[-1] != "."


def test_nesterov_needs_momentum() -> None:
    validate(config("optim", nesterov=True))
    with pytest.raises(ValueError, match="--nesterov needs a --momentum above 0"):
        validate(config("optim", nesterov=True, momentum=0.0))


@pytest.mark.parametrize("exp", ["", ".", "..", "../x", "a/../b", "/tmp/x", "a//b", "a\\b", "C:x", "a*", "a\n", "a\0"])
def test_a_name_that_leaves_the_runs_is_refused(exp: str) -> None:
    with pytest.raises(ValueError, match="cannot name a folder"):
        validate(TrainConfig(exp=exp))


@pytest.mark.parametrize("exp", ["x", "best_finetune", "grid/lr=0.1,gamma=0.5", "a.b", "lauf ü"])
def test_a_good_name_is_taken(exp: str) -> None:
    validate(TrainConfig(exp=exp))


def test_the_backbone_rate_depends_on_the_arm() -> None:
    assert config("model", pretrain=True).backbone_lr_ratio() == 0.1
    assert config("model", pretrain=False).backbone_lr_ratio() == 1.0
    given = dataclasses.replace(config("model", pretrain=False), optim=OptimConfig(backbone_lr_ratio=0.0))
    assert given.backbone_lr_ratio() == 0.0


def test_the_original_recipe_is_that_of_its_published_weights() -> None:
    """Fine-tuned 20 epochs, step 30, gamma .1, no decay; from scratch 30 epochs, step 10, gamma .5, decay 1e-5."""
    finetune, scratch = original("x"), original("x", pretrain=False)
    for recipe, epochs, step, gamma, decay in ((finetune, 20, 30, 0.1, 0.0), (scratch, 30, 10, 0.5, 1e-5)):
        o = recipe.optim
        assert (o.epochs, o.step_size, o.gamma, o.weight_decay) == (epochs, step, gamma, decay)
        assert (o.batch_size, o.lr, o.momentum, o.schedule) == (64, 0.01, 0.9, "step")
        assert recipe.augment == AugmentConfig(flip=True, crop_scale=1.0) and recipe.data.protocol == "reference"
        validate(recipe)
    assert (finetune.model.pretrain, scratch.model.pretrain) == (True, False)


def test_an_unknown_recipe_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"there is no recipe best; choose from .*original"):
        named("best")


TYPOS: list[tuple[str, str]] = [
    ("optim.schedule", "cosin"), ("data.protocol", "standart"), ("data.fit_on", "trainval"),
    ("augment.policy", "trivail"), ("system.precision", "fp8"),
    ("system.memory_format", "channelslast"), ("data.cache", "on"),
    ("system.device", "gpu"),
    ("optim.nesterov", "maybe"), ("augment.flip", "2"), ("optim.epochs", "1.5"), ("optim.epochs", "1:30"),
    ("optim.epochs", "2001-01-01"), ("optim.epochs", "true"), ("optim.epochs", "1_000"), ("optim.lr", "x"),
    ("optim.lr", "null"), ("optim.lr", ".inf"), ("optim.lr", ".nan"), ("optim.lr", "1e400"), ("optim.lr", "[0.1]"),
    ("optim.lr", "{a: 1}"), ("optim.momentum", "1"), ("model.probe_l2", "[]"), ("model.probe_l2", "[1, a]"),
    ("model.size", "3000"), ("model.name", "3"), ("system.seed", "5000000000"), ("system.seed", "1.5"),
    ("optim.schedule", '"\\uD800"'), ("optim.lr", "0x" + "f" * 9999), ("data.root", "5"), ("optim.teacher", "[[a]]"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "text"), TYPOS)
def test_a_wrong_value_in_a_recipe_file_is_named(setting: str, text: str, tmp_path: Path) -> None:
    part, name = setting.split(".")
    (tmp_path / "r.yaml").write_text(f"{part}: {{{name}: {text}}}")
    with pytest.raises(Refused, match=r"r\.yaml ") as refusal:
        read_recipe(str(tmp_path / "r.yaml"), "x")
    said = str(refusal.value)
    assert (setting in said or "YAML" in said) and "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("data.cache", "off", "off"), ("optim.nesterov", "'no'", False), ("optim.nesterov", "yes", True),
        ("augment.flip", "'false'", False), ("augment.flip", "off", False), ("augment.flip", "No", False),
        ("optim.lr", "1e-3", 0.001), ("optim.lr", "'0.01'", 0.01), ("optim.epochs", "1e1", 10),
        ("optim.epochs", "2.0", 2),
        ("model.probe_l2", "0.1", (0.1,)), ("augment.train_sizes", "[32, 64]", (32, 64)), ("model.size", "null", None),
        ("optim.teacher", "runs/a", ("runs/a",)), ("augment.policy", "none", "none"),
    ],
)  # fmt: skip
def test_a_value_of_a_recipe_file_has_the_type_of_its_setting(
    setting: str, text: str, value: Any, tmp_path: Path
) -> None:
    part, name = setting.split(".")
    (tmp_path / "r.yaml").write_text(f"format: 1\n{part}:\n  {name}: {text}\n")
    made = getattr(getattr(read_recipe(str(tmp_path / "r.yaml"), "x"), part), name)
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimm: {lr: 1}", r"optim\?"), ("optim: {lrr: 1}", r"optim\.lr\?"), ("lr: 1", r"optim\.lr"),
        ("model: {model: x}", r"model\.name"), ("data: {data: x}", r"data\.root"),
        ("optim: {policy: x}", r"augment\.policy"),
        ("optim: 3", "optim = 3"), ("format: 2", "newer version"), ("optim: {lr: 1, lr: 2}", "twice"),
        ("optim: {epochs: 3, <<: {lr: 1}}", "<<"), ("exp: x", "exp"),
    ],
)  # fmt: skip
def test_a_name_that_is_no_setting_gets_a_hint(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(Refused, match=rf"r\.yaml .*{said}"):
        read_recipe(str(tmp_path / "r.yaml"), "x")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("optim.epochs", "3"),
        ("optim.schedule", "cosin"),
        ("data", None),
        ("optim.lr", None),
        ("augment.train_sizes", [1]),
    ],
)
def test_a_wrong_value_in_config_json_is_named(place: str, value: Any) -> None:
    values = json.loads(json.dumps(to_dict(config())))
    part, _, name = place.partition(".")
    if name:
        values[part][name] = value
    else:
        values[part] = value
    with pytest.raises(Refused, match=rf"config\.json has {place}"):
        from_dict(values)


@pytest.mark.parametrize(
    ("name", "value"), [("std", [0, 1, 1]), ("mean", [1, 1]), ("size", 20_000), ("mean", [1e9] * 3)]
)
def test_preprocessing_has_bounds(name: str, value: Any) -> None:
    good = {"size": 64, "cache_size": 64, "mean": [0.5] * 3, "std": [1.0] * 3, "interpolation": "bicubic"}
    assert checked(good, Preprocessing, "x", remedy="").size == 64
    with pytest.raises(Refused, match=name):
        checked({**good, name: value}, Preprocessing, "x", remedy="")
