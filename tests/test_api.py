"""The interface from Python: what its names do, and that a mistake is one sentence."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune101 as ft
from finetune101.cli.one_run import training_settings
from finetune101.config import change
from finetune101.evaluation.predictions import read_rows
from finetune101.recipes import from_recipe
from finetune101.run import Run

ROOT = Path(__file__).parents[1]
TINY = {"epochs": 1, "batch_size": 8, "size": 64, "threads": 1}


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    runs = tmp_path_factory.mktemp("runs")
    return ft.train(tiny_data, exp="mine", recipe="finetune_fast", runs=runs, **TINY)


def test_the_interface_is_complete_and_light() -> None:
    code = (
        "import sys, finetune101 as ft; print(*(n for n in ft.__all__ if not hasattr(ft, n)), 'torch' in sys.modules)"
    )
    light = "import sys, finetune101; print('torch' in sys.modules, 'tyro' in sys.modules)"
    outputs = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True) for c in (light, code)
    ]
    assert [one.stdout.split() for one in outputs] == [["False", "False"], ["True"]]
    with pytest.raises(AttributeError, match="no attribute"):
        ft.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_report_is_the_function_whatever_was_imported() -> None:
    import finetune101.reports.pages  # noqa: F401

    assert callable(ft.report)


def test_train_evaluate_predict(trained: Run, tiny_data: Path) -> None:
    assert trained.config().recipe == "finetune_fast" and trained.config().optim.epochs == 1
    assert "mine" in repr(trained) and trained._repr_png_()[:4] == b"\x89PNG"  # type: ignore[index]
    evaluation = ft.evaluate(trained)
    assert evaluation.top1 == pytest.approx(100 * evaluation.correct / evaluation.n)
    assert "Test accuracy" in repr(evaluation)
    assert ft.evaluate(str(trained.path), subset="val").subset == "val"


def test_every_way_to_name_a_network_gives_the_answers_of_predictions_csv(trained: Run, tiny_data: Path) -> None:
    ft.evaluate(trained)
    rows = read_rows(trained.path / "predictions.csv")
    files = [tiny_data / row["path"] for row in rows]
    for name in (trained, str(trained.path), trained.path, trained.best):
        answers = ft.load(name).predict(files)
        assert isinstance(answers, list)
        assert [answer.label for answer in answers] == [row["prediction"] for row in rows]
        shares = [float(row["confidence"]) for row in rows]
        assert [answer.probability for answer in answers] == pytest.approx(shares, abs=1e-4)


def test_files_images_and_arrays_are_one(trained: Run, tiny_data: Path, tmp_path: Path) -> None:
    network = ft.load(trained)
    source = Image.open(sorted(tiny_data.rglob("*.jpg"))[0]).convert("RGB")
    upright, sideways = tmp_path / "a.png", tmp_path / "b.png"
    source.save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise
    source.transpose(Image.Transpose.ROTATE_90).save(sideways, exif=exif)
    same = network.predict([upright, str(upright), source, np.asarray(source), sideways, Image.open(sideways)])
    assert isinstance(same, list)
    assert all(one.classes == same[0].classes for one in same)
    one = network.predict(upright)
    assert not isinstance(one, list) and one.source == str(upright) and "data:image/jpeg" in one._repr_html_()
    assert dict(one.classes) == pytest.approx(dict(same[0].classes), abs=1e-3)
    grey = np.full((40, 30), 128, np.uint8)
    assert ft.predict(network, grey, top_k=1).classes[0][0] in network.classes  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "image", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8), 7, "absent.jpg"]
)
def test_what_is_no_image_is_refused(trained: Run, image: object) -> None:
    with pytest.raises(ft.Refused):
        ft.load(trained).predict(image)  # type: ignore[arg-type]


def test_compare_and_report(trained: Run, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ft.evaluate(trained)
    other = ft.train(tiny_data, exp="other", pretrain=False, recipe="scratch_fast", runs=trained.path.parent, **TINY)
    ft.evaluate(other)
    comparison = ft.compare(trained, other, out=tmp_path / "comparison")
    assert comparison.difference == pytest.approx(ft.evaluate(trained).top1 - ft.evaluate(other).top1)
    assert repr(comparison) in capsys.readouterr().out and comparison._repr_png_()[:4] == b"\x89PNG"
    assert ft.report(tmp_path / "comparison", tmp_path / "page").read_text(encoding="utf-8").startswith("<!doctype")
    assert ft.report(trained, tmp_path / "one", gallery=False).is_file()


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"epochz": 1}, "epochs"), ({"lr": "fast"}, "lr"), ({"epochs": -1}, "epochs"), ({"recipe": "x"}, "recipe")],
)
def test_a_mistake_is_refused_before_anything_is_written(
    settings: dict[str, object], word: str, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ft.Refused, match=word):
        ft.train(tiny_data, exp="x", runs=tmp_path, **settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_renamed_run_is_resumed_as_itself(trained: Run, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "renamed")
    run = ft.train(exp="renamed", resume=True, runs=tmp_path)
    assert run.path == tmp_path / "renamed" and run.metrics() == trained.metrics()
    for extra in ({"recipe": "probe"}, {"pretrain": True}):
        with pytest.raises(ft.Refused, match="leave"):
            ft.train(exp="renamed", resume=True, runs=tmp_path, **extra)


def test_a_recipe_file_says_where_training_starts(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("model: {pretrain: false}\noptim: {lr: 0.5}\n")
    assert [from_recipe(str(file), "x", pretrain=p).model.pretrain for p in (None, False, True)] == [False, False, True]
    for words in (["--recipe", str(file)], ["--config", str(file)]):
        assert training_settings(["--exp", "x", *words]).model.pretrain is False
        assert training_settings(["--exp", "x", "--pretrain", *words]).model.pretrain is True
    assert training_settings(["--exp", "x", "--no-pretrain", "--device", "cpu"]).recipe == "scratch_fast"


def test_a_report_is_of_the_run_that_was_given(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name below runs/ comes first only where a name was given."""
    ft.evaluate(trained)
    shutil.copytree(trained.path, tmp_path / "mine")
    shutil.copytree(trained.path, tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "mine" / "predictions.csv").write_text("damaged")
    monkeypatch.chdir(tmp_path)
    assert ft.report(Run(Path("mine")), gallery=False).is_file()


