"""Stage 5: what a model can do, task by task, with lm-evaluation-harness."""

from controlllm.benchmark.stage import benchmark

__all__ = ["benchmark"]
