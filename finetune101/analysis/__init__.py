"""Reads finished run directories: pictures and comparisons. Nothing in training calls for its results."""
