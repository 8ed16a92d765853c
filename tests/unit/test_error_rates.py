"""How often verdicts are wrong and intervals miss: simulated, as docs/statistics.md says."""

import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "forgetting_power.py"


@pytest.fixture(scope="module")
def simulated():
    spec = importlib.util.spec_from_file_location("forgetting_power", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_measurements_of_one_model_raise_few_alarms(simulated):
    for family, comparisons in (("1 task of 1,000", 300), ("3 tasks of 100", 300), ("6 tasks of 300, 2 losses", 40)):
        found = simulated.alarms(**simulated.FAMILIES[family], comparisons=comparisons, seed=1)
        assert found["overall"] <= found["any"] <= 0.05, family


def test_a_fall_of_five_points_is_found(simulated):
    """At 1,000 items where 20 % of the answers flip; where 12.5 % do, also as the smallest p of ten."""
    assert simulated.power(1000, 0.125, 0.075, 1, comparisons=4000)["forgot"] > 0.90
    assert simulated.power(1000, 0.0875, 0.0375, 10, comparisons=4000)["forgot"] > 0.90
    assert simulated.power(1000, 0.05, 0.05, 1, comparisons=2000)["forgot"] < 0.05


def test_a_fall_by_the_margin_is_seldom_called_kept(simulated):
    for items, lost, gained in ((300, 0.05, 0.03), (1000, 0.04, 0.02), (3000, 0.10, 0.08)):
        assert simulated.power(items, lost, gained, 1, comparisons=4000)["kept"] < 0.035


def test_intervals_cover(simulated):
    for items, gained, lost in simulated.SHARES:
        assert simulated.coverage(items, gained, lost, comparisons=10_000) >= 0.93, (items, gained, lost)
    for shape, items in (("normal", 30), ("skewed", 80), ("heavy tails", 40)):
        assert simulated.loss_coverage(shape, items, comparisons=250) >= 0.93, (shape, items)


def test_the_tables_are_printed(simulated, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["forgetting_power.py", "--comparisons", "4"])
    simulated.main()
    out = capsys.readouterr().out
    assert out.count("| --- | --- |") >= 4
    for row in (*simulated.FAMILIES, "| 1,000 | 12.5 % | 7.5 % | 1 | ", "| skewed | 60 | "):
        assert row in out
