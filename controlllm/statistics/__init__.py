"""Two models on the same items: the paired difference, its 95 % interval, and what may be said about it."""

from controlllm.statistics.change import Change, compare_hits, compare_losses, compare_scores_of_items
from controlllm.statistics.interval import bootstrap, mean_interval, ratio_error, tango
from controlllm.statistics.pairs import read_scores
from controlllm.statistics.scores import compare_scores
from controlllm.statistics.significance import flip_test, holm, mcnemar
from controlllm.statistics.verdict import ALPHA, MIN_ITEMS, Verdict, decide, judge
from controlllm.statistics.words import (
    MEASURES,
    Metric,
    format_items,
    format_p,
    format_range,
    format_relative,
    format_signed,
    format_value,
)

__all__ = [
    "ALPHA",
    "MEASURES",
    "MIN_ITEMS",
    "Change",
    "Metric",
    "Verdict",
    "bootstrap",
    "compare_hits",
    "compare_losses",
    "compare_scores",
    "compare_scores_of_items",
    "decide",
    "flip_test",
    "format_items",
    "format_p",
    "format_range",
    "format_relative",
    "format_signed",
    "format_value",
    "holm",
    "judge",
    "mcnemar",
    "mean_interval",
    "ratio_error",
    "read_scores",
    "tango",
]
