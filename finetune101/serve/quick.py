"""A network of the server that answers by ONNX Runtime, and loads PyTorch only where somebody asks where it looked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image as Pillow

from finetune101.config import Preprocessing
from finetune101.deploy.choose import Chosen
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.deploy.prediction import Prediction
from finetune101.errors import Refused

if TYPE_CHECKING:
    from finetune101.deploy.explain import Explanation
    from finetune101.deploy.network import Network


class QuickNetwork:
    """``exported`` for the classes of pictures, the network of ``chosen`` for where it looked."""

    def __init__(self, exported: OnnxNetwork, chosen: Chosen) -> None:
        self.exported, self._chosen = exported, chosen

    @property
    def name(self) -> str:
        """The name of the network."""
        return self.exported.name

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns an image into its input."""
        return self.exported.preprocessing

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.exported.classes

    def predict(self, images: Sequence[Pillow.Image], top_k: int = 5) -> Prediction | list[Prediction]:
        """As ``OnnxNetwork.predict``."""
        return self.exported.predict(images, top_k)

    @functools.cached_property
    def network(self) -> Network:
        """The same network in PyTorch. Raises Refused where the run has changed meanwhile."""
        from finetune101.deploy.network import Network

        network = Network(self._chosen.network, self._chosen.run)
        if network.trained.checkpoint_hash != self.exported.info.weights:
            raise Refused(f"{self.name} has other weights than when the server began; start the server again")
        return network

    def explain(self, image: Pillow.Image) -> Explanation:
        """As ``Network.explain``."""
        return self.network.explain(image)

    def find_training_images(self, data: str | None) -> None:
        """As ``Network.find_training_images``."""
        self.network.find_training_images(data)
