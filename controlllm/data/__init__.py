"""From rows to packed token rows."""
