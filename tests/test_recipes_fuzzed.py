"""Recipe files of any text, and of any values: a configuration within its bounds, or one sentence of refusal."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune101.config import SETTINGS, TrainConfig, check_bounds, from_dict, to_dict
from finetune101.errors import Refused
from finetune101.recipes import from_recipe

EXAMPLES = int(os.environ.get("FINETUNE101_EXAMPLES", "150"))  # another number for a longer or a shorter search
fuzzed = settings(derandomize=True, deadline=None, database=None, max_examples=EXAMPLES)
SUFFIXES = (".yaml", ".yml", ".toml", ".json")
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=4), PLAIN, max_size=2)
NAMES = st.sampled_from([(setting.part, setting.field) for setting in SETTINGS.values() if setting.part])
# what the three languages are made of, so that many texts are nearly right
PIECES = st.sampled_from(
    ["optim", "model", "data", "lr", "name", "epochs", ":", " ", "\n", "  ", "[", "]", "{", "}", "=", ",", '"', "'",
     "0.1", "1e-3", "-1", "nan", ".inf", "true", "null", "&a", "*a", "!!python/object/apply:os.system", "<<", "#", "|",
     ">", "---", "\t", "\r", "\0", "\x1b", "\ud800", "2026-01-01", "1:30", "é", "鳥", "9" * 400, "[" * 40, "?", "- "]
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are written."""
    return tmp_path_factory.mktemp("recipes")


def config_of(file: Path, content: bytes) -> TrainConfig | None:
    """The configuration in ``content``; None where it is refused, in one line that a terminal can show."""
    file.write_bytes(content)
    try:
        config = from_recipe(str(file), "mine")
    except Refused as refused:
        assert str(refused) and str(refused).isprintable()
        assert len(str(refused)) < 1000
        return None
    assert from_dict(to_dict(config)) == config and (config.exp, config.recipe) == ("mine", str(file))
    check_bounds(config)
    return config


@fuzzed
@given(st.lists(PIECES, max_size=25).map("".join), st.sampled_from(SUFFIXES))
@example("optim: {lr: 0.02}", ".yaml")
@example("[optim]\nlr = 0.02", ".toml")
@example('{"optim": {"lr": 0.02}}', ".json")
def test_any_text_is_a_recipe_or_refused(folder: Path, text: str, suffix: str) -> None:
    config_of(folder / f"any{suffix}", text.encode("utf-8", "surrogatepass"))


@fuzzed
@given(st.binary(max_size=60), st.sampled_from(SUFFIXES))
def test_any_bytes_are_a_recipe_or_refused(folder: Path, content: bytes, suffix: str) -> None:
    config_of(folder / f"bytes{suffix}", content)


@fuzzed
@given(st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_value_is_within_its_bounds_or_refused_alike_in_yaml_and_json(
    folder: Path, values: dict[tuple[str, str], Any]
) -> None:
    table: dict[str, dict[str, Any]] = {}
    for (part, name), value in values.items():
        table.setdefault(part, {})[name] = value
    texts = {".json": json.dumps(table), ".yaml": yaml.safe_dump(table, allow_unicode=True)}
    configs = [config_of(folder / f"value{suffix}", text.encode()) for suffix, text in texts.items()]
    if None not in configs:
        assert to_dict(configs[0]) | {"recipe": ""} == to_dict(configs[1]) | {"recipe": ""}


@pytest.mark.parametrize(
    ("suffix", "text"),
    [(".yaml", "optim: {lr: 0.02, nesterov: true}"), (".toml", "[optim]\nlr = 0.02\nnesterov = true\n"),
     (".json", '{"optim": {"lr": 0.02, "nesterov": true}}')],
)  # fmt: skip
def test_right_files_are_read(folder: Path, suffix: str, text: str) -> None:
    config = config_of(folder / f"right{suffix}", text.encode())
    assert config and (config.optim.lr, config.optim.nesterov) == (0.02, True)
    assert suffix != ".toml" or tomllib.loads(text)["optim"]["lr"] == config.optim.lr
