"""From a trained network to numbers: forward passes, metrics and the scoring of a finished run."""
