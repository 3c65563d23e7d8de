"""What is kept in the cache folder is whole, checked, made once, and within a bound."""

from __future__ import annotations

import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from finetune101.cli.main import main
from finetune101.config import Preprocessing
from finetune101.data import store
from finetune101.data.cache import open_images
from finetune101.data.duplicates import duplicate_groups
from finetune101.data.images import Index, index_images
from finetune101.errors import Refused
from finetune101.files import claim

SHAPE = Preprocessing(size=24, cache_size=24, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for caches."""
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def index(tiny_data: Path) -> Index:
    return index_images(tiny_data)


def place(name: str, rows: int = 4, columns: int = 250_000) -> store.Place:
    return store.Place(f"features_{name}.npy", (rows, columns), np.float32)


def put(name: str, age: float = 0.0, rows: int = 4) -> store.Place:
    """Keeps 1 MB a row, last used ``age`` days ago by another process."""
    where = place(name, rows)
    store.keep_array(where, [np.full((1, 250_000), i, np.float32) for i in range(rows)], f"rows of {name}", 12.5)
    used = int(time.time() - 86400 * age)
    os.utime(where.file, (used, used))
    store._in_use.discard(where.name)
    return where


def test_what_is_kept_is_read_again(folder: Path) -> None:
    where = put("one", rows=11)  # more than one block
    for mapped in (False, True):
        kept = store.read_array(where, mapped=mapped)
        assert kept and kept.seconds == 12.5 and isinstance(kept.array, np.memmap) == mapped
        np.testing.assert_array_equal(kept.array[:, 7], range(11))
    np.testing.assert_array_equal(np.load(where.file, allow_pickle=False)[:, 7], range(11))
    assert store.read_array(place("two")) is None


DAMAGES = ["empty", "text", "cut", "cut in the header", "zeros", "foreign", "one byte", "end", "other shape", "longer"]


def damage(file: Path, kind: str, keep_time: bool) -> None:
    before, content = file.stat(), bytearray(file.read_bytes())
    if kind == "empty":
        content = bytearray()
    elif kind == "text":
        content = bytearray(b"hello")
    elif kind == "cut":
        content = content[: len(content) // 2]
    elif kind == "cut in the header":
        content = content[:40]
    elif kind == "zeros":
        content = bytearray(len(content))
    elif kind == "one byte":
        content[len(content) // 2] ^= 1
    elif kind == "end":
        content[-3:] = b"abc"
    elif kind == "longer":
        content += b"more"
    file.write_bytes(content)
    if kind in ("foreign", "other shape"):
        with open(file, "wb") as out:
            np.save(out, np.zeros((2, 3)) if kind == "foreign" else np.zeros((36, 24, 24, 4), np.uint8))
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_images_are_made_anew(
    index: Index, folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = np.array(open_images(index, SHAPE).pixels)
    (file,) = folder.iterdir()
    damage(file, kind, keep_time=kind == "one byte")
    capsys.readouterr()
    np.testing.assert_array_equal(open_images(index, SHAPE).pixels, right)
    said = [line for line in capsys.readouterr().out.splitlines() if "is damaged (" in line]
    assert len(said) == 1 and file.name in said[0]
    open_images(index, SHAPE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["empty", "cut", "one byte", "foreign"])
def test_damaged_thumbnails_are_made_anew(
    index: Index, folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = duplicate_groups(index)
    (file,) = folder.iterdir()
    damage(file, kind, keep_time=False)
    assert duplicate_groups(index) == right and duplicate_groups(index) == right
    assert capsys.readouterr().out.count("is damaged (") == 1


def test_of_a_large_file_blocks_are_sampled_and_all_are_checked_once_it_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "SURE", 2 * store.BLOCK)
    where = put("large", rows=40)
    assert store.read_array(where)
    damage(where.file, "one byte", keep_time=False)
    assert store.read_array(where) is None and "changed" in capsys.readouterr().out
    where = put("large", rows=40)
    os.utime(where.file, (time.time(), 1e9 + 0.5))  # copied, say, without a change
    assert store.read_array(where) and store.read_array(where)


def test_the_longest_unused_go_first_and_never_what_is_in_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE_MAX_GB", "0.014")  # three of 4 MB and a little
    old, middle, young = put("old", 30), put("middle", 20), put("young", 10)
    other = folder / "features_of_mine.txt"
    other.write_text("no cache")
    os.utime(other, (0, 0))
    store.read_array(old)  # in use from now on
    assert store.make_room(place("new")) == ""
    assert old.file.exists() and not middle.file.exists() and young.file.exists() and other.exists()
    assert middle.name in capsys.readouterr().out
    store.read_array(young)
    monkeypatch.setenv("FINETUNE101_CACHE_MAX_GB", "0.009")
    assert "needs 0.00 GB" in store.make_room(place("new")) and old.file.exists() and young.file.exists()
    assert "0.009" in store.make_room(place("new", rows=40))


@pytest.mark.parametrize("bound", ["x", "-1", "nan", "inf"])
def test_a_bound_that_is_no_number_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE_MAX_GB", bound)
    with pytest.raises(Refused, match="FINETUNE101_CACHE_MAX_GB"):
        store.cache_limit()


def test_images_beyond_the_bound_are_decoded_on_demand(
    index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE_MAX_GB", "0.00001")
    images = open_images(index, SHAPE)
    assert images.pixels is None and images.read(index.paths[:2]).shape == (2, 24, 24, 3)
    assert "going on without it" in capsys.readouterr().out and not list(folder.iterdir())


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may have more than 300 kB: writing fails in the middle, as on a disk that fills."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_meanwhile_is_a_sentence(
    index: Index, folder: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = Preprocessing(size=96, cache_size=96, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    images = open_images(index, shape)  # 1 MB
    assert images.pixels is None and images.read(index.paths[:1]).shape == (1, 96, 96, 3)
    assert "going on without it" in capsys.readouterr().out and not list(folder.iterdir())


def test_who_comes_second_waits_for_the_first(index: Index, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = np.array(open_images(index, SHAPE).pixels)
    (file,) = folder.iterdir()
    kept = shutil.move(file, folder.parent / "kept")
    results: list[np.ndarray | None] = []
    capsys.readouterr()
    with claim(folder / f".{file.name}.lock") as alone:
        assert alone
        second = threading.Thread(target=lambda: results.append(open_images(index, SHAPE).pixels))
        second.start()
        time.sleep(0.5)
        assert not results
        shutil.move(kept, file)
    second.join()
    np.testing.assert_array_equal(results[0], right)
    said = capsys.readouterr().out
    assert said.count("waiting") == 1 and "Decoding" not in said


def test_only_the_wanted_images_are_decoded(tiny_data: Path, folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_data, tmp_path / "images"))
    index = index_images(root)
    (root / index.paths[0]).unlink()  # would stop decoding
    images = open_images(index, SHAPE, wanted=index.paths[:1:-1])
    assert images.paths == index.paths[2:]
    for off in ("auto", "off"):
        same = open_images(index, SHAPE, off, wanted=index.paths[2:])
        np.testing.assert_array_equal(same.read(index.paths[-3:]), images.read(index.paths[-3:]))


def test_splits_of_one_data_set_share_a_cache(index: Index, folder: Path) -> None:
    """Half of the images are enough; fewer have a cache of their own."""
    direct = open_images(index, SHAPE, "off")
    splits = [index.paths, index.paths[::2], index.paths[18:], index.paths[:17]]
    for wanted, files in zip(splits, (1, 1, 1, 2), strict=True):
        images = open_images(index, SHAPE, wanted=wanted)
        assert images.paths == tuple(wanted) and len(list(folder.iterdir())) == files
        assert images.pixels is not None and len(images.pixels) == (36 if files == 1 else 17)
        np.testing.assert_array_equal(images.read(wanted[::-1]), direct.read(wanted[::-1]))


def test_an_unreadable_image_that_is_skipped_does_not_part_the_splits(
    tiny_data: Path, folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_data, tmp_path / "images"))
    index = index_images(root)
    (root / index.paths[0]).write_bytes(b"broken")
    for wanted in (index.paths[1:30], index.paths[6:]):
        open_images(index, SHAPE, skipped=index.paths[:1], wanted=wanted)
    assert len(list(folder.iterdir())) == 1


def test_names_that_are_not_utf_8(tiny_data: Path, folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_data, tmp_path / "images"))
    os.rename(root / "ball" / "image_0002.jpg", os.fsencode(root / "ball") + b"/caf\xe9.jpg")
    index = index_images(root)
    odd = next(path for path in index.paths if "caf" in path)
    assert open_images(index, SHAPE).read([odd]).shape == (1, 24, 24, 3) and len(list(folder.iterdir())) == 1
    assert len(duplicate_groups(index)) == 36


def test_the_verb_lists_and_clears(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0 and "0 files" in capsys.readouterr().out
    put("old", 30), put("young", 2)
    (folder / "features_broken.npy").write_bytes(b"x")
    (folder / "kernels_0.so").write_bytes(b"x")
    (folder / ".features_0.npy.elsewhere.1.0123abcd.part").write_bytes(b"x")
    os.utime(folder / ".features_0.npy.elsewhere.1.0123abcd.part", (0, 0))
    (folder / "thesis.txt").write_text("mine")
    assert main(["cache", "list"]) == 0
    said = capsys.readouterr().out
    assert "rows of old" in said and "30.0" in said and "4 files" in said and "thesis" not in said
    assert main(["cache", "list", "--older-than", "7"]) == 0
    assert "1 files" in capsys.readouterr().out
    assert main(["cache", "clear", "--older-than", "7"]) == 0
    assert sorted(file.name for file in folder.iterdir()) == [
        "features_broken.npy", "features_young.npy", "kernels_0.so", "thesis.txt",
    ]  # fmt: skip
    assert main(["cache", "clear"]) == 0
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]
    assert main(["cache", "clear", "--older-than", "-1"]) == 2
