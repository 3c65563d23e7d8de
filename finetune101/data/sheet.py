"""Draw a contact sheet: a few images of each class, and what augmentation makes of some."""

from __future__ import annotations

import functools
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from finetune101.config import SHEET_AUGMENT, AugmentConfig, check_bounds
from finetune101.data.augment import distort, draw_distortions
from finetune101.data.batches import augment, draw_boxes
from finetune101.data.decode import decode
from finetune101.data.images import class_of, index_images
from finetune101.errors import Refused, escaped
from finetune101.files import atomic

SIDE = 56  # pixels of an image's side among the classes
LARGE = 96  # and in the rows of augmented images
GAP, LINE, MARGIN, COLUMNS = 10, 18, 16, 5
AUGMENTED = 5  # images that are shown augmented
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
MOST_PIXELS = 100_000_000  # of the whole sheet
MOST_SIDE = 65_000  # of a JPEG
FILL = (124, 116, 104)  # ImageNet's mean, with which training paints over
INK, PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(
    root: Path, out: Path, config: AugmentConfig = SHEET_AUGMENT, per_class: int = 4, seed: int = 0
) -> Path:
    """Draws ``per_class`` random images of each class with its name, then a few images augmented by ``config``.

    Args:
        root: the data set, as ``find_data`` returned it.
        out: picture to write, .png or .jpg (about half of the size).
        seed: picks images and augmentation; the same seed draws the same sheet.

    Raises:
        Refused: another suffix, an unreadable image, ``per_class`` below 1 or too many, augmentation of whole batches
            or epochs, which no single image shows, or what ``index_images`` refuses.
    """
    if out.suffix.lower() not in FORMATS:
        raise Refused(f"{out} is neither .png nor .jpg; give the picture a name such as contact_sheet.jpg")
    if per_class < 1:
        raise Refused(f"{per_class} images per class cannot be shown; give at least 1")
    check_bounds(config)
    for flag, is_set in (("--mix", config.mix > 0), ("--train-sizes", bool(config.train_sizes))):
        if is_set:
            raise Refused(f"{flag} changes whole batches or epochs, which a contact sheet cannot show; leave it out")
    index, rng = index_images(root), random.Random(seed)
    classes: dict[str, list[str]] = defaultdict(list)
    for path in index.paths:
        classes[class_of(path)].append(path)
    chosen = {name: rng.sample(classes[name], min(per_class, len(classes[name]))) for name in index.classes}
    names = list(index.classes)[:: max(1, len(index.classes) // AUGMENTED)][:AUGMENTED]

    width, height, columns = _geometry(len(chosen), max(len(paths) for paths in chosen.values()))
    total = height + 2 * LINE + len(names) * (LARGE + GAP)
    if width * total > MOST_PIXELS or max(width, total) > MOST_SIDE:
        way = f"give a smaller --per-class, now {per_class}" if per_class > 1 else "show a folder with fewer classes"
        raise Refused(f"the picture would have {width} x {total} pixels; {way}")
    sheet = Image.new("RGB", (width, total), PAPER)
    _draw_classes(sheet, root, chosen, columns)
    _draw_augmented(sheet, [root / chosen[name][0] for name in names], config, seed, height)
    if FORMATS[out.suffix.lower()] == "PNG":
        sheet = sheet.quantize(256)  # a quarter of the file
    with atomic(out) as part:
        sheet.save(part, FORMATS[out.suffix.lower()], quality=72, optimize=True)
    return out


def _geometry(classes: int, per_class: int) -> tuple[int, int, int]:
    """Width of the sheet, height of its part with the classes, and columns of classes."""
    cell = per_class * SIDE + GAP
    tall = math.isqrt(classes * (LINE + SIDE + GAP) // (10 * cell))  # so many, and it is ten times as high as wide
    columns = min(classes, max(1, COLUMNS * 3 // per_class, tall))
    rows = -(-classes // columns)
    width = max(2 * MARGIN + columns * cell, 2 * MARGIN + 6 * (LARGE + GAP))
    return width, 2 * MARGIN + rows * (LINE + SIDE + GAP), columns


@functools.cache
def _wide_font() -> Any:
    """A font of this machine that has Chinese characters, else Pillow's own."""
    from matplotlib import font_manager

    wanted = ("Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei")
    name = next((name for name in wanted if name in font_manager.get_font_names()), None)
    return ImageFont.truetype(font_manager.findfont(name), 12) if name else ImageFont.load_default(12)


def caption(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, room: int) -> None:
    """Writes ``text`` in one line, shortened to ``room`` pixels."""
    text = escaped(text[:1000])
    font = ImageFont.load_default(12) if text.isascii() else _wide_font()
    while draw.textlength(text, font) > room and len(text) > 2:
        text = text.rstrip("…")[:-1] + "…"
    draw.text((x, y), text, INK, font)


def _draw_classes(sheet: Image.Image, root: Path, chosen: dict[str, list[str]], columns: int) -> None:
    draw, per_class = ImageDraw.Draw(sheet), max(len(paths) for paths in chosen.values())
    room = per_class * SIDE
    for k, (name, paths) in enumerate(chosen.items()):
        x, y = MARGIN + k % columns * (room + GAP), MARGIN + k // columns * (LINE + SIDE + GAP)
        caption(draw, x, y, name, room)
        for i, path in enumerate(paths):
            sheet.paste(Image.fromarray(decode(root / path, SIDE, "bicubic")), (x + i * SIDE, y + LINE))


def _draw_augmented(sheet: Image.Image, files: Sequence[Path], config: AugmentConfig, seed: int, top: int) -> None:
    """One row per image below ``top``: the image itself, then as many random versions of it as there is room."""
    draw = ImageDraw.Draw(sheet)
    title = f"left: the image; right: training versions with --crop-scale {config.crop_scale:g}"
    title += " --flip" if config.flip else " --no-flip"
    title += f" --policy {config.policy}" * (config.policy != "none") + f" --erasing {config.erasing:g}" * (
        config.erasing > 0
    )
    caption(draw, MARGIN, top, title, sheet.width - 2 * MARGIN)
    generator = torch.Generator().manual_seed(seed)
    versions = (sheet.width - 2 * MARGIN) // (LARGE + GAP) - 1
    for row, file in enumerate(files):
        image: NDArray[np.uint8] = decode(file, LARGE, "bicubic")
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).expand(versions, 3, LARGE, LARGE)
        boxes, mirrored = draw_boxes(versions, LARGE, config, generator)
        drawn = draw_distortions(versions, LARGE, config, generator)
        changed = distort(augment(pixels, boxes, mirrored, LARGE), drawn, FILL).permute(0, 2, 3, 1).numpy()
        for column, version in enumerate([image, *changed]):
            spot = (MARGIN + column * (LARGE + GAP), top + LINE + row * (LARGE + GAP))
            sheet.paste(Image.fromarray(np.ascontiguousarray(version)), spot)
