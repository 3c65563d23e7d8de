"""The whole job on drawn images: about a minute, nothing to download."""
