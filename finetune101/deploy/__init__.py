"""A finished run at work on new images."""
