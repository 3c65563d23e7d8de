"""Decoded pixels are those that a viewer shows; whatever is wrong with a file is a reason, never a traceback."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune101.data.decode import Unreadable, decode, in_threads, opened, unreadable
from finetune101.standalone import IMAGE_SUFFIXES, _prepared, _rgb, _Room, formats_of

# what an EXIF orientation does to the stored pixels so that they are upright, undone
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def scene() -> Image.Image:
    """40 x 20: red above, blue below, green at the left; no turn or mirror image of it is like it."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 10, 40, 20))
    image.paste((0, 255, 0), (0, 0, 10, 20))
    return image


def tagged(orientation: int) -> tuple[Image.Image, Image.Exif]:
    """``scene`` as a camera in another position stores it."""
    tag = Image.Exif()
    tag[0x0112] = orientation
    return scene().transpose(STORED[orientation]), tag


def first(file: Path) -> list[int]:
    return [int(value) for value in decode(file, 2, "bilinear")[0, 0]]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A black PNG of one bit per pixel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_every_orientation_gives_the_pixels_of_the_upright_image(tmp_path: Path, orientation: int, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    image, tag = tagged(orientation)
    image.save(tmp_path / f"turned{suffix}", exif=tag, **options)
    scene().save(tmp_path / "upright.png")
    turned = decode(tmp_path / f"turned{suffix}", 16, "bicubic")
    np.testing.assert_array_equal(turned, decode(tmp_path / "upright.png", 16, "bicubic"))
    with opened(tmp_path / f"turned{suffix}") as picture:
        assert picture.image.size == (40, 20)


@pytest.mark.parametrize("suffix", [".jpg", ".avif", ".heic", ".mpo"])
def test_lossy_formats_are_turned_too(tmp_path: Path, suffix: str) -> None:
    if suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image, tag = tagged(6)
    image.resize((80, 160)).save(tmp_path / f"phone{suffix}", exif=tag.tobytes(), quality=95)
    with opened(tmp_path / f"phone{suffix}") as picture:
        assert picture.image.size == (160, 80)
        corners = [picture.image.getpixel(place) for place in ((5, 40), (120, 10), (120, 70))]
    strongest = [max(range(3), key=lambda i, colour=colour: colour[i]) for colour in corners]  # type: ignore[misc,index]
    assert strongest == [1, 0, 2]


def test_damaged_exif_leaves_the_image_as_it_is_stored(tmp_path: Path) -> None:
    for number, content in enumerate((b"garbage!", b"\0\x08\0\x02\x01\x12\0\x03", b"II*\0\xff\xff\xff\x7f")):
        (tmp_path / f"{number}.png").write_bytes(png(16, 8, chunk(b"eXIf", content)))
        assert decode(tmp_path / f"{number}.png", 4, "bilinear").max() == 0


@pytest.mark.parametrize(
    ("value", "kind", "name", "expected"),
    [
        (2000, np.uint16, "x.png", 8),
        (12032, np.uint16, "x.png", 47),
        (65535, np.uint16, "x.png", 255),
        (200, np.uint16, "x.png", 1),
        (12032, np.uint16, "x.tif", 47),
        (12032, ">u2", "x.tif", 47),
        (100, np.int32, "x.tif", 100),
        (12032, np.int32, "x.tif", 47),
        (2**30, np.int32, "x.tif", 128),
        (0.5, np.float32, "x.tif", 128),
        (100.0, np.float32, "x.tif", 100),
        (12032.0, np.float32, "x.tif", 47),
        (np.nan, np.float32, "x.tif", 0),
        (np.inf, np.float32, "x.tif", 255),
    ],
)
def test_deep_images_are_scaled_to_8_bits(tmp_path: Path, value: float, kind: type, name: str, expected: int) -> None:
    Image.fromarray(np.full((6, 6), value, kind)).save(tmp_path / name)
    assert first(tmp_path / name) == [expected] * 3


def test_a_ramp_of_16_bits_stays_a_ramp(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    with opened(tmp_path / "ramp.png") as picture:
        difference = np.asarray(picture.image)[..., 0].astype(float) - ramp / 256
    assert abs(difference).max() <= 1


def test_a_tiff_in_which_0_is_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 6), 12032, np.uint16)).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert first(tmp_path / "x.tif") == [255 - 47] * 3


HALF = (255, 127, 127)


