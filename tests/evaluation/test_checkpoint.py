"""What a checkpoint says of itself is checked before it is believed."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from finetune101.config import to_dict
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import described, load_file, open_file
from finetune101.files import sha256, write_json
from finetune101.models.build import build
from finetune101.models.table import lookup

CLASSES = ["ball", "box", "stripes"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return build("squeezenet1_1", len(CLASSES), pretrain=False, size=64).model.state_dict()


def metadata(**changes: Any) -> dict[str, str]:
    """What ``train`` writes, changed; None leaves a key out."""
    preprocessing = to_dict(replace(lookup("squeezenet1_1").preprocessing, size=64, cache_size=64))
    values: dict[str, Any] = {"model": "squeezenet1_1", "classes": json.dumps(CLASSES), "epoch": "3"}
    values["preprocessing"] = json.dumps({**preprocessing, **changes.pop("pixels", {})})
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"classes": None},
        {"preprocessing": None},
        {"model": "no_such_network"},
        {"model": "x" * 5000},
        {"classes": "ball"},
        {"classes": "{}"},
        {"classes": "[1, 2, 3]"},
        {"classes": "[]"},
        {"classes": json.dumps(["ball", "ball", "box"])},
        {"classes": json.dumps(["ball", "box"])},
        {"classes": json.dumps([str(i) for i in range(10**6)])},
        {"classes": "[" * 100_000},
        {"preprocessing": "[]"},
        {"pixels": {"size": 20_000}},
        {"pixels": {"size": -1}},
        {"pixels": {"cache_size": 10**6}},
        {"pixels": {"std": [0, 0, 0]}},
        {"pixels": {"mean": ["a", 0, 0]}},
        {"pixels": {"interpolation": "magic"}},
        {"epoch": "many"},
        {"temperature": "0"},
        {"temperature": "NaN"},
        {"temperature": "1e9"},
        {"part": "tail"},
        {"split": "7"},
    ],
)
def test_metadata_that_cannot_be_is_one_sentence(
    state: dict[str, torch.Tensor], tmp_path: Path, changes: dict[str, Any]
) -> None:
    file, started = tmp_path / "best.safetensors", time.perf_counter()
    save_file(state, file, metadata(**changes))
    with pytest.raises(Refused) as refused:
        load_file(file)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert time.perf_counter() - started < 20  # sizes of 20,000 pixels took minutes


def test_what_is_no_checkpoint_is_one_sentence(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    save_file(state, file)
    whole = file.read_bytes()
    for content in (whole, whole[:1000], whole[:4], b"", b"not tensors", b"\xff" * 200):
        file.write_bytes(content)
        with pytest.raises(Refused):
            open_file(file)
    with pytest.raises(Refused):
        open_file(tmp_path / "missing.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_metadata_is_right_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    values = metadata(temperature="2.5", part="head", split=json.dumps({"seed": 1, "hash": "sha256:0"}))
    key = data.draw(st.sampled_from(sorted(values)))
    text = values[key]
    at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 5))
    values[key] = text[:at] + data.draw(st.text(max_size=5)) + text[at + length :]
    try:
        info = described(values, tmp_path / "best.safetensors")
    except Refused as refused:
        assert "\n" not in str(refused)
    else:
        assert 32 <= info.preprocessing.size <= 2048 and len(set(info.classes)) == len(info.classes) > 0


def test_a_temperature_beside_the_checkpoint_counts_for_its_weights_only(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "best.safetensors"
    save_file(state, file, metadata())
    assert open_file(file).temperature is None and "holds no temperature" in open_file(file).temperature_reason
    write_json(tmp_path / "temperature.json", {"weights": sha256(file), "temperature": 1.5})
    assert open_file(file).temperature == 1.5 and open_file(file).checkpoint_hash == sha256(file)
    save_file(state, file, metadata(epoch="4"))
    assert open_file(file).temperature is None and "other weights" in open_file(file).temperature_reason
    save_file(state, file, metadata(temperature="0.5"))
    assert open_file(file).temperature == 0.5
    save_file(state, file, metadata(temperature="1", temperature_reason="9 are too few"))
    assert (open_file(file).temperature, open_file(file).temperature_reason) == (1.0, "9 are too few")
    save_file(state, file, metadata())
    (tmp_path / "temperature.json").write_text('{"weights": 1}')
    with pytest.raises(Refused):
        open_file(file)
