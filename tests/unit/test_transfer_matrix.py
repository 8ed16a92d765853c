"""A sequence of stages: the measures of the papers by hand, and their intervals."""

import numpy as np
import pytest
from measured_tasks import flipped, hits, write_results

from controlllm.statistics.stages import compare_stages

RIGHT = [1, 1, 0] * 200


def stage(scores: dict[str, float], *, new: str | None = None) -> dict:
    return {
        name: hits([i < share * 100 for i in range(100)], role="new" if name == new else "old")
        for name, share in scores.items()
    }


def test_stages_have_the_transfer_of_the_papers(tmp_path):
    """R by hand: a is learned at stage 1, b at 2, c at 3; d never."""
    table = [
        stage({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.9}),
        stage({"a": 0.8, "b": 0.3, "c": 0.3, "d": 0.8}, new="a"),
        stage({"a": 0.9, "b": 0.7, "c": 0.5, "d": 0.8}, new="b"),
        stage({"a": 0.6, "b": 0.6, "c": 0.9, "d": 0.7}, new="c"),
    ]
    folders = [write_results(tmp_path / str(i), tasks) for i, tasks in enumerate(table)]
    found = compare_stages(folders)
    assert [found["tasks"][name]["learned_at"] for name in "abcd"] == [1, 2, 3, 0]
    assert found["tasks"]["a"]["scores"] == pytest.approx([0.1, 0.8, 0.9, 0.6])
    values = {name: each["value"] for name, each in found["transfer"].items()}
    assert values == {
        "average score": pytest.approx((60 + 60 + 90 + 70) / 4),
        "backward transfer": pytest.approx(((60 - 80) + (60 - 70)) / 2),
        "forgetting": pytest.approx(((90 - 60) + (70 - 60)) / 2),
        "forward transfer": pytest.approx(((30 - 20) + (50 - 30)) / 2),
        "base skills": pytest.approx(70 - 90),
    }
    assert all(each["low"] < each["value"] < each["high"] for each in found["transfer"].values())
    moved = compare_stages(folders, learned={"a": 2})
    assert moved["transfer"]["backward transfer"]["value"] == pytest.approx(((60 - 90) + (60 - 70)) / 2)
    assert moved["transfer"]["forward transfer"]["tasks"] == ["a", "b", "c"]


def test_a_stages_interval_is_the_paired_bootstraps(tmp_path):
    """Of one old task it is that of the difference between the ends."""
    scores = {"a": RIGHT, "b": flipped(RIGHT, lost=60, gained=10)}
    folders = [write_results(tmp_path / name, {"mmlu": hits(right)}) for name, right in scores.items()]
    found = compare_stages([folders[0], folders[0], folders[1]])["transfer"]["base skills"]
    error = 100 * np.sqrt((70 / 600 - (50 / 600) ** 2) / 600)
    assert (found["low"], found["high"]) == pytest.approx((-50 / 6 - 1.96 * error, -50 / 6 + 1.96 * error), abs=0.25)
