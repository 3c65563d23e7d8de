"""The images that words name: files, folders, patterns and lists."""

import io
import os
import shutil
import threading

import pytest
from PIL import Image

from finetune101.data.layouts import DEAD, NOT_IMAGES
from finetune101.deploy.inputs import image_inputs, is_list, left_out_text
from finetune101.errors import Refused


@pytest.fixture
def folder(six_images):
    return six_images


def test_inputs_may_be_files_folders_and_patterns(folder):
    def names(*words):
        inputs = image_inputs([str(folder / word) for word in words])
        files = [os.path.relpath(file, folder).replace(os.sep, "/") for file in inputs.files]
        return files, [reason for _, reason in inputs.failed]

    assert names("ball/*_000[12].jpg") == (["ball/image_0001.jpg", "ball/image_0002.jpg"], [])
    assert names("b*")[0] == names("ball", "box")[0] == names("**")[0] == names("")[0]
    assert len(names("ball", "ball/image_0001.jpg")[0]) == 3
    assert names("box/notes.txt") == (["box/notes.txt"], [])
    assert names("box/*.txt")[0] == names("none/*.jpg")[0] == []
    assert "no image there" in names("box/*.txt")[1][0]
    assert names("none/*.jpg")[1] == ["no such file or folder"]
    (folder / "empty").mkdir()
    assert "no image there" in names("empty")[1][0]


def test_a_name_that_looks_like_a_pattern(folder):
    odd = folder / "photo[1].jpg"
    shutil.copy(folder / "ball" / "image_0001.jpg", odd)
    assert list(image_inputs([str(odd)]).files) == [str(odd)]


def test_a_folder_is_named_as_it_was_given(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert next(iter(image_inputs(["ball/"]).files)) == os.path.join("ball", "image_0001.jpg")
    assert next(iter(image_inputs(["."]).files)) == os.path.join("ball", "image_0001.jpg")


def test_what_is_left_out_is_counted_once_with_its_reason(folder):
    (folder / "box" / "dead.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "box" / "film.mp4").write_bytes(b"")
    inputs = image_inputs([str(folder), str(folder / "box"), str(folder / "box" / "*")])
    assert {reason: len(paths) for reason, paths in inputs.left_out.items()} == {NOT_IMAGES: 2, DEAD: 1}
    assert len(inputs.files) == 6 and not inputs.failed
    text = left_out_text(inputs)
    assert text.count("notes.txt") == 1 and len(text.splitlines()) == 1
    assert left_out_text(image_inputs([str(folder / "ball")])) == ""


def test_what_is_no_file_is_named_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "nowhere.jpg")
    words = [str(tmp_path / "pipe.png"), str(tmp_path / "dead.jpg"), "/dev/null", str(tmp_path / "*.png"), "a\0b.jpg"]
    results = []
    thread = threading.Thread(target=lambda: results.append(image_inputs(words)), daemon=True)
    thread.start()
    thread.join(20)  # opening a pipe that nobody writes to waits for ever
    assert not results[0].files and [path for path, _ in results[0].failed] == words


LINES = {
    "lines": b"ball/image_0001.jpg\n\nbox\nmissing.jpg\n",
    "windows": b"\xef\xbb\xbfball/image_0001.jpg\r\nbox\r\nmissing.jpg",
    "nul": b"ball/image_0001.jpg\0box\0missing.jpg\0",
}


@pytest.mark.parametrize("content", LINES.values(), ids=LINES.keys())
def test_a_list_has_a_path_per_line_or_between_nuls(folder, monkeypatch, content):
    monkeypatch.chdir(folder)
    (folder / "list.txt").write_bytes(content)
    listed = image_inputs(["@list.txt"])
    assert len(listed.files) == 4 and [path for path, _ in listed.failed] == ["missing.jpg"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert image_inputs(["-"]) == listed


def test_names_that_no_letter_of_a_list_may_spoil(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = [" two words .jpg", "line\nbreak.jpg", os.fsdecode(b"b\xe9.jpg"), "猫.jpg", "@at.jpg"]
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "list").write_bytes(b"\0".join(map(os.fsencode, names)))
    assert list(image_inputs(["@list"]).files) == names
    assert not is_list("@at.jpg") and list(image_inputs(["@at.jpg"]).files) == ["@at.jpg"]


def test_a_list_that_is_not_there_is_refused(here):
    with pytest.raises(Refused, match=r"@nowhere\.txt"):
        image_inputs(["@nowhere.txt"])
