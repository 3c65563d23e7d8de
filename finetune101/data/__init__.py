"""Images: find, download, check, draw, split, decode, batch."""
