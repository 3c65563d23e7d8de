"""Finding, listing and hashing images."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune101.data import images
from finetune101.data.images import (
    FOLDER,
    OFFICIAL_CLASSES,
    OFFICIAL_IMAGES,
    _read_digests,
    class_of,
    content_hash,
    find_data,
    index_images,
    layout_of,
)
from finetune101.files import sha256


def make(root: Path, *files: str) -> Path:
    """Files whose content is their own path: indexing looks at names and bytes only."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(os.fsencode(file))
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINETUNE101_DATA", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["data", f"data/{FOLDER}"])
def test_find_takes_the_class_folder_or_its_parent(here: Path, name: str) -> None:
    make(here / "data" / FOLDER, "ant/1.jpg", "bee/1.jpg")
    make(here / "data" / "other", "x.txt")
    assert find_data(name) == Path("data") / FOLDER


def test_find_takes_a_parent_of_one_class_folder(here: Path) -> None:
    make(here, "pets/all/cat/1.png", "pets/all/dog/1.png", "pets/.hidden/1.png")
    assert find_data("pets") == Path("pets/all")
    assert find_data("pets/all") == Path("pets/all")


def test_find_order_is_flag_then_environment_then_default(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(here, f"data/{FOLDER}/ant/1.jpg", "env/ant/1.jpg", "env/bee/1.jpg", "flag/ant/1.jpg", "flag/bee/1.jpg")
    assert find_data(None) == Path("data") / FOLDER
    monkeypatch.setenv("FINETUNE101_DATA", "env")
    assert find_data(None) == Path("env")
    assert find_data("flag") == Path("flag")
    monkeypatch.setenv("FINETUNE101_DATA", "")
    assert find_data(None) == Path("data") / FOLDER


def test_find_takes_a_folder_of_subsets(here: Path) -> None:
    make(here, "pets/train/cat/1.png", "pets/train/dog/1.png", "pets/test/cat/2.png")
    make(here, "lone/train/cat/1.png", "lone/train/dog/1.png")
    assert find_data("pets") == Path("pets")
    assert layout_of(Path("pets")) == "folders"
    assert find_data("lone") == Path("lone/train")


def test_a_class_named_train_is_a_class(here: Path) -> None:
    make(here, "toys/train/1.png", "toys/test/1.png")
    assert find_data("toys") == Path("toys")
    assert layout_of(Path("toys")) == "classes"
    assert index_images(Path("toys")).classes == ("test", "train")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "--data missing does not exist; give --data a folder"),
        ("data", "run `finetune101 data download`, or give --data"),
        ("gone/pets", "--data gone/pets does not exist; give --data"),
        ("pet", r"--data pet does not exist; did you mean pets\?"),
        ("pets/cat/1.jpg", "is a file"),
        ("pets/cat", "its parent folder"),
        ("empty", "no class folders"),
        ("deep", "no class folders"),
        (None, "finetune101 data download"),
    ],
)
def test_find_says_what_to_do(here: Path, name: str | None, says: str) -> None:
    make(here, "pets/cat/1.jpg", "pets/dog/1.jpg", "deep/a/b/c/1.jpg", "deep/d/e/1.txt")
    (here / "empty").mkdir()
    with pytest.raises(ValueError, match=says) as caught:
        find_data(name)
    assert "\n" not in str(caught.value)


def test_find_names_the_environment_variable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE101_DATA", "gone")
    with pytest.raises(ValueError, match="FINETUNE101_DATA gone does not exist"):
        find_data(None)


def test_index_lists_images_only_and_sorts_by_code_point(tmp_path: Path) -> None:
    make(
        tmp_path,
        *("b/2.JPG", "b/1.jpeg", "b/10.png", "B/x.WebP", "B_c/y.bmp"),
        *(
            "b/notes.txt",
            "b/.hidden.jpg",
            ".git/1.jpg",
            "BACKGROUND_Google/1.jpg",
            "BACKGROUND_Google/tmp",
            "stray.jpg",
        ),
    )
    (tmp_path / "b" / "folder.jpg").mkdir()
    index = index_images(tmp_path)
    assert index.classes == ("B", "B_c", "b")
    assert index.paths == ("B/x.WebP", "B_c/y.bmp", "b/1.jpeg", "b/10.png", "b/2.JPG")
    assert index.digests["b/2.JPG"] == hashlib.sha256(b"b/2.JPG").hexdigest()
    assert {class_of(path) for path in index.paths} == set(index.classes)
    assert sorted(path for paths in index.left_out.values() for path in paths) == ["b/notes.txt", "stray.jpg"]


