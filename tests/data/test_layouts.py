"""Folders as people have them: recognised and told, and nothing left out without a word."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune101.cli.main import main
from finetune101.config import DataConfig, TrainConfig
from finetune101.data import splits
from finetune101.data.images import Index, as_found, class_of, find_data, index_images, index_notes, layout_of
from finetune101.data.layouts import subset_of
from finetune101.data.verify import verify
from finetune101.errors import Refused, escaped
from finetune101.training.resume import differences

TINY = [
    "--no-pretrain",
    "--model",
    "squeezenet1_1",
    "--size",
    "32",
    "--epochs",
    "1",
    "--threads",
    "1",
    "--cache",
    "off",
]


def make(root: Path, *files: str) -> Path:
    """Files whose content is their own path: listing looks at names and bytes only."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
    return root


def left_out(index: Index) -> dict[str, str]:
    """Path -> the reason for leaving it out."""
    return {path: reason for reason, paths in index.left_out.items() for path in paths}


# subsets


@pytest.mark.parametrize(
    ("name", "subset"),
    [
        *[(name, "train") for name in ("train", "Train", "TRAINING", "training_set", "train-data", "seg_train")],
        *[(name, "val") for name in ("val", "valid", "Validation", "validation_images", "ValidationSet", "dev")],
        *[(name, "test") for name in ("test", "Testing", "test set", "testset", "Test_Images")],
        *[
            (name, None)
            for name in ("trains", "contest", "test tube", "train val", "set", "valley", "101", "", "images")
        ],
    ],
)
def test_subsets_are_known_in_any_usual_spelling(name: str, subset: str | None) -> None:
    assert subset_of(name) == subset


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (("train", "valid", "test"), ["train/, valid/, test/", "4, 2 and 2 images"]),
        (("Training", "Testing"), ["Training/, Testing/", "no validation images"]),
        (("train", "validation"), ["4 and 2 images", "no test images: evaluate will use the validation images"]),
    ],
)
def test_subsets_are_recognised_and_told(tmp_path: Path, folders: tuple[str, ...], says: list[str]) -> None:
    for folder in folders:
        images = (1, 2) if subset_of(folder) == "train" else (3,)
        make(tmp_path, *(f"{folder}/{name}/{i}.jpg" for name in ("cat", "dog") for i in images))
    root = find_data(str(tmp_path))
    index = index_images(root)
    assert layout_of(root) == index.layout == "folders" and index.classes == ("cat", "dog")
    assert all(word in index_notes(index)[0] for word in says)
    manifest = splits.make_split(index, DataConfig())  # the default protocol
    assert manifest.protocol == "folders"
    assert {name for name, paths in manifest.subsets.items() if paths} == {subset_of(folder) for folder in folders}
    assert manifest.labels("train") == [0, 0, 1, 1]
    assert as_found(DataConfig(root=str(tmp_path))).protocol == "folders"
    with pytest.raises(Refused, match="leave --protocol out"):
        splits.make_split(index, DataConfig(protocol="standard"))


def test_classes_that_subsets_lack_are_told(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/2.jpg", "test/emu/1.jpg", "test/emu/2.jpg")
    make(tmp_path, "test/9.jpg", "extra/1.jpg", "train/dog/old/7.jpg", "notes/1.txt")
    index = index_images(tmp_path)
    assert index.paths == ("test/cat/2.jpg", "train/cat/1.jpg", "train/dog/1.jpg", "train/dog/old/7.jpg")
    assert set(left_out(index)) == {"test/emu/1.jpg", "test/emu/2.jpg", "test/9.jpg", "extra/1.jpg"}
    lines = "\n".join(index_notes(index))
    assert "2 images of classes that the training folder lacks (test/emu/1.jpg, test/emu/2.jpg)" in lines
    assert "test/ has no image of 1 of 2 classes (dog)" in lines
    assert all(word in verify(tmp_path).text() for word in ("test/emu/1.jpg", "test/9.jpg", "extra/1.jpg", "(dog)"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["train/cat/1.jpg", "train/dog/1.jpg", "test/1.jpg"], "--data .*train to split its images"),
        (["val/cat/1.jpg", "test/dog/1.jpg"], "none for training"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "valid/cat/1.jpg"], "val/ and valid/"),
        (["train/Cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg"], "another spelling; give both folders one name"),
        (["train/cat/1.jpg", "train/dog/1.txt", "test/cat/1.jpg"], "dog holds no image"),
        (["train/cat/1.jpg", "test/cat/1.jpg"], "at least 2"),
    ],
)
def test_subsets_that_cannot_be_used_are_refused_with_a_way_out(tmp_path: Path, files: list[str], says: str) -> None:
    make(tmp_path, *files)
    with pytest.raises(Refused, match=says) as caught:
        index_images(find_data(str(tmp_path)))
    assert "remove" not in str(caught.value)


