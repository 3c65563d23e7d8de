"""Predictions as text, CSV, JSON and Parquet."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from finetune101.deploy import tables
from finetune101.deploy.inputs import Inputs
from finetune101.deploy.prediction import Prediction
from finetune101.errors import Refused
from finetune101.evaluation.predictions import name_in_cell
from finetune101.standalone import csv_header

ROWS = [
    Prediction((("ball", 0.75), ("box", 0.25)), "a, b.jpg"),
    Prediction((("box", 1.0), ("ball", 0.0)), "贝.jpg"),
]
STRANGE = [Prediction((("=cmd|' /C calc'!A1", 0.5), ("猫\u202e", 0.5)), "d/\x1b[2Jphoto\udce9.jpg")]


def text(rows):
    tables.write_text(rows, out := io.StringIO())
    return out.getvalue()


def csv_rows(rows, width=2):
    tables.write_csv(rows, out := io.StringIO(), width)
    return list(csv.DictReader(io.StringIO(out.getvalue()))), out.getvalue()


def json_of(rows, inputs=None):
    tables.write_json(rows, out := io.StringIO(), inputs or Inputs())
    return json.loads(out.getvalue()), out.getvalue()


def test_text():
    lines = text(ROWS).splitlines()
    assert lines == ["a, b.jpg", "   75.0 %  ball", "   25.0 %  box", "贝.jpg", "  100.0 %  box", "    0.0 %  ball"]


def test_csv():
    assert csv_rows(ROWS)[0][0] == {
        "path": "a, b.jpg",
        "class_1": "ball",
        "probability_1": "0.750000",
        "class_2": "box",
        "probability_2": "0.250000",
        "unlike": "",
        "unlike_score": "",
    }
    assert csv_rows([], 1)[1] == "path,class_1,probability_1,unlike,unlike_score\n"


def test_names_are_printed_without_control_characters_or_bytes():
    lines = text(STRANGE)
    assert "\\x1b[2Jphoto\\xe9.jpg" in lines and "猫" in lines
    assert all(line.isprintable() for line in lines.splitlines())
    (row,), table = csv_rows(STRANGE)
    assert "\x1b" not in table and table.encode("utf-8")
    assert row["class_1"].startswith("'=") and name_in_cell(row["class_1"]) == STRANGE[0].label
    assert name_in_cell(row["path"]) == STRANGE[0].source
    assert json_of(STRANGE)[0]["predictions"][0]["path"] == STRANGE[0].source


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_fits_any_console(encoding):
    assert json.loads(json_of(ROWS)[1].encode(encoding))["predictions"][1]["path"] == "贝.jpg"


def test_json():
    inputs = Inputs(failed=[("x.jpg", "no such file or folder")], left_out={"dead links": {"a": None, "b": None}})
    value, _ = json_of(ROWS, inputs)
    assert value["predictions"][1]["classes"][0] == {"class": "box", "probability": 1.0}
    assert value["failed"] == [{"path": "x.jpg", "reason": "no such file or folder"}]
    assert value["left_out"] == {"dead links": 2}
    assert json_of([])[0]["predictions"] == []


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "labels.parquet"
    tables.write_table_file(ROWS + STRANGE, file, Inputs(), 2)
    table = parquet.read_table(file)
    assert table.column("class_1").to_pylist()[:2] == ["ball", "box"]
    assert table.column("probability_2").to_pylist() == [0.25, 0.0, 0.5]
    kinds = ["string", "string", "double", "string", "double", "bool", "double"]
    assert [str(kind) for kind in table.schema.types] == kinds


def test_every_table_has_the_same_columns():
    assert [column.name for column in tables.table_columns(2)] == csv_header(2)
    named = [column.name for column in tables.COLUMNS]
    assert csv_header(2)[-len(named) :] == named and set(named) < json_of(ROWS)[0]["predictions"][0].keys()


def test_an_image_without_labels_has_empty_cells():
    (row,), _ = csv_rows([Prediction((), "a.jpg")])
    names = ("class_1", "probability_1", "class_2", "probability_2", "unlike", "unlike_score")
    assert row == {"path": "a.jpg", **dict.fromkeys(names, "")}


@pytest.mark.parametrize("name", ["labels.csv", "labels.json", "labels.parquet"])
def test_a_table_that_fails_leaves_the_old_one(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_text("old")

    def failing():
        yield ROWS[0]
        raise Refused("the network is not finite")

    with pytest.raises(Refused, match="not finite"):
        tables.write_table_file(failing(), file, Inputs(), 2)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_parquet_without_pyarrow_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Refused, match="pip install"):
        tables.check_table_file(Path("labels.parquet"), overwrite=False)


def test_a_table_is_a_new_file_of_a_known_ending(tmp_path):
    for name in ("labels.txt", "labels", ".csv"):
        with pytest.raises(Refused, match="ends in"):
            tables.check_table_file(tmp_path / name, overwrite=False)
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(Refused, match="folder"):
        tables.check_table_file(tmp_path / "x.csv", overwrite=True)
    tables.check_table_file(tmp_path / "LABELS.CSV", overwrite=False)


def test_images_without_a_file_have_no_path():
    assert csv_rows([Prediction((("ball", 1.0),), Image.new("RGB", (2, 2)))], 1)[0][0]["path"] == ""
