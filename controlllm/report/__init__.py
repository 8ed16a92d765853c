"""The report stage: one HTML page of what was learned and what was forgotten, and its numbers as summary.json."""

from controlllm.report.build import StageTime, build_report
from controlllm.report.terminal import print_summary

__all__ = ["StageTime", "build_report", "print_summary"]
