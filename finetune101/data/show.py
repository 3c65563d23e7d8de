"""A contact sheet: what the classes look like, and what augmentation makes of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from finetune101.config import AugmentConfig
from finetune101.data.batches import augment
from finetune101.data.cache import Pixels, decode
from finetune101.data.dataset import Index, class_of
from finetune101.runs import atomic

TILE, GAP, TEXT = 72, 4, 15  # pixels
COLUMNS = 4  # classes side by side
VARIANTS = 8


def contact_sheet(index: Index, out: Path, config: AugmentConfig, *, per_class: int = 4, seed: int = 0) -> Path:
    """Draws ``per_class`` random images of every class of ``index``, and augmented ones below, as a picture at ``out``.

    Raises ValueError when an image cannot be read, ``out`` is no picture's name or cannot be written.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{out} does not end in .png or .jpg; give --out such a name")
    chosen = _sample(index, per_class, seed)
    blocks = [_block(name, [decode(index.root / p, TILE, "bilinear") for p in paths]) for name, paths in chosen.items()]
    first = [index.root / paths[0] for paths in list(chosen.values())[:: max(1, len(chosen) // 6)][:6]]
    sheet = _stack([_grid(blocks), *_augmented(first, config, seed)])
    with atomic(out) as part:
        kind = "PNG" if out.suffix.lower() == ".png" else "JPEG"
        sheet.quantize(128).save(part, kind) if kind == "PNG" else sheet.save(part, kind, quality=85)
    return out


def _sample(index: Index, per_class: int, seed: int) -> dict[str, list[str]]:
    rng = np.random.default_rng(seed)
    classes: dict[str, list[str]] = {name: [] for name in index.classes}
    for path in index.paths:
        classes[class_of(path)].append(path)
    return {name: [paths[i] for i in rng.permutation(len(paths))[:per_class]] for name, paths in classes.items()}


def _augmented(files: Sequence[Path], config: AugmentConfig, seed: int) -> list[Image.Image]:
    """For each file a row: the image as the network sees it, then what augmentation makes of it."""
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for file in files:
        pixels = decode(file, 2 * TILE, "bilinear")
        copies = torch.from_numpy(pixels.copy()).permute(2, 0, 1).expand(VARIANTS, -1, -1, -1)
        variants = augment(copies, config, 2 * TILE, generator).permute(0, 2, 3, 1).numpy()
        rows.append(_block(f"{file.parent.name}: as it is, then augmented", [pixels, *variants]))
    return rows


def _block(title: str, tiles: Sequence[Pixels]) -> Image.Image:
    """Images side by side below their title."""
    side = tiles[0].shape[0]
    block = Image.new("RGB", (len(tiles) * (side + GAP) + GAP, side + TEXT + GAP), "white")
    ImageDraw.Draw(block).text((1, 1), title, fill="black", font=ImageFont.load_default(12))
    for i, tile in enumerate(tiles):
        block.paste(Image.fromarray(tile), (i * (side + GAP), TEXT))
    return block


def _grid(blocks: Sequence[Image.Image]) -> Image.Image:
    width, height = max(b.width for b in blocks), blocks[0].height
    rows = -(-len(blocks) // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * (width + 2 * GAP), rows * (height + GAP)), "white")
    for i, block in enumerate(blocks):  # down the columns, as one reads a list
        grid.paste(block, (i // rows * (width + 2 * GAP), i % rows * (height + GAP)))
    return grid


def _stack(parts: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(p.width for p in parts) + 2 * GAP, sum(p.height + GAP for p in parts) + GAP), "white")
    top = GAP
    for part in parts:
        sheet.paste(part, (GAP, top))
        top += part.height + GAP
    return sheet
