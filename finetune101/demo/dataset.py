"""A small data set that needs no download: pictograms of a font as pictures of objects, one folder per class.

The font is DejaVu Sans, which comes with matplotlib. Each pictogram is drawn through a random affine map in random
colours, lit, and set before a cluttered background, partly hidden. Colour and texture say nothing about the class; only
shape does.
"""

from __future__ import annotations

import colorsys
import functools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from finetune101.errors import Refused

PICTOGRAMS = {
    "airplane": "✈", "anchor": "⚓", "cat": "🐱😸😹😺😻😼😽", "cup": "☕", "flower": "✿❀❁", "knight": "♘♞",
    "pencil": "✎✏✐", "scissors": "✁✂✃✄", "skull": "☠", "snowman": "☃", "telephone": "☎☏", "umbrella": "☂☔",
}  # fmt: skip
"""Class -> the characters that show it."""
_CLUTTER = "■●▲◆★▬◖✚➤☾ABCDEFGHJKLMNPRSTUVWXYZ2345678?&§"

Size = tuple[int, int]  # width, height
Colour = tuple[int, int, int]


@functools.cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(file, pixels, layout_engine=ImageFont.Layout.BASIC)


def _colour(rng: np.random.Generator, darkest: float = 0.35, brightest: float = 1.0) -> Colour:
    """A random colour whose brightest channel lies between the two shares of white."""
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.95), rng.uniform(darkest, brightest))
    return int(r * 255), int(g * 255), int(b * 255)


def _noise(size: Size, rng: np.random.Generator) -> np.ndarray:
    """Noise that is smooth at five scales, around 0: float32 (height, width)."""
    total = np.zeros((size[1], size[0]), np.float32)
    for cells in (3, 6, 12, 24, 48):
        grid = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        total += np.asarray(grid.resize(size, Image.Resampling.BICUBIC)) * (3 / cells) ** 0.4
    return total


def _grid(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, 0 to 1 along the longer side: float32 (height, width) each."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32) / max(size)
    return x, y


def _rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _clutter(picture: Image.Image, rng: np.random.Generator, count: int, largest: float) -> None:
    """Draws ``count`` letters and plain shapes, turned, at most ``largest`` of the picture's shorter side high."""
    for _ in range(count):
        text, pixels = _CLUTTER[int(rng.integers(len(_CLUTTER)))], round(rng.uniform(0.08, largest) * min(picture.size))
        mask = Image.new("L", (2 * pixels, 2 * pixels))
        ImageDraw.Draw(mask).text(
            (pixels, pixels), text, 255, _font(pixels), anchor="mm", stroke_width=int(rng.integers(3))
        )
        x, y = (int(rng.integers(side)) - pixels for side in picture.size)
        picture.paste(_colour(rng), (x, y), mask.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR))


def clutter_picture(size: Size, rng: np.random.Generator) -> Image.Image:
    """Two colours mixed by stripes, a gradient, a chessboard or noise alone, with clutter on top."""
    first, second = np.array(_colour(rng)), np.array(_colour(rng))
    x, y = _grid(size)
    a, waves, n = rng.uniform(0, 6.3), rng.uniform(15, 90), int(rng.integers(4, 12))
    along = x * math.cos(a) + y * math.sin(a)
    patterns = (0.5 + 0.5 * np.sin(along * waves), along, (np.floor(x * n) + np.floor(y * n)) % 2, 0.5 + 0 * x)
    mix = patterns[int(rng.integers(4))] + rng.uniform(0.1, 0.4) * _noise(size, rng)
    mix = np.clip(mix, 0, 1)[..., None]
    scene = Image.fromarray((first * mix + second * (1 - mix)).astype(np.uint8))
    _clutter(scene, rng, int(rng.integers(2, 8)), 0.4)
    return scene.filter(ImageFilter.BoxBlur(float(rng.uniform(0, 2.5))))


