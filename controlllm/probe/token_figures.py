"""Charts with a row per token: drift, importance, lens and attention."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import altair as alt

from controlllm.charts import INK
from controlllm.probe.vector import DOWN, UP

Json = dict[str, Any]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart
ROW = 17
"""Height of a token."""
TOKENS = 48
"""Tokens drawn of a prompt, the last ones."""
ATTENDED = 24
"""Tokens drawn of an attention map, the last ones."""
MOST_NAMES = 11
"""Layers that have a name below a chart."""
FAINT = 0.005
"""Attention that is left white."""


def heat_map(rows: Sequence[Json], tokens: Sequence[str], layers: Sequence[Json]) -> tuple[Chart, str]:
    """rows: of probe.parquet for one prompt."""
    first = max(0, len(tokens) - TOKENS)
    kept = ("position", "layer", "angle")
    values = [{key: row[key] for key in kept} for row in rows if row["position"] >= first and row["angle"] is not None]
    most = max((value["angle"] for value in values), default=0.0)
    opacity = alt.FillOpacity("angle:Q", legend=None, scale=alt.Scale(domain=[0, max(most, 1e-9)], range=[0.04, 1]))
    x = alt.X("layer:N", title="layer", sort=None, axis=layer_axis([layer["layer"] for layer in layers], orient="top"))
    shared = alt.Chart(alt.InlineData(values=values)).encode(x=x, y=_tokens(tokens))
    chart = shared.mark_rect(fill=UP).encode(fillOpacity=opacity)
    cut = f" The last {TOKENS} tokens." if first else ""
    caption = f"Angle between base and tuned after each layer; darkest: {most:.1f}°.{cut}"
    return chart.properties(height=ROW * (len(tokens) - first)), caption


def importance(prompt: Json) -> tuple[Chart, str]:
    """The tokens, coloured by what each does to the logit of the token that the tuned model predicts."""
    tokens, given = prompt["tokens"], prompt["importance"]
    first = max(0, len(tokens) - TOKENS)
    values = []
    for name in ("base", "tuned"):
        for position, share in enumerate(shares(given[name])):
            if position >= first:
                row = {"position": position, "model": name, "share": abs(share), "text": tokens[position]}
                values.append(row | {"colour": UP if share >= 0 else DOWN, "said": f"{100 * share:+.0f} %"})
    most = max(max(value["share"] for value in values), 1e-9)
    y = alt.Y("position:O", title=None, axis=alt.Axis(labelFontSize=11, grid=False))
    x = alt.X("model:N", title=None, sort=None, axis=alt.Axis(labelAngle=0, orient="top", domain=False, ticks=False))
    shared = alt.Chart(alt.InlineData(values=values)).encode(x=x, y=y)
    opacity = alt.FillOpacity("share:Q", legend=None, scale=alt.Scale(domain=[0, most], range=[0, 0.55]))
    chart = alt.layer(
        shared.mark_rect().encode(fillOpacity=opacity, fill=alt.Fill("colour:N", scale=None)),
        shared.mark_text(align="left", xOffset=-75, limit=110).encode(text="text:N"),
        shared.mark_text(align="right", xOffset=80, fillOpacity=0.7, fontSize=11).encode(text="said:N"),
    )
    caption = f"Gradient × input of the logit of ‘{given['of']}’, as shares: blue speaks for it, orange against it." + (
        f" The last {TOKENS} tokens." if first else ""
    )
    return chart.properties(height=ROW * (len(tokens) - first)), caption


def layer_axis(names: Sequence[str], *, orient: Literal["top", "bottom"] = "bottom") -> alt.Axis:
    """As many of the names as fit beside each other, evenly."""
    step = -(-len(names) // MOST_NAMES)
    kept = [name for index, name in enumerate(names) if index % step == 0]
    return alt.Axis(values=kept, tickCount=len(kept), labelAngle=0, labelOverlap=False, grid=False, orient=orient)


def shares(values: Sequence[float]) -> list[float]:
    """Of the sum of sizes; 0 where all are 0."""
    total = sum(map(abs, values))
    return [value / total if total else 0.0 for value in values]


def lens_table(followed: Json, layers: Sequence[Json]) -> Chart:
    """A row per layer: the first token of base and tuned."""
    names = [layer["layer"] for layer in layers]
    values = []
    for model in ("base", "tuned"):
        for layer, one in zip(names, followed[model], strict=True):
            row = {"layer": layer, "model": model, "text": one["top"][0], "p": one["p"][0]}
            values.append(row | {"said": f"{one['p'][0]:.2f}"})
    x = alt.X("model:N", title=None, sort=None, axis=alt.Axis(labelAngle=0, orient="top", domain=False, ticks=False))
    y = alt.Y("layer:N", title="layer", sort=list(reversed(names)), axis=alt.Axis(grid=False))
    shared = alt.Chart(alt.InlineData(values=values)).encode(x=x, y=y)
    opacity = alt.FillOpacity("p:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0, 0.55]))
    chart = alt.layer(
        shared.mark_rect(fill=UP).encode(fillOpacity=opacity),
        shared.mark_text(align="left", xOffset=-75, limit=115).encode(text="text:N"),
        shared.mark_text(align="right", xOffset=80, fillOpacity=0.7, fontSize=11).encode(text="said:N"),
    )
    return chart.properties(height=ROW * len(names))


def attention(frozen: Sequence[Sequence[float]], twin: Sequence[Sequence[float]], tokens: Sequence[str]) -> Chart:
    """Two maps (queries, keys) beside each other; weights below FAINT are left out."""
    size, gap = len(tokens), 2
    values = []
    for left, side in ((0, frozen), (size + gap, twin)):
        for query, weights in enumerate(side):
            for key, weight in enumerate(weights):
                if weight >= FAINT:
                    row = {"position": query, "left": left + key, "right": left + key + 1}
                    values.append(row | {"weight": round(weight, 3)})
    scale = alt.Scale(domain=[0, 2 * size + gap], nice=False)
    x = alt.X("left:Q", title=None, scale=scale, axis=None)
    opacity = alt.FillOpacity("weight:Q", legend=None, scale=alt.Scale(type="sqrt", domain=[0, 1], range=[0, 1]))
    cells = alt.Chart(alt.InlineData(values=values)).mark_rect(fill=UP)
    cells = cells.encode(x=x, x2="right:Q", y=_tokens(tokens), fillOpacity=opacity)
    names = [{"middle": size / 2, "name": "frozen"}, {"middle": size * 1.5 + gap, "name": "twin"}]
    words = alt.Chart(alt.InlineData(values=names)).mark_text(dy=-9, fill=INK, fontWeight="bold")
    words = words.encode(x=alt.X("middle:Q", scale=scale), y=alt.value(0), text="name:N")
    return alt.layer(cells, words).properties(height=13 * size)


def _tokens(tokens: Sequence[str]) -> alt.Y:
    """A row per position, named by its token: positions repeat no name as tokens do."""
    label = f"{json.dumps(list(tokens))}[toNumber(datum.value)]"
    axis = alt.Axis(labelExpr=label, labelLimit=100, labelFontSize=11, labelOverlap=False, grid=False, domain=False)
    return alt.Y("position:O", title=None, axis=axis)
