"""The cache changes no pixel, follows every change of an image, and is whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune101.config import Preprocessing
from finetune101.data import cache
from finetune101.data.cache import Images, open_images
from finetune101.data.decode import decode, unreadable
from finetune101.data.images import Index, index_images

STANDARD = (0.5, 0.5, 0.5)


def geometry(size: int = 24, interpolation: str = "bilinear", final: int | None = None) -> Preprocessing:
    return Preprocessing(
        size=final or size,
        cache_size=size,
        mean=STANDARD,
        std=STANDARD,
        interpolation=interpolation,  # type: ignore[arg-type]
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for caches."""
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copied(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set, to change."""
    return Path(shutil.copytree(tiny_data, tmp_path / "images"))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_cache_holds_the_pixels_of_decoding(tiny_data: Path, folder: Path, interpolation: str) -> None:
    index, shape = index_images(tiny_data), geometry(24, interpolation)
    cached, direct = open_images(index, shape), open_images(index, shape, "off")
    assert isinstance(cached.pixels, np.memmap) and direct.pixels is None and len(files(folder)) == 1
    chosen = [*index.paths[::-3], index.paths[0], index.paths[0]]  # any order, and one twice
    pixels = cached.read(chosen)
    assert pixels.shape == (len(chosen), 24, 24, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, direct.read(chosen))
    for path, image in zip(chosen, pixels, strict=True):
        np.testing.assert_array_equal(image, decode(tiny_data / path, 24, interpolation))


def test_it_is_built_once(tiny_data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = index_images(tiny_data)
    open_images(index, geometry())
    (name,) = files(folder)
    said = capsys.readouterr().out
    assert "Decoding 36 images once into" in said and name in said and "GB" in said and "--cache-size" not in said
    built = (folder / name).stat().st_mtime_ns
    open_images(index, geometry())
    open_images(index, geometry(24, final=16))  # the final size is made of the same pixels
    assert files(folder) == [name] and (folder / name).stat().st_mtime_ns == built
    assert capsys.readouterr().out == ""
    open_images(index, geometry(64, final=16))
    assert "--cache-size 48" in capsys.readouterr().out


def test_another_geometry_has_its_own_cache(tiny_data: Path, folder: Path) -> None:
    index = index_images(tiny_data)
    for number, shape in enumerate((geometry(24), geometry(16), geometry(24, "bicubic")), 1):
        open_images(index, shape)
        assert len(files(folder)) == number


def test_a_changed_image_makes_a_new_cache(copied: Path, folder: Path) -> None:
    path = "ball/image_0001.jpg"
    before = open_images(index_images(copied), geometry()).read([path])
    Image.new("RGB", (40, 40), "red").save(copied / path)
    after = open_images(index_images(copied), geometry()).read([path])
    assert len(files(folder)) == 2
    assert (after != before).any() and after[0, 0, 0, 0] > 250
    np.testing.assert_array_equal(after[0], decode(copied / path, 24, "bilinear"))


def test_images_that_swap_names_make_a_new_cache(copied: Path, folder: Path) -> None:
    one, two = copied / "ball" / "image_0001.jpg", copied / "ball" / "image_0002.jpg"
    open_images(index_images(copied), geometry())
    one.rename(copied / "kept")
    two.rename(one)
    (copied / "kept").rename(two)
    images = open_images(index_images(copied), geometry())
    np.testing.assert_array_equal(images.read(["ball/image_0001.jpg"])[0], decode(one, 24, "bilinear"))


def test_an_unreadable_image_leaves_no_cache(copied: Path, folder: Path) -> None:
    bad = copied / "box" / "image_0003.jpg"
    bad.write_bytes(bad.read_bytes()[:400])
    index = index_images(copied)
    with pytest.raises(ValueError, match=r"cannot read the image .*box/image_0003\.jpg .*--skip-bad-images"):
        open_images(index, geometry())
    assert files(folder) == []
    assert list(unreadable(copied, index.paths)) == ["box/image_0003.jpg"]
    images = open_images(index, geometry(), skipped=["box/image_0003.jpg"])
    assert len(images.paths) == 35 and images.read(["box/image_0004.jpg"]).shape == (1, 24, 24, 3)


def test_mode_off_writes_nothing(tiny_data: Path, folder: Path) -> None:
    open_images(index_images(tiny_data), geometry(), "off")
    assert not folder.exists()


def test_a_short_disk_is_done_without(tiny_data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = open_images(index_images(tiny_data), geometry(2_000_000))  # 432 TB, which no disk has
    said = capsys.readouterr().out
    assert "The image cache needs 432000.00 GB" in said and "going on without it" in said
    assert images.pixels is None and files(folder) == []


def test_a_cache_folder_that_cannot_be_made_is_done_without(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "file" / "cache"))
    images = open_images(index_images(tiny_data), geometry())
    assert images.pixels is None and images.read([images.paths[0]]).shape == (1, 24, 24, 3)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", "~/here")
    assert cache.cache_dir() == Path.home() / "here"
    monkeypatch.delenv("FINETUNE101_CACHE")
    assert cache.cache_dir() == Path.home() / ".cache" / "finetune101"


# decode


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "P with transparency"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    options = {}
    if mode == "P with transparency":
        mode, options = "P", {"transparency": b"\x00\xff"}
    Image.new("RGB", (20, 10), "white").convert("L" if mode in ("I;16", "LA") else mode.split()[0]).convert(
        "L" if mode == "I;16" else mode
    ).save(file, **options)
    pixels = decode(file, 8, "bilinear")
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 and pixels.min() > 240


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".bmp", ".webp"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"image{suffix}"
    Image.new("RGB", (20, 10), (0, 0, 255)).save(file)
    assert decode(file, 8, "bicubic")[..., 2].min() > 240


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"cannot read the image .*bad\.jpg \(.*\); repair it or add --skip-bad-images"
    ):
        decode(tmp_path / "bad.jpg", 8, "bilinear")


def test_the_whole_image_is_squashed(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 20), "black")
    image.paste("white", (50, 0, 100, 20))  # the right half
    image.save(tmp_path / "wide.png")
    pixels = decode(tmp_path / "wide.png", 10, "bilinear")
    assert pixels[:, :4].max() < 30 and pixels[:, 6:].min() > 225


def test_images_of_an_index_keep_their_order(tiny_data: Path, folder: Path) -> None:
    index: Index = index_images(tiny_data)
    images: Images = open_images(index, geometry())
    assert images.paths == index.paths
