"""Reads finished run directories: pictures and comparisons. Nothing in training calls for its results."""

import contextlib
import os

_backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which may be missing here: matplotlib would not start
import matplotlib  # noqa: E402

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend
