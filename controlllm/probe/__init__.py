"""A look inside a tuned model beside its base: where it moved, by how much, and what it looks at."""

from controlllm.probe.stage import probe

__all__ = ["probe"]
