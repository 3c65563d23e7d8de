"""The space of a search: every setting by its flag's name, in its type; mistakes are one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune101.config import ModelConfig, OptimConfig, TrainConfig, change
from finetune101.errors import Refused
from finetune101.experiments.search_plan import Plan, check_plan
from finetune101.experiments.space import ORIGINAL, Range, check_space, make_space, parse_space, point_label, points
from search import hyper_param_opts


def test_words_become_values_of_the_settings_types() -> None:
    words = ["lr=1e-2,1e-3", "batch-size=64,128", "nesterov=true,false", "backbone_lr_ratio=none,0.1", "model=alexnet"]
    found = parse_space(words)
    assert found == {
        "lr": [0.01, 0.001],
        "batch_size": [64, 128],
        "nesterov": [True, False],
        "backbone_lr_ratio": [None, 0.1],
        "model": ["alexnet"],
    }
    assert all(type(value) is int for value in found["batch_size"])  # type: ignore[union-attr]


def test_ranges() -> None:
    assert parse_space(["lr=1e-4..1e-1:log", "epochs=2..10"]) == {"lr": Range(1e-4, 0.1, True), "epochs": Range(2, 10)}


def test_without_words_it_is_the_originals() -> None:
    assert parse_space([]) == ORIGINAL == hyper_param_opts
    assert len(points(parse_space([]))) == 72


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("space.yaml", "lr: [1e-2, 0.001]\nweight_decay: 1e-6..1e-2:log\n"),
        ("space.toml", 'lr = [1e-2, 0.001]\nweight_decay = "1e-6..1e-2:log"\n'),
    ],
)
def test_files(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert parse_space([], str(tmp_path / name)) == {"lr": [0.01, 0.001], "weight_decay": Range(1e-6, 0.01, True)}
    assert parse_space(["lr=0.5"], str(tmp_path / name))["lr"] == [0.5]  # the command line has the last word


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rate=1"], "learning_rate is not a setting to search; choose from .*lr"),
        (["threads=1,2"], "threads is not a setting to search"),
        (["lr="], "lr has no values to search; give at least one"),
        (["lr"], "--grid lr names no values; write it as"),
        (["lr=a"], "lr is 'a'"),
        (["batch_size=1.5"], "batch_size is '1.5'"),
        (["nesterov=2"], "nesterov is '2'"),
        (["schedule=x"], "step, cosine"),
        (["lr=0..1:log"], "is no range; write LOW..HIGH"),
        (["lr=1..0"], "is no range"),
        (["lr=1..nan"], "is no range"),
        (["lr=1..2:cube"], "is no range"),
        ([f"lr={'x' * 10**5}..1"], r"lr=x{1,300}(\.\.\.|…).{1,300}$"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_space(words)


LONG = "x" * 10**5


@pytest.mark.parametrize("space", [{"lr": LONG}, {LONG: [1]}, {"model": [LONG]}, {"lr": [LONG]}])
def test_long_words_of_a_file_make_no_long_sentence(space: dict[str, Any], base: TrainConfig) -> None:
    with pytest.raises(Refused) as refused:
        check_plan(Plan(base=base, space=make_space(space)))
    assert 20 < len(str(refused.value)) < 1200


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.yaml", None, "cannot read .*none.yaml"),
        ("bad.toml", "lr = [", "is not valid TOML"),
        ("bad.yaml", "lr: [", "is not valid YAML"),
        ("list.yaml", "[1, 2]", "holds no table"),
        ("text.yaml", "lr: fast", "give a list of values"),
        ("space.ini", "lr=1", "is no file of settings"),
        ("empty.yaml", "lr: []", "lr has no values to search"),
    ],
)
def test_mistakes_in_files(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_space([], str(tmp_path / name))


def test_points_are_all_combinations_in_order_and_each_once() -> None:
    found = points(make_space({"lr": [1, 2, 1.0], "gamma": [0.5, 0.1]}))
    assert [point_label(point) for point in found] == [
        "lr=1,gamma=0.5",
        "lr=1,gamma=0.1",
        "lr=2,gamma=0.5",
        "lr=2,gamma=0.1",
    ]


def test_a_grid_of_ranges_is_refused() -> None:
    with pytest.raises(ValueError, match="is a range, a grid needs a list; or add --sampler random"):
        points(parse_space(["lr=1..2"]))


def test_a_point_changes_its_settings_only() -> None:
    base = TrainConfig(exp="s", optim=OptimConfig(epochs=2, batch_size=8))
    config = change(base, {"lr": 0.5, "model": "alexnet", "flip": False})
    assert (config.optim.lr, config.optim.batch_size, config.model.name) == (0.5, 8, "alexnet")
    assert not config.augment.flip and (config.data, config.system, config.exp) == (base.data, base.system, "s")


@pytest.mark.parametrize("grid", [{"lr": [0.1, -1]}, {"lr": "-1..1"}])
def test_a_value_that_cannot_work_is_found_before_anything_runs(grid: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lr"):
        check_space(TrainConfig(exp="s"), make_space(grid))


def test_a_name_given_twice_is_one_list() -> None:
    assert parse_space(["lr=0.01", "lr=0.02,0.01"]) == {"lr": [0.01, 0.02]}
    for words in (["lr=0.01..0.1", "lr=0.2"], ["lr=0.2", "lr=0.01..0.1"]):
        with pytest.raises(ValueError, match="--grid lr is given twice"):
            parse_space(words)


@pytest.mark.parametrize("name", ["split_seed", "fit_on", "val_size", "train_per_class", "skip_bad_images"])
def test_what_changes_the_validation_images_is_not_searched(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} changes the validation images"):
        parse_space([f"{name}=1"])


def test_augmentation_is_not_searched_on_cached_features() -> None:
    model = ModelConfig(freeze=True, cached_features=True)
    with pytest.raises(ValueError, match="crop_scale changes nothing on cached features"):
        check_space(TrainConfig(exp="x", model=model), parse_space(["crop_scale=0.5,1"]))


def test_none_is_nothing_where_a_setting_may_be_nothing_and_else_a_word() -> None:
    assert parse_space(["policy=none,trivial", "size=none,64"]) == {"policy": ["none", "trivial"], "size": [None, 64]}