def _object(name: str, size: Size, rng: np.random.Generator) -> Image.Image:
    """The object alone: turned, stretched, sheared, mirrored and moved, on a transparent layer (RGBA)."""
    texts, pixels = PICTOGRAMS[name], 192
    tile = Image.new("RGBA", (2 * pixels, 2 * pixels))
    ImageDraw.Draw(tile).text(
        (pixels, pixels), texts[int(rng.integers(len(texts)))], _colour(rng, 0, 0.4), _font(pixels), anchor="mm",
        stroke_width=int(rng.integers(3, 13)), stroke_fill=_colour(rng, 0.8),
    )  # fmt: skip
    tile = tile.crop(tile.getbbox())
    mirror = rng.choice([-1, 1])
    stretch = np.array([[mirror * rng.uniform(0.75, 1.15), rng.normal(0, 0.12)], [0, rng.uniform(0.8, 1.1)]])
    # the square from -1 to 1, in which the tile fits, to pixels
    matrix = _rotation(math.radians(rng.normal(0, 12))) @ stretch * min(size) * rng.uniform(0.34, 0.48)
    reach = np.abs(matrix).sum(1)  # half width and height of the mapped square
    centre = np.array(size) / 2 + rng.uniform(-1, 1, 2) * np.maximum(0, np.array(size) / 2 - 0.75 * reach)
    inverse = np.linalg.inv(matrix) * max(tile.size) / 2  # Pillow asks for the map from the picture to the tile
    offset = np.array(tile.size) / 2 - inverse @ centre
    coefficients = np.column_stack([inverse, offset]).ravel().tolist()
    return tile.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def _lit(layer: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The layer's colours (RGB) under light from one side, with a grain and, at times, stripes."""
    x, y = _grid(layer.size)
    a = rng.uniform(0, 6.3)
    light = 1 + rng.uniform(0, 0.6) * ((x - 0.5) * math.cos(a) + (y - 0.5) * math.sin(a))
    light += rng.uniform(0, 0.18) * _noise(layer.size, rng)
    if rng.random() < 0.3:
        light += 0.15 * np.sin((x * math.sin(a) + y * math.cos(a)) * rng.uniform(60, 160))
    return Image.fromarray(np.clip(np.asarray(layer.convert("RGB")) * light[..., None], 0, 255).astype(np.uint8))


def picture(name: str, rng: np.random.Generator) -> Image.Image:
    """One RGB picture of class ``name``, 160 to 240 pixels wide and high."""
    return picture_and_mask(name, rng)[0]


def picture_and_mask(name: str, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """``picture``, and where its object is: bool (height, width), with the parts that something in front hides."""
    size = (int(rng.integers(160, 241)), int(rng.integers(160, 241)))
    layer = _object(name, size, rng)
    alpha = layer.getchannel("A")
    scene = clutter_picture(size, rng)
    shadow = alpha.filter(ImageFilter.BoxBlur(5)).point(lambda v: v * 0.5)
    scene.paste((0, 0, 0), (int(rng.integers(-6, 7)), int(rng.integers(2, 8))), shadow)
    scene.paste(_lit(layer, rng), (0, 0), alpha)
    _clutter(scene, rng, int(rng.integers(0, 4)), 0.25)  # in front: hides parts
    values = np.asarray(scene) * rng.uniform(0.7, 1.15) + rng.normal(0, 6, (size[1], size[0], 1))
    scene = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    scene = scene.convert("L").convert("RGB") if rng.random() < 0.05 else scene
    return scene, np.asarray(alpha) > 127


def draw(target: Path, classes: int = 12, images_per_class: int = 45, seed: int = 0) -> Path:
    """Draw the data set: ``target``/CLASS/image_0001.jpg and so on, the same bytes for the same arguments.

    Args:
        target: folder to make or add to; pictures of the same name are replaced.
        classes: how many classes, 2 to 12.
        images_per_class: pictures in each class folder, at least 1.
        seed: picks all positions, colours, ... (0 or more).

    Raises:
        Refused: a count out of range.
    """
    if not 2 <= classes <= len(PICTOGRAMS) or images_per_class < 1 or seed < 0:
        raise Refused(
            f"{classes} classes of {images_per_class} images with seed {seed} cannot be drawn; "
            f"give 2 to {len(PICTOGRAMS)} classes, at least 1 image and a seed from 0"
        )
    for c, name in enumerate(list(PICTOGRAMS)[:classes]):
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(images_per_class):
            rng = np.random.default_rng([seed, c, i])
            picture(name, rng).save(folder / f"image_{i + 1:04d}.jpg", quality=int(rng.integers(70, 93)))
    return target