def test_numbers_of_numpy_and_paths_are_settings(tmp_path: Path) -> None:
    values = {"lr": np.float64(0.1), "train_sizes": np.array([64, 96]), "teacher": [tmp_path], "data": tmp_path}
    config = change(from_recipe("original", "x"), values)
    assert (config.optim.lr, config.augment.train_sizes, config.optim.teacher) == (0.1, (64, 96), (str(tmp_path),))


def test_a_damaged_or_closed_pillow_image_is_refused(trained: Run, tiny_data: Path, tmp_path: Path) -> None:
    data = sorted(tiny_data.rglob("*.jpg"))[0].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    closed = Image.open(sorted(tiny_data.rglob("*.jpg"))[0])
    closed.close()
    with Image.open(tmp_path / "cut.jpg") as damaged:
        for image in (damaged, closed):
            with pytest.raises(ft.Refused):
                ft.load(trained).predict(image)


def test_a_taken_name_and_a_missing_one(trained: Run, tiny_data: Path) -> None:
    runs = trained.path.parent
    with pytest.raises(ft.Refused, match="overwrite"):
        ft.train(tiny_data, exp="mine", runs=runs, **TINY)
    with pytest.raises(ft.Refused):
        ft.load("no such run", runs=str(runs))


@pytest.mark.parametrize(
    "call",
    [
        lambda run: ft.evaluate(run, subset="tset"), lambda run: ft.evaluate(7), lambda run: ft.load(None),
        lambda run: ft.report(ft), lambda run: ft.train(exp="x", recipe=3),
        lambda run: ft.train(exp="x", pretrain="perhaps"),
        lambda run: ft.train(exp="x", resume=True, overwrite=True), lambda run: ft.load(run).predict(None),
        lambda run: ft.load(run).predict(np.zeros((9, 9), np.uint8), top_k=1.5),
        lambda run: ft.load(run).predict(b"bytes"),
        lambda run: ft.load(run).predict(np.zeros((9, 9), np.uint8), top_k=0),
        lambda run: ft.evaluate(run, mirror="perhaps"), lambda run: ft.evaluate(run, batch_size="8"),
        lambda run: ft.report(run, gallery="perhaps"), lambda run: ft.compare(run), lambda run: ft.compare(run, 3),
        lambda run: ft.evaluate("released_finetune", subset="val"),
    ],
)  # fmt: skip
def test_odd_arguments_are_refused(call: Callable[[Run], object], trained: Run) -> None:
    with pytest.raises(ft.Refused):
        call(trained)


def test_switches_and_numbers_may_be_written_as_people_write_them(tiny_data: Path, tmp_path: Path) -> None:
    run = ft.train(
        tiny_data, exp="x", runs=tmp_path, pretrain="no", recipe="scratch_fast", **{**TINY, "epochs": np.int64(1)}
    )  # type: ignore[arg-type]
    assert run.config().model.pretrain is False and run.config().optim.epochs == 1


def test_a_run_finds_its_images_where_they_were(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE101_DATA", str(tiny_data))
    run = ft.train(exp="x", recipe="finetune_fast", **TINY)
    monkeypatch.delenv("FINETUNE101_DATA")
    assert run.config().data.root is None and ft.evaluate(run).n == ft.evaluate(run, data=tiny_data).n


@pytest.mark.slow
@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readmes_example_in_a_notebook(readme: str, tiny_data: Path, tmp_path: Path) -> None:
    """Each statement is a cell; its last value is displayed as the kernel that people use displays it."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    (example,) = re.findall(r"```python\n(import finetune101 as ft.*?)```", Path(ROOT, readme).read_text("utf-8"), re.S)
    (tmp_path / "photos").symlink_to(tiny_data)
    shutil.copy(sorted(tiny_data.rglob("*.jpg"))[0], tmp_path / "photo.jpg")
    small = example.replace('exp="mine"', 'exp="mine", epochs=1, size=64, threads=1')
    assert small != example and "`ft.compare(run, other).difference`" in Path(ROOT, readme).read_text("utf-8")
    other = 'other = ft.train("photos", exp="other", pretrain=False, epochs=1, size=64, threads=1)'
    cells = [*(ast.unparse(statement) for statement in ast.parse(small).body), "run"]
    cells += [other, "ft.evaluate(other)", "ft.compare(run, other).difference", "ft.compare(run, other)"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {
        cell.source: {k: v for out in cell.outputs for k, v in out.get("data", {}).items()} for cell in book.cells
    }
    assert 0 <= float(outputs["ft.evaluate(run).top1"]["text/plain"]) <= 100
    assert -100 <= float(outputs["ft.compare(run, other).difference"]["text/plain"]) <= 100
    assert "text/html" in outputs["net.predict('photo.jpg')"]
    assert all("image/png" in outputs[cell] for cell in ("run", "ft.compare(run, other)"))
