"""Grid search: python search.py --exp NAME --epochs 10 [--no-pretrain]; interrupted, it goes on where it stopped."""

import sys

from finetune101.original import search

hyper_param_opts: dict[str, list[float]] = {
    "batch_size": [256, 128, 64],
    "lr": [0.01, 0.001],
    "step_size": [10, 30],
    "gamma": [0.5, 0.1],
    "weight_decay": [1e-4, 1e-5, 0.0],
}

if __name__ == "__main__":
    sys.exit(search(hyper_param_opts))
