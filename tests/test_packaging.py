"""What others get: source distribution and wheel, what containers install, the Makefile's list, the citation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from bare_python import AS_FINETUNE101, environment, run
from try_wheel import MOST_MB, predict_requirements

import finetune101
from finetune101.cli.main import main

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
NOT_GIVEN = ("results/", ".ci/", ".gitignore", "finetune101.egg-info/")
"""What stays in the repository: measured results, and what only the repository uses."""


def files_of_the_repository() -> list[str]:
    """The paths of all committed files."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [path for path in listed.split("\0") if path and (ROOT / path).is_file()]


def build(what: str, tree: Path, out: Path) -> Path:
    """Builds a ``what`` (sdist or wheel) of ``tree`` as pip does."""
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the committed files."""
    folder = tmp_path_factory.mktemp("sdist")
    for path in files_of_the_repository():
        if not path.startswith("results/"):
            (folder / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / "tree" / path)
    return build("sdist", folder / "tree", folder)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built of the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", next(folder.glob("finetune101-*")), folder)


@pytest.mark.slow
def test_the_wheel_is_the_package_and_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    own = {path for path in files_of_the_repository() if path.startswith("finetune101/")}
    assert names == own
    assert wheel.stat().st_size < MOST_MB * 1e6


@pytest.mark.slow
def test_the_source_distribution_has_tests_docs_and_all_that_builds_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path for path in files_of_the_repository() if not path.startswith(NOT_GIVEN)} <= names
    assert sdist.stat().st_size < MOST_MB * 1e6


@pytest.mark.slow
def test_the_wheel_labels_a_photo_with_what_the_container_installs(
    wheel: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = environment(tmp_path / "site", *predict_requirements())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    for network in ("released_finetune", "released_random"):
        words = ["predict", network, str(tiny_data / "ball" / "image_0001.jpg"), "--json"]
        done = run(python, [tmp_path / "installed"], AS_FINETUNE101, "finetune101", *words)
        assert done.returncode == 0, done.stderr
        assert main(words) == 0
        theirs, ours = json.loads(done.stdout), json.loads(capsys.readouterr().out)
        assert theirs == ours


def test_what_the_container_installs_has_an_exact_version() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").lower()
    assert [name for name in predict_requirements() if not re.search(rf"^{name}==", lock, re.M)] == []
    assert "torch" not in predict_requirements()


def test_the_devcontainer_is_a_target_of_the_dockerfile() -> None:
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    place = ROOT / ".devcontainer" / settings["build"]["dockerfile"]
    targets = re.findall(r"^FROM \S+ AS (\w+)$", place.read_text(encoding="utf-8"), re.M)
    assert settings["build"]["target"] in targets and {"train", "predict"} <= {*targets}


def test_the_hooks_run_the_same_checks_as_make_lint() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = [hook["entry"] for repository in repositories for hook in repository["hooks"]]
    assert {one["repo"] for one in repositories} == {"local"}  # nothing is fetched
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert lint
    for command in lint[1].splitlines():
        words = command.partition("$(PYTHON) -m ")[2]
        assert words and any(hook.startswith(f".venv/bin/python -m {words}") for hook in hooks), command


@pytest.mark.skipif(not shutil.which("make") or not shutil.which("awk"), reason="needs make and awk")
def test_make_help_lists_every_target() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    listed = subprocess.run(["make", "-s"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert targets and re.findall(r"^make (\w+) +\S", listed, re.M) == sorted(targets[1].split(), key=listed.find)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the schema of 1.2.0 requires
    assert citation["version"] == finetune101.__version__ and citation["license"] == "MIT"


def test_contributing_has_a_line_for_every_dependency_with_its_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra != "dev"]
    names = [re.split("[<>=!]", line)[0] for lines in (project["dependencies"], *extras) for line in lines]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").lower().replace("_", "-")
    rows = re.findall(r"^\|.*\|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    for name in names:
        version = re.search(rf"^{re.escape(name)}==(\S+)", lock, re.M)
        row = next((row for row in rows if re.search(rf"\b{re.escape(name)}\b", row.split("|")[1])), "")
        assert version and version[1] in row, (
            f"CONTRIBUTING.md: {name} needs a line with its version in requirements.lock"
        )


def test_the_package_is_found_beside_a_folder_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "finetune101" / "docs").mkdir(parents=True)  # as where the repository was cloned
    code = "import finetune101; print(finetune101.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == finetune101.__version__, done.stderr
