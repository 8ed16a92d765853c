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
    "old": "Loss on old text above the base's",
    "kl": "KL from base to model on old text",
}
GAINS = [k / 100 for k in range(20, 91)]
SIZE = {"width": 400, "height": 250}
LABEL = 13
"""Pixels between two labels."""
WHOLE = 0.76
"""The gain up to which all curves stand in the picture; beyond it some leave it at the top."""


def draw(results: Results, names: Sequence[str], file: Path) -> None:
    """A PNG: a column per measure, the models as trained above, with the dial below. A curve goes as far as all its
    seeds do."""
    import altair as alt
    import vl_convert

    rows = {
        "as trained": [name for name in names if not name.endswith(DIAL)],
        "with the dial": [name for name in names if name.endswith(DIAL)],
    }
    panels = [
        alt.hconcat(*(_panel(results, some, measure, f"{title}, {way}") for measure, title in PANELS.items()))
        for way, some in rows.items()
        if some
    ]
    chart = alt.vconcat(*panels, title="What is forgotten at equal gain: mean and range over seeds, lower is better")
    chart = chart.configure(font="sans-serif", background="white").configure_view(stroke=None)
    file.write_bytes(vl_convert.vegalite_to_png(chart.configure_axis(titleFontWeight="normal").to_dict(), scale=2))


def _panel(results: Results, names: Sequence[str], measure: Measure, title: str) -> Any:
    import altair as alt

    rows = [row for name in names for row in _curve(results, name, measure)]
    ends = _labels(rows)
    # The end of a curve can rise so steeply that it would flatten all others.
    top = 1.15 * max((row["high"] for row in rows if row["gain"] <= WHOLE), default=1.0)
    gains = alt.Scale(domain=[GAINS[0], max((row["gain"] for row in rows), default=1.0)], nice=False)
    axis = alt.Axis(values=[k / 10 for k in range(2, 10)], format=".1f")
    x = alt.X("gain:Q", title="Gain: loss on held-out puzzles below the base's, nats", axis=axis, scale=gains)
    y = alt.Y("mean:Q", title="nats", scale=alt.Scale(domainMax=top, clamp=False))
    color = alt.Color("name:N", scale=alt.Scale(domain=list(names), range=[_colour(n) for n in names]), legend=None)
    shared = alt.Chart(alt.InlineData(values=rows)).encode(x=x, color=color)
    band = shared.mark_area(opacity=0.13, clip=True).encode(y="low:Q", y2="high:Q", detail="name:N")
    line = shared.mark_line(strokeWidth=2, clip=True).encode(y=y)
    text = alt.Chart(alt.InlineData(values=ends)).mark_text(align="left", dx=6, fontSize=11)
    text = text.encode(x=x, y="place:Q", text="label:N", color=color)
    return (band + line + text).properties(title=alt.TitleParams(title, fontSize=12, fontWeight="normal"), **SIZE)


def _curve(results: Results, name: str, measure: Measure) -> list[dict[str, Any]]:
    rows = []
    for gain in GAINS:
        cell = results.cell(name, measure, gain)
        if len(cell.values) == cell.seeds:
            rows.append(
                {"name": name, "gain": gain, "mean": cell.mean, "low": min(cell.values), "high": max(cell.values)}
            )
    return rows


def _labels(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names at the right, in the order and near the heights in which the curves stand at the gain all are drawn to."""
    if not rows:
        return []
    right = max(row["gain"] for row in rows)
    top = 1.15 * max((row["high"] for row in rows if row["gain"] <= WHOLE), default=1.0)
    apart = LABEL / SIZE["height"] * (top - min(0.0, *(row["low"] for row in rows)))
    ends = {row["name"]: row for row in rows}
    placed: list[dict[str, Any]] = []
    for row in sorted(ends.values(), key=lambda row: row["mean"]):
        lowest = placed[-1]["place"] + apart if placed else row["mean"]
        label = row["name"].removesuffix(DIAL)
        placed.append({"name": row["name"], "label": label, "gain": right, "place": max(row["mean"], lowest)})
    over = placed[-1]["place"] - top
    if over > 0:  # from the top down, so that nothing stands outside
        ceiling = top
        for label in reversed(placed):
            label["place"] = min(label["place"], ceiling)
            ceiling = label["place"] - apart
    return placed


def _colour(name: str) -> str:
    return COLOURS.get(name.removesuffix(DIAL), OTHER)
