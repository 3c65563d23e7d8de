"""The data of the original project: from utils import get_dataloaders."""

from finetune101.original import get_dataloaders

__all__ = ["get_dataloaders"]
