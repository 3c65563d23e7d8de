"""A network for tests of the server: it knows the brightest channel of a picture."""

from __future__ import annotations

import io
import threading
from typing import Any

from PIL import Image

from finetune101.config import Preprocessing
from finetune101.deploy.prediction import Prediction
from finetune101.serve.uploads import Limits

QUICK = Limits(megabytes=1, pictures=4, head=0.5, pause=0.3, upload=1, answer=5, linger=0.5)


class Colours:
    """A network that knows the brightest channel; ``pause`` holds it up, ``wrong`` makes it fail."""

    name = "/somewhere/runs/colours"
    classes = ("red", "green", "blue")
    preprocessing = Preprocessing(size=32, cache_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")

    def __init__(self) -> None:
        self.free, self.wrong, self.passes = threading.Event(), False, list[int]()
        self.free.set()

    def predict(self, images: list[Image.Image], top_k: int = 5) -> list[Prediction]:
        self.free.wait(10)
        if self.wrong:
            raise RuntimeError("the network is broken")
        self.passes.append(len(images))
        return [self._one(image, top_k) for image in images]

    def _one(self, image: Image.Image, top_k: int) -> Prediction:
        pixel = image.resize((1, 1)).getpixel((0, 0))
        total = sum(pixel) or 1
        ranked = sorted(zip(self.classes, (value / total for value in pixel), strict=True), key=lambda one: -one[1])
        white = min(pixel) > 200
        return Prediction(tuple(ranked[:top_k]), image, white, 2.0 if white else 0.5)


def picture(colour: Any = (200, 20, 20), kind: str = "png", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()
