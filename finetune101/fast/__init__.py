"""Everything that makes a CPU quick, behind one door: see README.md beside this file."""

from finetune101.fast.depthwise import fast_layers, tune_allocator
from finetune101.fast.inference import fused_copy
from finetune101.fast.kernels import compiled

__all__ = ["compiled", "fast_layers", "fused_copy", "tune_allocator"]
