"""How often the verdicts on forgetting are wrong, and how large a fall they find: simulated, as in docs/statistics.md.

python bench/forgetting_power.py [--comparisons 2000]

A/A: the same model measured twice with noise. Every item has a chance of its own to be answered right (Beta(1.2, 0.8):
many are nearly sure), and both measurements toss it independently, which is more noise than greedy answers have; of a
loss every item has its own difference with mean 0. An alarm is any `learned` or `forgot`, of a task, a suite or all.
Falls: each item flips with fixed chances, to wrong and to right.
"""

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlllm.statistics import ALPHA, bootstrap, decide, mcnemar, tango
from controlllm.statistics.pairs import Pairs
from controlllm.statistics.scores import compare_metric, judge_all

FAMILIES: dict[str, dict[str, int]] = {  # hits by the number of items of each task; losses too
    "1 task of 1,000": {"hits": 1, "items": 1000, "losses": 0},
    "3 tasks of 100": {"hits": 3, "items": 100, "losses": 0},
    "6 tasks of 300, 2 losses": {"hits": 6, "items": 300, "losses": 2},
    "12 tasks of 1,000": {"hits": 12, "items": 1000, "losses": 0},
}
FALLS = [  # items, wrong afterwards, right afterwards, tests in the family
    (1000, 0.075, 0.025, 1), (1000, 0.10, 0.05, 1), (1000, 0.125, 0.075, 1), (1000, 0.15, 0.10, 1),
    (1000, 0.0875, 0.0375, 10), (1000, 0.10, 0.05, 10), (1000, 0.05, 0.05, 1),
    (300, 0.10, 0.05, 1), (3000, 0.10, 0.08, 1),
]  # fmt: skip
SHARES = [  # items, gained, lost
    (12, 0.05, 0.05), (12, 0.3, 0.1), (30, 0.01, 0.03), (30, 0.0, 0.05), (50, 0.2, 0.2), (100, 0.01, 0.01),
    (100, 0.0, 0.02), (100, 0.4, 0.1), (300, 0.05, 0.1), (1000, 0.001, 0.002), (1000, 0.05, 0.1), (1000, 0.0, 0.3),
]  # fmt: skip
LOSSES = [("normal", 20), ("normal", 60), ("skewed", 20), ("skewed", 60), ("heavy tails", 60), ("skewed", 200)]


def alarms(hits: int, items: int, losses: int, *, comparisons: int, seed: int = 0) -> dict[str, float]:
    """Share of A/A comparisons with an alarm of any kind, and with one in the overall verdict."""
    random = np.random.default_rng(seed)
    found = {"any": 0, "overall": 0}
    for _ in range(comparisons):
        result = judge_all(_same_model(random, hits, items, losses), 2.0)
        said = [each["verdict"] for kind in ("tasks", "suites", "pools") for each in result[kind].values()]
        overall = result["overall"]["verdict"] in ("learned", "forgot")
        found["any"] += overall or not {"learned", "forgot"}.isdisjoint(said)
        found["overall"] += overall
    return {kind: count / comparisons for kind, count in found.items()}


def power(items: int, lost: float, gained: float, tests: int, *, comparisons: int, seed: int = 0) -> dict[str, float]:
    """Shares of the verdicts about one task; its p is the smallest of `tests`, the hardest place in Holm's order."""
    gains, losses = _flips(items, gained, lost, comparisons, seed)
    low, high = (100 * end for end in tango(gains, losses, items))
    p = np.minimum(1.0, tests * mcnemar(gains, losses))
    verdicts = [decide(*each[:2], p_adjusted=each[2], margin=2.0) for each in zip(low, high, p, strict=True)]
    return {word: verdicts.count(word) / comparisons for word in ("learned", "kept", "forgot", "undecided")}


def coverage(items: int, gained: float, lost: float, *, comparisons: int, seed: int = 0) -> float:
    """Share of Tango's intervals with the real difference inside."""
    low, high = tango(*_flips(items, gained, lost, comparisons, seed), items)
    return float(((low <= gained - lost) & (gained - lost <= high)).mean())


