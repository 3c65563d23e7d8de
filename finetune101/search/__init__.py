"""Hyper-parameter search: every point is a run, chosen on validation."""
