"""Items side by side: what was won and lost with both models' answers, spread evenly over each group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlllm.benchmark.items import read_items

Json = dict[str, Any]
GROUPS = {
    (False, True): ("won", "wrong before, right after"),
    (True, False): ("lost", "right before, wrong after"),
    (True, True): ("right", "right before and after"),
    (False, False): ("wrong", "wrong before and after"),
}
MOST = 150
"""Items on the page, over all tasks: it bounds the page's size."""
PROMPT, ANSWER = (160, 440), (450, 250)
"""Characters that are shown of the beginning and of the end; a question stands at the end of its prompt."""


def answers(base: Path, tuned: Path, tasks: dict[str, Json]) -> list[Json]:
    """A section for each task that has right and wrong answers: the counts, and a few items of each group."""
    judged = [name for name, task in tasks.items() if task["metric"] != "loss" and task["gained"] is not None]
    each = max(1, min(3, MOST // (3 * max(len(judged), 1))))
    sections = [_section(tasks[name], read_items(base, name), read_items(tuned, name), each) for name in judged]
    return sorted(sections, key=lambda section: (section["role"] != "new", -section["flips"]))


def _section(task: Json, before: Sequence[Json], after: Sequence[Json], each: int) -> Json:
    old = {_key(item): item for item in before}
    pairs = [(old[_key(item)], item) for item in sorted(after, key=_key) if _key(item) in old]
    pairs = [pair for pair in pairs if None not in (pair[0]["correct"], pair[1]["correct"])]
    groups = []
    for (was, now), (name, title) in GROUPS.items():
        found = [pair for pair in pairs if (pair[0]["correct"], pair[1]["correct"]) == (was, now)]
        count = min(each if was != now else 1, len(found))
        shown = [_shown(*found[(2 * i + 1) * len(found) // (2 * count)]) for i in range(count)]
        groups.append({"name": name, "title": title, "total": len(found), "shown": shown})
    about = {name: task[name] for name in ("title", "role", "kind", "verdict")}
    return about | {"groups": groups, "flips": groups[0]["total"] + groups[1]["total"], "items": len(pairs)}


def _key(item: Json) -> tuple[str, int]:
    return item["subtask"], item["id"]


def _shown(before: Json, after: Json) -> Json:
    return {
        "prompt": shorten(after["prompt"], *PROMPT),
        "target": shorten(after["target"], *ANSWER),
        "before": None if before["output"] is None else shorten(before["output"], *ANSWER),
        "after": None if after["output"] is None else shorten(after["output"], *ANSWER),
    }


def shorten(text: str, head: int, tail: int) -> str:
    """Its beginning and its end, with the number of characters between them."""
    if len(text) <= head + tail + 40:
        return text
    return f"{text[:head]} […{len(text) - head - tail:,} characters…] {text[-tail:]}"