@pytest.mark.parametrize(
    ("mode", "colour", "name", "options", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), "x.png", {}, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), "x.png", {}, HALF),
        ("RGBA", (255, 0, 0, 128), "x.webp", {"lossless": True}, HALF),
        ("RGBA", (255, 0, 0, 128), "x.tif", {}, HALF),
        ("LA", (100, 255), "x.png", {}, (100, 100, 100)),
        ("LA", (100, 0), "x.png", {}, (255, 255, 255)),
        ("L", 5, "x.png", {"transparency": 5}, (255, 255, 255)),
        ("L", 6, "x.png", {"transparency": 5}, (6, 6, 6)),
        ("RGB", (0, 0, 255), "x.png", {"transparency": (0, 0, 255)}, (255, 255, 255)),
        ("P", 0, "x.png", {}, (250, 20, 10)),
        ("P", 0, "x.png", {"transparency": 0}, (255, 255, 255)),
        ("P", 0, "x.png", {"transparency": 1}, (250, 20, 10)),
        ("P", 0, "x.png", {"transparency": bytes([0, 255])}, (255, 255, 255)),
        ("P", 0, "x.gif", {"transparency": 0}, (255, 255, 255)),
        ("1", 1, "x.png", {}, (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), "x.tif", {}, (0, 255, 255)),
        ("CMYK", (0, 0, 0, 0), "x.jpg", {}, (255, 255, 255)),  # by Adobe's rule: stored inverted
        ("CMYK", (0, 0, 0, 255), "x.jpg", {}, (0, 0, 0)),
        ("CMYK", (255, 0, 0, 0), "x.jpg", {}, (0, 255, 255)),
        ("YCbCr", (128, 128, 128), "x.jpg", {}, (128, 128, 128)),
    ],
)  # fmt: skip
def test_the_colour_that_a_viewer_shows(
    tmp_path: Path, mode: str, colour: object, name: str, options: dict[str, object], expected: tuple[int, ...]
) -> None:
    image = Image.new(mode, (8, 8), colour)  # type: ignore[arg-type]
    if mode == "P":
        image.putpalette([250, 20, 10, 0, 0, 0])
    image.save(tmp_path / name, **options)
    assert max(abs(a - b) for a, b in zip(first(tmp_path / name), expected, strict=True)) <= 1


def test_modes_that_no_file_here_has() -> None:
    palette = Image.new("PA", (2, 2), (0, 0))
    palette.putpalette([250, 20, 10, 0, 0, 0])
    assert _rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    premultiplied = Image.new("RGBA", (2, 2), (255, 0, 0, 128)).convert("RGBa")
    assert _rgb(premultiplied).getpixel((0, 0)) == HALF
    assert _rgb(Image.new("LA", (2, 2), (100, 0)).convert("La")).getpixel((0, 0)) == (255, 255, 255)


def test_the_first_of_several_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("lime", "red")]
    for name in ("x.gif", "x.webp", "x.tif", "x.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red, green, _ = first(tmp_path / name)
        assert green > 240 and red < 15


def test_suffixes_are_those_of_the_formats(tmp_path: Path) -> None:
    for suffix in IMAGE_SUFFIXES:
        if suffix in (".heic", ".heif"):
            continue
        scene().save(tmp_path / f"x{suffix}", *(["JPEG"] if suffix in (".jfif", ".jpe") else []))
        assert decode(tmp_path / f"x{suffix}", 4, "bilinear").shape == (4, 4, 3)
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.avif").read_bytes())  # as many sites send them
    assert decode(tmp_path / "x.jpg", 4, "bilinear").shape == (4, 4, 3)


def test_heic_without_its_decoder_says_what_to_install(tmp_path: Path) -> None:
    head = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    assert formats_of(head) == ("HEIF",)
    (tmp_path / "phone.jpg").write_bytes(head + bytes(100))
    code = (
        "import sys; sys.modules['pillow_heif'] = None; from pathlib import Path\n"
        "from finetune101.data.decode import unreadable\n"
        "print(unreadable(Path(sys.argv[1]), ['phone.jpg']))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "pip install pillow-heif" in run.stdout


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("content", [POSTSCRIPT, b"", b"text", b"\x89PNG\r\n\x1a\n", b"P6 2 2 255\n" + bytes(12)])
def test_what_is_no_image_of_ours_is_opened_by_no_decoder(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "ran"}\necho 10.0\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(Unreadable) as caught:
        decode(tmp_path / "photo.jpg", 8, "bilinear")
    assert caught.value.problem == "not an image" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [(178_000_000, 1), (70_000, 1), (10_000, 9_000), (1, 66_000)])
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(Unreadable, match="shrink it"):
        decode(tmp_path / "bomb.png", 8, "bilinear")


def test_a_decoder_may_raise_anything(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    scene().resize((64, 64)).save(buffer, "AVIF")
    good, rng = buffer.getvalue(), np.random.default_rng(0)
    for number in range(60):
        bad = bytearray(good)
        for place in rng.integers(20, len(bad), 3):
            bad[place] ^= int(rng.integers(1, 256))
        (tmp_path / f"{number}.jpg").write_bytes(bytes(bad))
    assert unreadable(tmp_path, [f"{number}.jpg" for number in range(60)])


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    names = ["pipe.png", "folder.png", "link.png", "absent.png"]
    assert list(unreadable(tmp_path, names)) == names


def test_an_error_of_the_reader_stays_its_own(tmp_path: Path) -> None:
    scene().save(tmp_path / "x.png")
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "x.png"):
        raise ZeroDivisionError
    with pytest.raises(Unreadable, match="memory"), opened(tmp_path / "x.png"):
        raise MemoryError


def test_an_unreadable_image_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(Unreadable(Path("a\udce9\n.jpg"), "odd", "unreadable")))
    assert (error.reason, error.problem) == ("odd", "unreadable")
    assert "a\\xe9\\x0a.jpg" in str(error)


