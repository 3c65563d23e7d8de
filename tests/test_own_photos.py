"""Folders of real people's photos: taken sideways, damaged, without a home, and what every command makes of them."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune101.cli.main import main
from finetune101.reports.mistakes import thumbnail

TINY = ["--no-pretrain", "--recipe", "original", "--model", "squeezenet1_1", "--size", "32", "--batch-size", "8"]
TINY += ["--threads", "1", "--epochs", "1"]
# how the pixels lie in the file when the camera writes this orientation
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def sideways(files: list[Path], out: Path) -> None:
    """PNG copies of ``files`` in out/upright, and in out/turned with half of them stored turned, tag written."""
    for number, file in enumerate(files):
        with Image.open(file) as image:
            upright, tag = image.convert("RGB"), Image.Exif()
        orientation = (6, 1, 8, 1, 3, 1, 5, 1, 2, 1, 4, 1, 7, 1)[number % 14]
        tag[0x0112] = orientation
        turned = upright.transpose(STORED[orientation]) if orientation > 1 else upright
        for name, picture, options in (("upright", upright, {}), ("turned", turned, {"exif": tag})):
            goal = out / name / file.parent.name / f"{file.stem}.png"
            goal.parent.mkdir(parents=True, exist_ok=True)
            picture.save(goal, compress_level=1, **options)


def job(name: str, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Cache, metrics, test and predictions of a run on folder/name, all in ``folder``."""
    monkeypatch.setenv("FINETUNE101_CACHE", str(folder / f"cache_{name}"))
    runs, data = ["--runs", str(folder / "runs")], str(folder / name)
    assert main(["train", "--exp", name, *words, "--data", data, *runs]) == 0
    assert main(["evaluate", name, *runs]) == 0
    run = folder / "runs" / name
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (cache,) = (folder / f"cache_{name}").glob("images_*")
    return {
        "pixels": np.load(cache).tobytes(),
        "metrics": [{k: v for k, v in r.items() if "seconds" not in k and k != "images_per_s"} for r in records],
        "split": json.loads((run / "split.json").read_text())["subsets"],
        "test": json.loads((run / "test.json").read_text())["top1"],
        "predictions": (run / "predictions.csv").read_text(),
    }


def predicted(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["predict", str(folder / "runs" / name), str(folder / name), "--csv"]) == 0
    return capsys.readouterr().out.replace(str(folder / name), "")


def same_job(
    files: list[Path], words: list[str], folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sideways(files, folder)
    upright, turned = (job(name, words, folder, patch) for name in ("upright", "turned"))
    assert upright == turned
    assert predicted(folder, "upright", capsys) == predicted(folder, "turned", capsys)


def test_photos_taken_sideways_train_test_and_predict_as_upright_ones(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same_job(sorted(tiny_data.glob("*/*.jpg")), TINY, tmp_path, monkeypatch, capsys)
    sheets = [tmp_path / name / "sheet.png" for name in ("upright", "turned")]
    for sheet in sheets:
        assert main(["data", "show", "--data", str(sheet.parent), "--out", str(sheet), "--per-class", "12"]) == 0
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
    for file in (tmp_path / "turned").glob("*/*.png"):
        assert thumbnail(file) == thumbnail(tmp_path / "upright" / file.relative_to(tmp_path / "turned"))


@pytest.mark.slow
@pytest.mark.caltech101
def test_photos_of_caltech101_taken_sideways(
    caltech101: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [p for name in ("accordion", "chair", "umbrella") for p in sorted((caltech101 / name).glob("*.jpg"))[:12]]
    same_job(files, TINY, tmp_path, monkeypatch, capsys)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture
def photos(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny data set, to be spoilt, with caches of its own."""
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_data, tmp_path / "photos"))


def test_every_command_on_a_folder_of_odd_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken EXIF, a cut AVIF, a bomb, a warning of Pillow: named, skipped or read."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 120), np.uint8)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 8, 2, 0, 0, 0))
    end = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    for number in range(8):  # as many as may all be tested
        (photos / "box" / f"exif{number}.png").write_bytes(head + chunk(b"eXIf", b"garbage!" * number) + end)
    warned = photos / "ball" / "image_0001.jpg"
    data, exif = warned.read_bytes(), b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x01\0"
    warned.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    Image.new("RGB", (60, 60), "navy").save(buffer := io.BytesIO(), "AVIF")
    (photos / "box" / "saved.jpg").write_bytes(buffer.getvalue()[:-20])
    wide = chunk(b"IHDR", struct.pack(">IIBBBBB", 178_000_000, 1, 1, 0, 0, 0, 0))
    flat = chunk(b"IDAT", zlib.compress(bytes(22_250_001), 9))
    (photos / "stripes" / "wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + wide + flat + chunk(b"IEND", b""))

    assert main(["data", "verify", "--data", str(photos)]) == 1
    said = capsys.readouterr()
    assert "box/saved.jpg" in said.out and "stripes/wide.png" in said.out and "2 file(s)" in said.out
    assert said.err.count("image_0001.jpg") == 1 and "Warning" not in said.err
    assert main(["train", "--exp", "odd", *TINY, "--data", str(photos)]) == 2
    assert "--skip-bad-images" in capsys.readouterr().err
    assert main(["train", "--exp", "odd", *TINY, "--data", str(photos), "--skip-bad-images"]) == 0
    for name in ("saved.jpg", "exif1.png"):  # spoilt after the training: a page is made without it
        (photos / "box" / name).write_bytes(b"no image")
    assert thumbnail(photos / "box" / "exif1.png") is None
    assert (thumbnail(photos / "box" / "exif2.png") or "").startswith("data:image/jpeg")


@pytest.mark.parametrize("variable", [None, ""])
def test_without_a_home_the_cache_is_somewhere_else(photos: Path, variable: str | None) -> None:
    """As a container runs it: no HOME, a user that passwd does not know."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "FINETUNE101_CACHE", "XDG_CACHE_HOME")}
    if variable is not None:
        environment["FINETUNE101_CACHE"] = variable
    code = (
        "import encodings.ascii, filelock, os, sys\n"
        "from pathlib import Path\n"
        "from finetune101.config import Preprocessing\n"
        "from finetune101.data.images import index_images\n"
        "from finetune101.data.cache import cache_dir, open_images\n"
        "from finetune101.standalone import _decoders\n"
        "_decoders()  # who is nobody may not read Python's own folder here\n"
        "os.getuid() or os.setuid(12345)\n"
        "shape = Preprocessing(size=8, cache_size=8, mean=(0,) * 3, std=(1,) * 3, interpolation='bilinear')\n"
        "images = open_images(index_images(Path(sys.argv[1])), shape)\n"
        "print(images.read(images.paths[:2]).shape, cache_dir())\n"
    )
    ours = [folder for folder in photos.parents if folder.name.startswith(("test_", "pytest-", "popen-"))]
    for folder in (photos, *ours, *photos.iterdir()):
        os.chmod(folder, 0o755)
    run = subprocess.run([sys.executable, "-c", code, str(photos)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shape, folder = run.stdout.splitlines()[-1].rsplit(" ", 1)
    assert shape == "(2, 8, 8, 3)"
    assert not Path(folder).exists() or os.getuid()  # a temporary one is gone with its process
