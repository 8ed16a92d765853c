"""Stage 4: one Hugging Face directory, of a run or of another trainer's checkpoint."""

from controlllm.consolidate.stage import consolidate

__all__ = ["consolidate"]