def test_index_does_not_depend_on_the_order_files_were_made(tmp_path: Path) -> None:
    files = [f"{name}/{i}.jpg" for name in "abc" for i in range(9)]
    first, second = make(tmp_path / "1", *files), make(tmp_path / "2", *reversed(files))
    assert index_images(first).paths == index_images(second).paths
    assert index_images(first).digests == index_images(second).digests


@pytest.mark.parametrize(
    ("files", "says"),
    [(["cat/1.jpg"], "at least 2"), (["cat/1.jpg", "dog/readme.txt"], r"class folder .*dog holds no image")],
)
def test_index_refuses(tmp_path: Path, files: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        index_images(make(tmp_path, *files))


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs file modes")
def test_index_names_a_file_it_may_not_read(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "b/1.jpg").chmod(0)
    with pytest.raises(ValueError, match=r"b/1\.jpg cannot be read"):
        index_images(tmp_path)


def test_digests_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "KEPT_FROM", (1, 0))
    monkeypatch.setattr(images, "FRESH", 0)
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    hashed: list[str] = []
    monkeypatch.setattr(images, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    data = make(tmp_path / "data", "a/1.jpg", "a/2.jpg", "b/caf\udce9.jpg")

    def newly(**how: bool) -> list[str]:
        hashed.clear()
        assert index_images(data, **how).digests == {path: sha256(data / path) for path in index_images(data).paths}
        return sorted(hashed)

    time.sleep(0.02)  # the clock of files ticks every few ms
    assert len(newly()) >= 3
    assert newly() == []
    kept = (data / "a/1.jpg").stat()
    (data / "a/1.jpg").write_text("A/1.JPG")  # as long as before, and with its old time
    os.utime(data / "a/1.jpg", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert "1.jpg" in newly() and "2.jpg" not in hashed
    assert len(newly(fresh=True)) >= 3
    (file,) = (tmp_path / "cache").iterdir()
    for damaged in (b"", b"\x81", file.read_bytes()[:-5], b"\x81\xa1a\x01"):
        file.write_bytes(damaged)
        assert len(newly()) >= 3
    (data / "a/1.jpg").unlink()
    assert "a/1.jpg" not in index_images(data).digests


def test_a_file_that_changed_just_now_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one tick of the clock it may change without another time."""
    monkeypatch.setattr(images, "KEPT_FROM", (1, 0))
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    data = make(tmp_path / "data", "a/1.jpg", "b/1.jpg")
    index_images(data)
    (file,) = (tmp_path / "cache").iterdir()
    assert _read_digests(file) == {}


def test_content_hash_depends_on_names_and_bytes_not_on_order() -> None:
    digests = {"a/1": "x", "a/2": "y", "b/1": "z"}
    total = content_hash(digests, ["a/1", "a/2"])
    assert total.startswith("sha256:")
    assert total == content_hash(digests, ["a/2", "a/1"])
    assert total != content_hash(digests, ["a/1", "b/1"])
    assert total != content_hash({**digests, "a/2": "changed"}, ["a/1", "a/2"])


def test_import_is_light() -> None:
    code = "import finetune101.data.images, sys; print(sorted({'torch', 'scipy', 'tqdm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.caltech101
def test_real_caltech101_has_the_official_counts(caltech101: Path) -> None:
    assert find_data(str(caltech101.parent)).samefile(find_data(str(caltech101)))
    index = index_images(find_data(str(caltech101)))
    assert (len(index.classes), len(index.paths)) == (OFFICIAL_CLASSES, OFFICIAL_IMAGES)
    assert "BACKGROUND_Google" not in index.classes