def odd_jpeg(file: Path) -> None:
    """A readable JPEG whose EXIF is cut."""
    scene().save(file)
    data, exif = file.read_bytes(), b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x01\0"
    file.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])


def test_what_pillow_warns_of_is_one_line_with_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("odd.jpg", "other.jpg"):
        odd_jpeg(tmp_path / name)
    for _ in range(3):
        list(in_threads(lambda name: decode(tmp_path / name, 8, "bilinear"), ["odd.jpg", "other.jpg"] * 4))
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(".jpg")[0].rsplit("/")[-1] for line in lines) == ["odd", "other"]
    with pytest.warns(UserWarning, match="mine"):  # the warnings of others go where they went
        warnings.warn("mine", stacklevel=1)


def test_warning_filters_that_change_meanwhile_stay_right(tmp_path: Path) -> None:
    """As another thread changes them while images are decoded."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    added = ("ignore", None, ResourceWarning, None, 7)
    with warnings.catch_warnings():
        before, show = list(warnings.filters), warnings.showwarning
        with opened(tmp_path / "a.png"):
            warnings.filters.insert(0, added)  # type: ignore[attr-defined]
        assert list(warnings.filters) == [added, *before] and warnings.showwarning is show
        block = warnings.catch_warnings()
        with opened(tmp_path / "a.png"):
            block.__enter__()
        block.__exit__()  # brings back what was there while the image was decoded
        for _ in range(2):
            decode(tmp_path / "a.png", 8, "bilinear")
        assert list(warnings.filters) == [added, *before] and warnings.showwarning is show


def test_threads_together_hold_few_pixels() -> None:
    room, held, most, lock = _Room(100), 0, 0, threading.Lock()

    def take(pixels: int) -> None:
        nonlocal held, most
        room.take(pixels)
        with lock:
            held += pixels
            most = max(most, held)
        threading.Event().wait(0.002)
        with lock:
            held -= pixels
        room.give(pixels)

    threads = [threading.Thread(target=take, args=(30,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 100
    take(1000)  # one alone may be larger


def test_in_threads_keeps_order_and_stops_at_an_error() -> None:
    assert list(in_threads(lambda n: n * n, range(500))) == [n * n for n in range(500)]
    started = []

    def fail(n: int) -> None:
        started.append(n)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(in_threads(fail, range(10_000)))
    assert len(started) < 9_000


def test_only_large_jpegs_are_decoded_smaller() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4032, 3024), "teal").save(buffer, "JPEG")
    with Image.open(buffer) as large:
        assert _prepared(large, 224) == 1008 * 756
    with Image.open(buffer) as large:
        assert _prepared(large, 1024) == 4032 * 3024
    Image.new("RGB", (3999, 2799)).save(buffer := io.BytesIO(), "JPEG")  # the largest of Caltech-101's folder
    with Image.open(buffer) as small:
        assert _prepared(small, 32) == 3999 * 2799


@pytest.mark.caltech101
def test_pixels_of_caltech101_are_those_of_version_0_1_0(caltech101: Path) -> None:
    paths = sorted(caltech101.glob("*/*.jpg"))[::150]
    total = hashlib.sha256()
    for path in paths:
        with Image.open(path) as image:  # what 0.1.0 did
            before = np.asarray(image.convert("RGB").resize((176, 176), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(decode(path, 176, "bilinear"), before)
        total.update(before.tobytes())
    assert len(paths) > 50


def test_the_extra_is_declared() -> None:
    assert importlib.util.find_spec("pillow_heif")
