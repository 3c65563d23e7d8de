"""Networks: which there are, and how one is built for a number of classes."""