def test_protocol_folders_needs_folders(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "dog/1.jpg")
    with pytest.raises(Refused, match="leave --protocol out"):
        index_images(tmp_path, "folders")
    with pytest.raises(Refused, match="leave --protocol out"):
        splits.make_split(index_images(tmp_path), DataConfig(protocol="folders"))


@pytest.mark.parametrize("beside", ["", "__MACOSX/1.jpg", "docs/readme.txt", "runs/a/curves.png"])
def test_a_folder_that_an_archive_added_is_looked_into(tmp_path: Path, beside: str) -> None:
    make(tmp_path, "archive/set/train/cat/1.jpg", "archive/set/train/dog/1.jpg", "archive/set/val/cat/2.jpg")
    if beside:
        make(tmp_path, beside)
    if beside.startswith("runs"):
        make(tmp_path, "runs/a/config.json", "runs/a/split.json")
    assert find_data(str(tmp_path)) == tmp_path / "archive/set"


def test_train_and_valid_train_and_are_evaluated(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --protocol: told, recorded as folders, resumed by the same command; evaluate has a way without tests."""
    for folder, numbers in (("Train", range(1, 7)), ("valid", range(7, 10))):
        for name in ("ball", "box"):
            (tmp_path / "set" / folder / name).mkdir(parents=True)
            for i in numbers:
                shutil.copy(tiny_data / name / f"image_{i:04d}.jpg", tmp_path / "set" / folder / name)
    runs = ["--runs", str(tmp_path / "runs")]
    command = ["train", "--exp", "a", "--data", str(tmp_path / "set"), *runs, *TINY]
    assert main(command) == 0
    assert "Train/, valid/ found: 12 and 6 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs/a/config.json").read_text())["data"]["protocol"] == "folders"
    assert main([*command, "--resume"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "a", *runs]) == 0
    assert "/6," in capsys.readouterr().out  # of 6 validation images
    assert not (tmp_path / "runs/a/test.json").exists()


def test_a_study_knows_a_run_whose_protocol_was_recognised() -> None:
    """The run's config.json says folders, the study's settings still the default."""
    settings = [TrainConfig(exp="a", data=DataConfig(protocol=name)) for name in ("reference", "folders", "standard")]
    assert differences(settings[1], settings[0]) == []
    assert differences(settings[2], settings[0]) == ["data.protocol"]


# what a class holds


def test_sub_folders_count_for_their_class(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "cat/siamese/old/2.jpg", "dog/poodle/1.jpg", "BACKGROUND_Google/x/1.jpg")
    index = index_images(find_data(str(tmp_path)))
    assert index.classes == ("cat", "dog")
    assert [class_of(path) for path in index.paths] == ["cat", "cat", "dog"]
    assert not index_notes(index)


def test_every_suffix_and_nothing_left_out_without_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    kinds = ["jpg", "JPEG", "jfif", "jpe", "png", "bmp", "webp", "gif", "tif", "TIFF", "avif", "mpo"]
    make(tmp_path, *(f"cat/{i}.{kind}" for i, kind in enumerate(kinds)), "dog/1.jpg", "dog/2.heic", "cat/3.HEIF")
    make(tmp_path, "cat/notes.txt", "cat/raw.cr2", "stray.png", "README.md", "labels.csv")
    for junk in (".DS_Store", "Thumbs.db", "desktop.ini", "._1.jpg", ".ipynb_checkpoints/1.jpg", "__MACOSX/1.jpg"):
        make(tmp_path, junk, f"cat/{junk}")
    (tmp_path / "cat/gone.jpg").symlink_to(tmp_path / "moved/gone.jpg")
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    (tmp_path / "cat/loop").symlink_to(tmp_path)
    (tmp_path / "emu").symlink_to(tmp_path / "moved/emu")
    (tmp_path / "cat/self.jpg").symlink_to(tmp_path / "cat/self.jpg")
    index = index_images(tmp_path)
    assert index.classes == ("cat", "dog")
    assert len(index.paths) == len(kinds) + 1
    reasons = left_out(index)
    names = ("notes.txt", "raw.cr2", "gone.jpg", "self.jpg", "pipe.jpg", "loop", "3.HEIF")
    assert set(reasons) == {*(f"cat/{name}" for name in names), "dog/2.heic", "stray.png", "emu"}
    assert "dead" in reasons["cat/gone.jpg"] and "dead" in reasons["cat/self.jpg"]
    assert "pip install" in reasons["dog/2.heic"]
    lines = "\n".join(index_notes(index))
    assert all(word in lines for word in ("3 dead links (cat/gone.jpg", "2 HEIC images", "stray.png", "cat/loop"))


def test_train_and_verify_tell_what_they_leave_out(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "photos"))
    for i in range(5):
        (data / f"ball/link{i}.jpg").symlink_to(f"../../moved/{i}.jpg")
    os.rename(os.fsencode(data / "box/image_0001.jpg"), os.fsencode(data / "box") + b"/caf\xe9\x1b.jpg")
    assert main(["data", "verify", "--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert "left out: dead links" in text and "box/caf\\xe9\\x1b.jpg" in text and "5 file(s) are left out" in text
    assert main(["train", "--exp", "a", "--data", str(data), "--runs", str(tmp_path / "runs"), *TINY]) == 0
    assert "Left out: 5 dead links (ball/link0.jpg" in capsys.readouterr().out
    split = splits.read_split(tmp_path / "runs/a/split.json")
    assert "box/caf\udce9\x1b.jpg" in {path for paths in split.subsets.values() for path in paths}


def test_heic_is_listed_where_it_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    index = index_images(make(tmp_path, "cat/1.heic", "dog/1.HEIF"))
    assert index.paths == ("cat/1.heic", "dog/1.HEIF") and not index.left_out


def test_a_class_of_nothing_usable_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    make(tmp_path, "cat/1.jpg", "dog/1.heic", "dog/2.heic")
    with pytest.raises(Refused, match=r"dog holds no image \(2 HEIC images"):
        index_images(tmp_path)


def test_classes_that_differ_by_case_are_told(tmp_path: Path) -> None:
    assert (
        "Cat and cat differ only by the case" in index_notes(index_images(make(tmp_path, "Cat/1.jpg", "cat/1.jpg")))[0]
    )


def test_a_class_named_as_a_subset_is_not_guessed(tmp_path: Path) -> None:
    make(tmp_path, "train/1.jpg", "bus/1.jpg")
    index = index_images(tmp_path)
    assert index.classes == ("bus", "train")
    assert "Taken as classes" in index_notes(index)[0] and "train/" in index_notes(index)[0]
    make(tmp_path, "train/steam/1.jpg")
    with pytest.raises(Refused, match="--data"):
        index_images(tmp_path)


# our own folders


OWN = {
    "runs/a": ("config.json", "split.json", "curves.png"),
    "report": ("report.html", "report.md", "curves.png"),
    "comparison": ("comparison.json", "difference.png"),
    "ensemble": ("test.json", "predictions.csv", "confusion.png"),
    "my_out/deep/er": ("events.out.tfevents.1.host", "x.png"),
    "training_plots_finetune": ("a.png",),
    "demo/runs/a": ("config.json", "env.json"),
    "demo/data/ball": ("1.jpg",),
    "study/model/arm": ("study.json", "x.png"),
    "data/101_ObjectCategories/ant": ("1.jpg",),
    "venv": ("pyvenv.cfg", "lib/matplotlib/icon.png"),
}


def test_what_finetune101_wrote_is_no_class(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "dog/1.png", *(f"{folder}/{name}" for folder, names in OWN.items() for name in names))
    (tmp_path / "elsewhere").mkdir()  # the folder of runs, still empty
    index = index_images(find_data(str(tmp_path)), ours=[str(tmp_path / "elsewhere")])
    assert index.classes == ("cat", "dog")
    assert len(index.paths) == 2
    (line,) = index_notes(index)
    assert "folders of finetune101" in line and "remove" not in line


def test_a_stray_settings_file_makes_no_class_ours(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "cat/config.json", "dog/1.jpg", "dog/study.json", "dog/report.md", "emu/1.png")
    make(tmp_path, "emu/test.json")
    assert index_images(tmp_path).classes == ("cat", "dog", "emu")


def test_a_cache_among_the_classes_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "cat/1.jpg", "dog/1.png", "cache/images_1.npy")
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    assert index_images(tmp_path).classes == ("cat", "dog")


# places that cannot be read


@pytest.mark.parametrize("name", ["~nobody-here/photos", "x" * 300, "a\0b", "gone/photos"])
def test_a_place_that_cannot_be_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINETUNE101_DATA", raising=False)
    assert main(["data", "verify", "--data", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and escaped(name)[:20] in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


AS_NOBODY = """
import concurrent.futures.thread, os, sys
from finetune101.data.images import find_data, index_images
from finetune101.errors import Refused
if os.geteuid() == 0:
    os.seteuid(65534)
for place in sys.argv[1:]:
    try:
        index_images(find_data(place))
    except Refused as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs file modes")
def test_folders_that_may_not_be_entered_are_named(tmp_path: Path) -> None:
    shut = ["one", "two/cat", "three/cat/more", "four/cat/1.jpg"]
    for name in ("one", "two", "three", "four"):
        make(tmp_path, f"{name}/cat/1.jpg", f"{name}/dog/1.jpg", f"{name}/cat/more/2.jpg")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and folder != Path("/tmp") and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    for place in shut:
        (tmp_path / place).chmod(0)
    places = [str(tmp_path / place) for place in ("one", "one/sub", "two", "three", "four")]
    try:
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, *places], capture_output=True, text=True)
    finally:
        for place in shut:
            (tmp_path / place).chmod(0o755)
    lines = done.stdout.splitlines()
    assert done.stderr == "" and len(lines) == len(places)
    for line, place in zip(lines, ("one", "one/sub", *shut[1:]), strict=True):
        assert place in line and "Permission denied" in line


# folders one too deep or too high


@pytest.mark.parametrize(
    ("files", "token"),
    [
        (["data/train/cat/1.jpg", "data/train/dog/1.jpg", "data/test/cat/2.jpg", "data/test/dog/2.jpg", "plots/0.png"],
         "data"),
        ([f"{name}/{part}/1.jpg" for name in ("cat", "dog") for part in ("training", "test")], "train/cat"),
        ([f"{part}_set/{part}_set/{name}/1.jpg" for name in ("cat", "dog") for part in ("training", "test")], "move"),
    ],
)  # fmt: skip
def test_folders_at_another_depth_are_never_merged_in_silence(tmp_path: Path, files: list[str], token: str) -> None:
    with pytest.raises(Refused, match=token):
        index_images(find_data(str(make(tmp_path, *files))))


def test_classes_of_sub_folders_alone_are_told(tmp_path: Path) -> None:
    make(tmp_path, "images/cat/1.jpg", "images/dog/2.jpg", "docs/1.png", "docs/2.png")
    lines = index_notes(index_images(find_data(str(tmp_path))))
    assert len([line for line in lines if "images" in line and "2 sub-folders" in line]) == 1
