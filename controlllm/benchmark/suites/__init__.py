"""Suites: known benchmarks by name, each task as lm-evaluation-harness has it, or as a task file here says."""

from controlllm.benchmark.suites.listed import suite_names, suite_tasks, task_names
from controlllm.benchmark.suites.loading import load

__all__ = ["load", "suite_names", "suite_tasks", "task_names"]
