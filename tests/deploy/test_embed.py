"""The table of features: the rows of ``predict``, with what the output layer sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune101 import load
from finetune101.cli.main import main


def test_npz_holds_what_predict_says(runs: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    assert main(["embed", str(runs / "a"), str(tiny_data / "ball"), "--out", str(out)]) == 0
    with np.load(out) as table:  # without pickle
        paths, classes = table["paths"].tolist(), table["classes"].tolist()
        assert table["features"].shape == (12, 512) and table["features"].dtype == np.float32
        for path, row in zip(paths, table["probabilities"], strict=True):
            prediction = dict(load(runs / "a").predict(path).classes)  # type: ignore[union-attr]
            assert dict(zip(classes, row.tolist(), strict=True)) == pytest.approx(prediction, abs=1e-6)


def test_parquet_has_a_row_for_each_image(runs: Path, tiny_data: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "features.parquet"
    assert main(["embed", str(runs / "a"), str(tiny_data / "box"), "--out", str(out)]) == 0
    table = parquet.read_table(out)
    assert table.column_names == ["path", "features", "probabilities"] and table.num_rows == 12
    assert len(table["features"][0]) == 512
    assert json.loads(table.schema.metadata[b"classes"]) == ["ball", "box", "stripes"]


def test_what_cannot_be_written_is_refused_before_the_work(
    runs: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["embed", str(runs / "a"), str(tiny_data / "box"), "--out"]
    assert main([*words, str(tmp_path / "features.csv")]) == 2
    assert "neither .npz nor .parquet" in capsys.readouterr().err
    (tmp_path / "folder.npz").mkdir()
    assert main([*words, str(tmp_path / "folder.npz"), "--overwrite"]) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "features.npz").touch()
    assert main([*words, str(tmp_path / "features.npz")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main([*words, str(tmp_path / "features.parquet")]) == 2
    assert "needs pyarrow; pip install" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_named(
    runs: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    out = tmp_path / "features.npz"
    assert main(["embed", str(runs / "a"), str(bad), str(tiny_data / "box/image_0001.jpg"), "--out", str(out)]) == 1
    assert "failed: " in capsys.readouterr().err
    with np.load(out) as table:
        assert len(table["paths"]) == 1
    assert main(["embed", str(runs / "a"), str(bad), "--out", str(tmp_path / "other.npz")]) == 2
    assert not (tmp_path / "other.npz").exists()
