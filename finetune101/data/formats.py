"""Which files are images, by their names and by their first bytes; imports nothing."""

from __future__ import annotations

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".heic",
    ".heif",
)  # fmt: skip
"""Endings of the names of image files, in lower case."""
OTHERS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "GIF", "TIFF")
"""Pillow's decoders that may read a file, whatever its name, besides NEEDS. PostScript is not among them."""
NEEDS = {
    "AVIF": "AVIF needs a newer decoder: pip install --upgrade pillow",
    "HEIF": "HEIC needs a decoder: pip install 'finetune101[heif]'",
}
"""Decoders that may be missing, and what gets them."""
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def formats_of(head: bytes) -> tuple[str, ...]:
    """The decoders that may see a file which begins with ``head`` (64 bytes)."""
    if head[4:8] != b"ftyp":
        return OTHERS
    end = min(len(head), int.from_bytes(head[:4]))
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return ("AVIF",)
    return ("HEIF",) if brands & _HEIF else OTHERS  # a film is no image
