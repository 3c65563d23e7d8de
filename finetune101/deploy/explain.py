"""Where a network looks: a class activation map of each class, laid over the picture, and the nearest training images.

The map of a layer is gradient x activation, summed over channels, negative sums left out (HiResCAM: R. Draelos and
L. Carin, 2020); at the last layer of a network that ends in a mean over places and a linear layer, that is Grad-CAM
(Selvaraju et al., 2017). It says which region speaks for the class. A CNN has a second map, of a layer with an eighth
of the image's size, which says where in the region; the geometric mean of both is shown (maps of several layers are
joined as well by LayerCAM: Jiang et al., 2021). Gradients come from captum, in fp32, of the network as it was trained.
"""

from __future__ import annotations

import copy
import difflib
import io
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from finetune101.data.sheet import PAPER, caption
from finetune101.deploy.sorting import is_device
from finetune101.errors import Refused, escaped
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.models.map_layers import as_maps, map_layers

if TYPE_CHECKING:
    from finetune101.deploy.neighbours import Neighbour

SIDE = 320  # pixels of the longer side of a picture
SMALL = 128  # and of a training image
GAP, LINE = 10, 18
DIM, STRENGTH = 0.75, 0.85  # brightness of the grey picture; opacity of the colour where the map is 1
WARM, HOT = (230, 90, 0), (255, 225, 40)
BAR = 60  # pixels, the width of the scale of colours
LEGEND = ("colour: speaks for the class, yellow most; grey: not", "number before the class: its probability")
NEAR_LEGEND = "below: nearest training images; distance (0: equal), class"


class Explainer:
    """Class activation maps of a trained network. It has a copy of the network, and may be used by several threads."""

    def __init__(self, network: TrainedNetwork) -> None:
        self._model = copy.deepcopy(network.model).float().eval()
        self._parts = map_layers(network.architecture, self._model, network.preprocessing.size)
        self._alone = threading.Lock()  # captum's hooks see every pass of the model

    def maps(self, x: Tensor, classes: Sequence[int]) -> NDArray[np.float32]:
        """Where one image speaks for each of ``classes`` (their numbers): (K, h, w) from 0 to 1, 1 where most.

        x: (1, 3, size, size) on the network's device. The map covers the whole image; it is 0 everywhere for a class
        that no place speaks for. For networks side by side it is the sum of their maps.
        """
        from captum.attr import LayerGradientXActivation

        layers = [layer for part in self._parts for layer in part]
        modules = [self._model.get_submodule(layer.name) for layer in layers]
        batch = x.float().expand(len(classes), -1, -1, -1).contiguous()
        with self._alone, torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            values = LayerGradientXActivation(self._model, modules).attribute(
                batch, target=torch.tensor(classes, device=x.device)
            )
        single = [as_maps(one.detach(), layer).sum(1) for one, layer in zip(values, layers, strict=True)]
        side = max(one.shape[2] for one in single)
        maps = iter(F.interpolate(scaled(one)[:, None], (side, side), mode="bilinear")[:, 0] for one in single)
        whole = torch.zeros(len(classes), side, side, device=x.device)
        for part in self._parts:
            whole += scaled(torch.stack([next(maps) for _ in part]).prod(0) ** (1 / len(part)))
        return scaled(whole).cpu().numpy()


def scaled(maps: Tensor) -> Tensor:
    """Maps (K, h, w) without what is below 0, each divided by its largest."""
    maps = maps.clamp_min(0)
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)


