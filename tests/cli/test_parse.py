"""Flags become arguments, and a wrong value one sentence."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune101.cli.help import flags_with_help
from finetune101.cli.main import VERBS
from finetune101.cli.one_run import predict, training_settings
from finetune101.cli.parse import parse
from finetune101.errors import Refused


def verb_of(home: str) -> Callable[..., int]:
    module, _, function = home.partition(":")
    verb: Callable[..., int] = getattr(importlib.import_module(f"finetune101.cli.{module}"), function)
    return verb


NUMBERS = {
    flag.name.replace("_", "-"): (verb, flag.takes)
    for verb in map(verb_of, VERBS.values())
    for flag in flags_with_help(verb, {})
    if flag.takes.split()[0:1] in (["N"], ["X"])
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_says_what_it_does(verb: str) -> None:
    assert [flag.name for flag in flags_with_help(verb_of(VERBS[verb]), {}) if not flag.about] == []


def test_every_number_that_is_none_is_one_plain_sentence() -> None:
    assert {"trials", "size", "backbone-lr-ratio", "top-k", "lr", "train-per-class"} <= NUMBERS.keys()
    for flag, (verb, takes) in NUMBERS.items():
        has_exp = "exp" in {one.name for one in flags_with_help(verb, {})}
        positional = [p for p in inspect.signature(verb).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        words = ["x"] * sum(p.default is p.empty and p.name != "config" for p in positional)
        with pytest.raises(Refused) as refused:
            parse(
                verb, [*words, *(["--exp", "x"] if has_exp else []), f"--{flag}", "q"], prog="finetune101", defaults={}
            )
        kind = "a list in which each is" if takes.endswith("...") and "list of" not in str(refused.value) else ""
        assert str(refused.value).startswith(f"--{flag} is 'q'; give {kind}"), refused.value
        assert ("whole number" if takes[0] == "N" else "a number") in str(refused.value)
        assert "None" not in str(refused.value) and "none" not in str(refused.value)


@pytest.mark.parametrize("words", [["--top-k", "3", "--top_k", "q"], ["--top-k=q"], ["--top-k", "q", "photo.jpg"]])
def test_the_value_that_counts_is_named(words: list[str]) -> None:
    with pytest.raises(Refused, match=r"^--top-k is 'q'; give a whole number; see finetune101 predict --help$"):
        parse(predict, ["x.jpg", *words], prog="finetune101 predict", defaults={})


def test_a_dash_is_a_word() -> None:
    _, named = parse(predict, ["run", "-", "--csv"], prog="finetune101 predict", defaults={})
    assert named["inputs"] == ("run", "-")


def test_settings_begin_with_what_the_flags_name(tmp_path: Path) -> None:
    usual = training_settings(["--exp", "x"])
    assert usual.recipe == "finetune" and usual.model.name == "efficientnet_lite0"
    assert training_settings(["--exp", "x", "--recipe", "probe"]).recipe == "probe"
    assert training_settings(["--exp", "x", "--no-pretrain", "--device", "cuda"]).recipe == "scratch_long"
    assert training_settings(["--exp", "x", "--model=timm:resnet10t"]).recipe == "finetune_fast"
    assert training_settings(["--exp", "x"], model="resnet18").model.name == "resnet18"
    assert training_settings(["--exp", "x", "--recipe", "finetune"], model="resnet18").model.name != "resnet18"
    with pytest.raises(Refused, match="--recipe and --config"):
        training_settings(["--exp", "x", "--recipe", "probe", "--config", str(tmp_path / "winner.yaml")])
