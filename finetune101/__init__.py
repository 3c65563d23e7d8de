"""Fine-tune ImageNet networks on Caltech-101, or any folder of images, and compare with training from scratch."""

__version__ = "0.1.0"