def class_numbers(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The numbers of the classes called ``names``. Raises Refused naming the nearest class to one that is not there."""
    lower = {name.lower(): name for name in classes}
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0)
            raise Refused(f"there is no class {escaped(name)!r}; did you mean {escaped(lower[near[0]])}?")
    return [list(classes).index(name) for name in names]


@dataclass(frozen=True)
class Explanation:
    """Where a network looked for some classes of a picture, and which training images are nearest to it."""

    image: Image.Image
    """The picture, upright, its longer side at most 320 pixels."""
    classes: tuple[tuple[str, float], ...]
    """Class and probability from 0 to 1 of each map."""
    maps: NDArray[np.float32]
    """(K, h, w) from 0 to 1; each covers the whole picture."""
    neighbours: tuple[Neighbour, ...] = ()
    """The nearest training images, nearest first."""

    def overlay(self, number: int = 0) -> Image.Image:
        """The picture under the map of the class ``number`` of ``classes``: yellow where it speaks most for it."""
        return overlay(self.image, self.maps[number])

    def picture(self) -> Image.Image:
        """The picture, the overlay of each class beside it, below them a legend and the nearest training images."""
        cells = [(self.image, "the picture")]
        for number, (name, probability) in enumerate(self.classes):
            nowhere = "" if self.maps[number].any() else ", no part speaks for it"
            cells.append((self.overlay(number), f"{100 * probability:.1f} % {name}{nowhere}"))
        near = [(one.thumbnail(SMALL), f"{one.distance:.2f} {one.label}") for one in self.neighbours]
        rows = [_row(cells, max(160, self.image.width))]
        rows.append(_legend([*LEGEND, NEAR_LEGEND] if near else LEGEND, rows[0].width))
        if near:
            rows.append(_row([(picture, words) for picture, words in near if picture], SMALL))
        sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height
        return sheet

    def __str__(self) -> str:
        """Lines for a terminal: the classes with their probability, then the nearest training images; escaped."""
        lines = [f"  {100 * probability:5.1f} %  {escaped(name)}" for name, probability in self.classes]
        near = [f"  {one.distance:7.3f}  {escaped(one.label)}  {escaped(str(one.file))}" for one in self.neighbours]
        return "\n".join(lines + ["  nearest training images (distance, class, file):"] * bool(near) + near)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.picture().save(file, "PNG")
        return file.getvalue()


def overlay(image: Image.Image, values: NDArray[np.float32]) -> Image.Image:
    """``image`` (RGB) in grey, coloured from orange to yellow where the map ``values`` (h, w) is above 0, up to 1."""
    whole = np.clip(np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.BICUBIC)), 0, 1)[..., None]
    grey = np.asarray(image.convert("L").convert("RGB")) * DIM
    colour = np.array(WARM) * (1 - whole) + np.array(HOT) * whole
    return Image.fromarray((grey * (1 - STRENGTH * whole) + colour * STRENGTH * whole).astype(np.uint8))


def picture_names(files: Sequence[str], out: Path, *, overwrite: bool = False) -> dict[str, Path]:
    """For each image of ``files`` the picture to write into ``out``: its own name, made safe, as a PNG; no name twice.

    Raises Refused where one of them is there already, unless ``overwrite``.
    """
    names: dict[str, Path] = {}
    taken: set[str] = set()  # some file systems do not tell A from a
    for file in files:
        stem = re.sub(r"[^\w.+-]+", "_", Path(escaped(file)).stem).strip("._")[:80] or "image"
        if is_device(stem):
            stem = f"image_{stem}"
        number, name = 1, stem
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        names[file] = out / f"{name}.png"
    if not overwrite and (present := next((name for name in names.values() if name.exists()), None)):
        raise Refused(f"{escaped(str(present))} is there; give another --out, or --overwrite")
    return names


def _legend(lines: Sequence[str], width: int) -> Image.Image:
    """``lines`` that say what colours and numbers mean, the first beside a scale of the colours."""
    scale = np.linspace(0, 1, BAR, dtype=np.float32)[None].repeat(LINE // 2, 0)
    row = Image.new("RGB", (width, len(lines) * LINE), PAPER)
    row.paste(overlay(Image.new("RGB", (BAR, LINE // 2), (128, 128, 128)), scale), (GAP, LINE // 4))
    draw = ImageDraw.Draw(row)
    for number, line in enumerate(lines):
        left = 2 * GAP + BAR if number == 0 else GAP
        caption(draw, left, number * LINE, line, width - left - GAP)
    return row


def _row(cells: Sequence[tuple[Image.Image, str]], width: int) -> Image.Image:
    """Pictures side by side in columns of ``width`` pixels, each with its words below."""
    height = max((picture.height for picture, _ in cells), default=0)
    row = Image.new("RGB", (GAP + len(cells) * (width + GAP), GAP + height + LINE + GAP // 2), PAPER)
    draw = ImageDraw.Draw(row)
    for number, (picture, words) in enumerate(cells):
        left = GAP + number * (width + GAP)
        row.paste(picture, (left, GAP))
        caption(draw, left, GAP + height + 2, words, width)
    return row