def loss_coverage(shape: str, items: int, *, comparisons: int, seed: int = 0) -> float:
    """Share of the bootstrap's intervals with the real difference of a loss per token inside."""
    random = np.random.default_rng(seed)
    inside = 0
    for _ in range(comparisons):
        tokens = random.integers(5, 200, items).astype(np.float64)
        low, high = bootstrap(tokens * _differences(random, shape, items), tokens)
        inside += low <= 0.02 <= high
    return inside / comparisons


def _same_model(random: np.random.Generator, hits: int, items: int, losses: int) -> dict[str, Any]:
    found = {}
    for number in range(hits):
        chance = random.beta(1.2, 0.8, items)
        columns = [(random.random(items) < chance).tolist() for _ in range(2)]
        about = {"title": f"hits {number}", "suite": "s" if number % 2 else "t", "kind": "choice", "left_out": {}}
        found[f"hits {number}"] = _task(about | {"role": "old" if number else "new"}, "accuracy", columns, [0] * items)
    for number in range(losses):
        tokens = random.integers(5, 200, items)
        base = tokens * random.normal(2.7, 0.3, items)
        columns = [(base + tokens * random.normal(0, 0.05, items)).tolist() for _ in range(2)]
        about = {"title": f"loss {number}", "suite": "probes", "kind": "text", "role": "old", "left_out": {}}
        found[f"loss {number}"] = _task(about, "loss", columns, tokens.tolist())
    return found


def _task(about: dict[str, Any], metric: str, columns: list[list[Any]], tokens: list[int]) -> tuple[Any, Pairs, Any]:
    count = len(tokens)
    shared = {"id": list(range(count)), "tokens": tokens} | dict.fromkeys(("subtask", "prompt", "target"), [""] * count)
    column = "loss" if metric == "loss" else "correct"
    pairs = Pairs([shared | {column: values} for values in columns])
    return about, pairs, {metric: compare_metric(metric, pairs)}


def _flips(items: int, gained: float, lost: float, comparisons: int, seed: int) -> tuple[NDArray, NDArray]:
    chances = [gained, lost, 1 - gained - lost]
    drawn = np.random.default_rng(seed).multinomial(items, chances, size=comparisons)
    return drawn[:, 0], drawn[:, 1]


def _differences(random: np.random.Generator, shape: str, items: int) -> NDArray:
    """With mean 0.02."""
    if shape == "normal":
        return random.normal(0.02, 0.1, items)
    return 0.02 + (random.exponential(0.1, items) - 0.1 if shape == "skewed" else 0.05 * random.standard_t(3, items))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--comparisons", type=int, default=2000)
    count = parser.parse_args().comparisons
    print("| A/A comparison | any alarm | overall verdict |\n| --- | --- | --- |")
    for name, family in FAMILIES.items():
        found = alarms(**family, comparisons=max(1, count // (4 if family["losses"] else 1)))
        print(f"| {name} | {100 * found['any']:.1f} % | {100 * found['overall']:.1f} % |")
    print(f"\n| items | wrong after | right after | tests | found (p < {ALPHA}) | called kept |\n" + "| --- " * 6 + "|")
    for items, lost, gained, tests in FALLS:
        found = power(items, lost, gained, tests, comparisons=count)
        rates = f"{100 * found['forgot']:.1f} % | {100 * found['kept']:.1f} %"
        print(f"| {items:,} | {100 * lost:g} % | {100 * gained:g} % | {tests} | {rates} |")
    print("\n| items | gained | lost | interval covers |\n" + "| --- " * 4 + "|")
    for items, gained, lost in SHARES:
        inside = coverage(items, gained, lost, comparisons=10 * count)
        print(f"| {items:,} | {100 * gained:g} % | {100 * lost:g} % | {100 * inside:.1f} % |")
    print("\n| difference of losses | items | interval covers |\n" + "| --- " * 3 + "|")
    for shape, items in LOSSES:
        print(f"| {shape} | {items} | {100 * loss_coverage(shape, items, comparisons=max(1, count // 2)):.1f} % |")


if __name__ == "__main__":
    main()
