"""The method: frozen blocks with trainable twins, blended and held together (arXiv 2501.10979)."""
