"""Images sorted into a folder per class."""

import os
import shutil
from pathlib import Path

import pytest

from finetune101.deploy import sorting
from finetune101.deploy.inputs import image_inputs
from finetune101.deploy.prediction import Prediction
from finetune101.deploy.sorting import SortedFolder, folder_names, safe_name
from finetune101.errors import Refused

CLASSES = ["ball", "box"]


@pytest.fixture
def photos(tmp_path):
    """Three files of two names and two contents: a/x.jpg, b/x.jpg and b/y.jpg."""
    for name, content in {"a/x.jpg": b"one", "b/x.jpg": b"other", "b/y.jpg": b"one"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def put(folder, *files, label="ball", probability=0.9):
    predictions = [Prediction(((label, probability),), str(file)) for file in files]
    assert list(folder.add_all(predictions)) == predictions
    return folder


def tree(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_equal_names_get_a_number_and_nothing_is_overwritten(photos):
    into = photos / "sorted"
    put(SortedFolder(into, CLASSES), photos / "a/x.jpg", photos / "b/x.jpg", photos / "b/y.jpg")
    assert tree(into) == {"ball/x.jpg": b"one", "ball/x_2.jpg": b"other", "ball/y.jpg": b"one"}
    assert (photos / "a/x.jpg").read_bytes() == b"one"


def test_a_second_run_adds_only_what_is_new(photos):
    into = photos / "sorted"
    put(SortedFolder(into, CLASSES), photos / "a/x.jpg", photos / "b/x.jpg")
    before = tree(into)
    again = put(SortedFolder(into, CLASSES), photos / "a/x.jpg", photos / "b/x.jpg")
    assert tree(into) == before and again.present == 2 and again.added.total() == 0
    more = put(SortedFolder(into, CLASSES), photos / "a/x.jpg", photos / "b/y.jpg")
    assert more.added == {"ball": 1} and more.present == 1 and "1 were there already" in more.summary()


def test_a_copy_of_another_command_is_never_replaced(photos, monkeypatch):
    into, link = photos / "sorted", os.link

    def late(source, target):  # another command makes the same name just before
        if not Path(target).exists() and Path(target).name == "x.jpg":
            Path(target).write_bytes(b"from another command")
        link(source, target)

    monkeypatch.setattr(sorting.os, "link", late)
    put(SortedFolder(into, CLASSES), photos / "a/x.jpg")
    assert tree(into) == {"ball/x.jpg": b"from another command", "ball/x_2.jpg": b"one"}


def test_a_file_system_without_hard_links(photos, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no links")

    monkeypatch.setattr(sorting.os, "link", refuse)
    put(SortedFolder(photos / "sorted", CLASSES), photos / "a/x.jpg", photos / "b/x.jpg")
    assert tree(photos / "sorted") == {"ball/x.jpg": b"one", "ball/x_2.jpg": b"other"}


def test_a_low_probability_goes_to_unsure(photos):
    folder = SortedFolder(photos / "sorted", CLASSES)
    put(folder, photos / "a/x.jpg", probability=0.49)
    put(folder, photos / "b/x.jpg", probability=0.5, label="box")
    assert tree(photos / "sorted").keys() == {"unsure/x.jpg", "box/x.jpg"} and "1 into unsure" in folder.summary()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(Refused, match="from 0 to 1"):
            SortedFolder(photos / "sorted", CLASSES, unsure_below=share)


def test_links_lead_to_the_images_from_anywhere(photos, monkeypatch):
    monkeypatch.chdir(photos)
    for _ in range(2):
        put(SortedFolder(Path("sorted"), CLASSES, link=True), "a/x.jpg", "b/x.jpg")
    links = sorted((photos / "sorted" / "ball").iterdir())
    assert [link.resolve() for link in links] == [photos / "a/x.jpg", photos / "b/x.jpg"]
    assert all(link.is_symlink() for link in links)


def test_a_system_without_links_says_so(photos, monkeypatch):
    def refuse(self, target):
        raise OSError(1314, "a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(Refused, match="leave --link out"):
        put(SortedFolder(photos / "sorted", CLASSES, link=True), photos / "a/x.jpg")


def test_a_full_disk_leaves_no_part_of_a_file(photos, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"o")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(Refused, match="free some space"):
        put(SortedFolder(photos / "sorted", CLASSES), photos / "a/x.jpg")
    assert tree(photos / "sorted") == {}


def test_the_folder_and_the_images_lie_apart(photos):
    def check(into, *words):
        SortedFolder(photos / into, CLASSES).check(image_inputs([str(photos / word) for word in words]))

    check("sorted", "a", "b/x.jpg", "a/*")
    check("a/sorted", "a/x.jpg")  # a file, not its folder
    for into, word in [("a", "a"), ("a/sorted", "a"), (".", "a"), ("b", "b/*.jpg"), ("a/sorted", "*")]:
        with pytest.raises(Refused, match="inside of"):
            check(into, word)
    (photos / "c").mkdir()
    (photos / "c" / "z.jpg").symlink_to(photos / "a" / "x.jpg")
    with pytest.raises(Refused, match="inside of"):  # the image itself lies there
        check("a", "c")
    with pytest.raises(Refused, match="is a file"):
        SortedFolder(photos / "a" / "x.jpg", CLASSES)


def test_the_names_of_folders_fit_every_system():
    assert safe_name("dog/cat") == "dog_cat" and safe_name('a:b*c?"<>|\\') == "a_b_c______"
    assert safe_name("..") == safe_name("..").strip(". ") != "" and not safe_name(".git").startswith(".")
    assert safe_name("CON") == "CON_" and safe_name("com1.old") == "com1.old_" and safe_name("a\nb") == "a_b"
    assert safe_name("name. ") == safe_name("name. ").rstrip(". ") and safe_name("") == "_"
    assert len(safe_name("猫" * 300).encode()) <= 200 and safe_name("\udce9") == "_"
    assert safe_name("water_lilly") == "water_lilly" and safe_name("猫") == "猫"


def test_every_class_has_a_folder_of_its_own():
    names = folder_names(["unsure", "a/b", "a:b", "Ball", "ball", "e\u0301", "é"])
    assert names["unsure"] == "unsure_2" and len({name.casefold() for name in names.values()}) == 7
    assert names == folder_names(list(names))  # the same at every run
