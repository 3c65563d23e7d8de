"""The whole job on drawn images: about two minutes, nothing to download."""
