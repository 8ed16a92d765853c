"""The chart: what is forgotten over what was gained, a line per method with a band over the seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curves import DIAL, Measure, Results

COLOURS = {
    "full": "#c8553d", "partial": "#e0a03a", "lora": "#8a5fb0", "stack": "#8c6d5a", "hybrid": "#5c6b73",
    "concat-dlerp": "#2e8b57", "concat-lerp-mse": "#2f6db3",
}  # fmt: skip
OTHER = "#888888"
PANELS: dict[Measure, str] = {
    "old": "Loss on old text above the base's, nats",
    "kl": "KL from base to model on old text, nats",
}
GAINS = [k / 100 for k in range(20, 91)]
SIZE = {"width": 380, "height": 340}
LABEL = 13
"""Pixels between two labels."""


def draw(results: Results, names: Sequence[str], file: Path) -> None:
    """A PNG with a panel per measure; a curve goes on as far as all its seeds do."""
    import altair as alt
    import vl_convert

    chart = alt.hconcat(*(_panel(results, names, measure, title) for measure, title in PANELS.items()))
    chart = chart.properties(title="What is forgotten at equal gain: mean and range over seeds, lower is better")
    chart = chart.configure(font="sans-serif", background="white").configure_view(stroke=None)
    file.write_bytes(vl_convert.vegalite_to_png(chart.configure_axis(titleFontWeight="normal").to_dict(), scale=2))


def _panel(results: Results, names: Sequence[str], measure: Measure, title: str) -> Any:
    import altair as alt

    rows = [row for name in names for row in _curve(results, name, measure)]
    ends = _labels(rows)
    x = alt.X(
        "gain:Q", title="Gain: loss on held-out puzzles below the base's, nats", scale=alt.Scale(zero=False, nice=False)
    )
    y = alt.Y("mean:Q", title=title)
    color = alt.Color("name:N", scale=alt.Scale(domain=list(names), range=[_colour(n) for n in names]), legend=None)
    dashed = alt.StrokeDash("dial:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [4, 3]]), legend=None)
    shared = alt.Chart(alt.InlineData(values=rows)).encode(x=x, color=color)
    band = shared.mark_area(opacity=0.13).encode(y="low:Q", y2="high:Q", detail="name:N")
    line = shared.mark_line(strokeWidth=2).encode(y=y, strokeDash=dashed)
    text = alt.Chart(alt.InlineData(values=ends)).mark_text(align="left", dx=6, fontSize=11)
    return (band + line + text.encode(x=x, y="place:Q", text="name:N", color=color)).properties(**SIZE)


def _curve(results: Results, name: str, measure: Measure) -> list[dict[str, Any]]:
    rows = []
    for gain in GAINS:
        cell = results.cell(name, measure, gain)
        if len(cell.values) == cell.seeds:
            row = {"mean": cell.mean, "low": min(cell.values), "high": max(cell.values)}
            rows.append({"name": name, "dial": name.endswith(DIAL), "gain": gain} | row)
    return rows


def _labels(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The end of every curve, and a height for its name at which no other name stands."""
    if not rows:
        return []
    ends = {row["name"]: row for row in rows}
    right = max(row["gain"] for row in rows)
    apart = LABEL / SIZE["height"] * (max(row["high"] for row in rows) - min(row["low"] for row in rows))
    placed: list[dict[str, Any]] = []
    for row in sorted(ends.values(), key=lambda row: row["mean"]):
        lowest = placed[-1]["place"] + apart if placed else row["mean"]
        placed.append({"name": row["name"], "gain": right, "place": max(row["mean"], lowest)})
    return placed


def _colour(name: str) -> str:
    return COLOURS.get(name.removesuffix(DIAL), OTHER)
