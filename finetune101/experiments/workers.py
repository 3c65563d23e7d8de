"""Where many runs are trained: processes of this machine, or the Ray cluster that the options name."""

from __future__ import annotations

from finetune101.errors import Refused
from finetune101.experiments.cluster import RayWorkers
from finetune101.experiments.runner import LocalWorkers, Workers
from finetune101.experiments.settings import WorkerOptions


def check_workers(options: WorkerOptions) -> None:
    """Raises Refused for ``options`` that cannot be."""
    if options.jobs is not None and options.jobs < 1:
        raise Refused(f"--jobs is {options.jobs}; give at least 1")
    if options.gpus_per_run and options.cluster is None:
        raise Refused("--gpus-per-run is for --cluster; on one machine --jobs runs share the GPU")


def make_workers(options: WorkerOptions) -> Workers:
    """Processes of this machine, or tasks of the Ray cluster that ``options`` name.

    Raises Refused for options that cannot be, and a cluster that cannot be reached.
    """
    check_workers(options)
    if options.cluster is None:
        return LocalWorkers(options.jobs or 1)
    return RayWorkers(options.cluster, jobs=options.jobs, gpus_per_run=options.gpus_per_run)
