"""The probe's pictures, as SVG in the report's colours. Tokens stand down the page, layers across: for a phone, too.

Text of models is only ever text in them, and never part of an attribute.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from controlllm.charts import INK
from controlllm.probe.token_figures import ATTENDED, Chart, attention, heat_map, importance, layer_axis, lens_table
from controlllm.probe.vector import UP, Svg, svg

Json = dict[str, Any]
SITES = 4
"""Sites whose attention is drawn, those where it differs most."""


@dataclass(frozen=True)
class Drawing:
    title: str
    caption: str
    svg: Svg
    kind: str
    """layers | drift | lens | importance | attention"""
    prompt: int | None = None
    """Number of the prompt that it is of."""


def draw(result: Json, rows: Sequence[Json], maps: Json) -> list[Drawing]:
    """Over all prompts by layer and site, then token by token for those that are drawn."""
    drawings = list(_by_layer(result["layers"]))
    if result["sites"]:
        drawings += _by_site(result["sites"])
    for number, prompt in enumerate(result["prompts"][: result["settings"]["drawn"]], start=1):
        drawings += _of_prompt(number, prompt, [row for row in rows if row["prompt"] == number], result["layers"])
        drawings += _attention(number, prompt, result["sites"], maps)
    return drawings


def _by_layer(layers: Sequence[Json]) -> Iterator[Drawing]:
    marks = " Dots: sites and stacked copies." if any(one["kind"] in ("site", "copy") for one in layers) else ""
    turned = _lines(layers, [("angle", [1, 0], 2.2), ("angle_max", [4, 3], 1.4)], zero=True)
    caption = f"Angle between the base's hidden states and the tuned ones, degrees. Line: mean, dashed: most.{marks}"
    yield Drawing("Drift by layer", caption, svg(turned, "Drift by layer"), "layers")
    if any(one["cka"] is not None for one in layers):
        alike = _lines(layers, [("cka", [1, 0], 2.2)], zero=False)
        caption = (
            "Linear CKA of base and tuned over all tokens: 1 where the geometry of the states is the same." + marks
        )
        yield Drawing("Likeness by layer", caption, svg(alike, "CKA by layer"), "layers")
    lengths = _lines(layers, [("norm_ratio", [1, 0], 2.2)], zero=False)
    caption = "Length of the tuned hidden states by the base's, mean over tokens." + marks
    yield Drawing("Length by layer", caption, svg(lengths, "Ratio of lengths by layer"), "layers")


def _lines(layers: Sequence[Json], courses: Sequence[tuple[str, list[int], float]], *, zero: bool) -> Chart:
    axis = layer_axis([one["layer"] for one in layers])
    x = alt.X("layer:N", title="layer (in: embeddings)", sort=None, scale=alt.Scale(type="point"), axis=axis)
    marks = []
    for name, dash, width in courses:
        values = [{"layer": one["layer"], "value": one[name], "own": one["kind"] in ("site", "copy")} for one in layers]
        y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=zero))
        shared = alt.Chart(alt.InlineData(values=values)).encode(x=x, y=y)
        marks.append(shared.mark_line(color=UP, strokeDash=dash, strokeWidth=width))
        if dash == [1, 0]:
            marks.append(shared.mark_point(color=UP, filled=True, size=45).transform_filter("datum.own"))
    return alt.layer(*marks).properties(height=170)


def _by_site(sites: Sequence[Json]) -> Iterator[Drawing]:
    x = alt.X("alpha:Q", title=None, scale=alt.Scale(domain=[0, 1]))
    shared = alt.Chart(alt.InlineData(values=list(sites))).encode(y=alt.Y("layer:N", title="layer", sort=None))
    chart = shared.mark_rule(color=UP, strokeWidth=3, opacity=0.45).encode(x="alpha_min:Q", x2="alpha_max:Q")
    chart = alt.layer(chart, shared.mark_point(color=UP, filled=True, size=70, opacity=1).encode(x=x))
    caption = "Weight of the twin's output. Dot: mean over tokens, bar: least to most, where each token has its own."
    height = 24 * len(sites)
    yield Drawing("Alpha by site", caption, svg(chart.properties(height=height), "Alpha by site"), "layers")
    values = [site | {"percent": 100 * site["distance"]} for site in sites]
    shared = alt.Chart(alt.InlineData(values=values)).encode(y=alt.Y("layer:N", title="layer", sort=None))
    bars = shared.mark_bar(color=UP, height=alt.RelativeBandSize(band=0.7)).encode(x=alt.X("percent:Q", title=None))
    caption = "Length of the difference of the twin's output and the frozen block's, % of the frozen one's."
    title = "How far the two branches are apart"
    yield Drawing(title, caption, svg(bars.properties(height=height), title), "layers")
    values = [
        {"layer": site["layer"], "head": str(head), "share": 100 * share}
        for site in sites
        for head, share in enumerate(site["attention"] or [])
    ]
    if values:
        yield _heads(values)


def _heads(values: list[Json]) -> Drawing:
    most = max(value["share"] for value in values)
    opacity = alt.FillOpacity("share:Q", legend=None, scale=alt.Scale(domain=[0, max(most, 1e-9)], range=[0, 1]))
    shared = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X("head:N", title="head", sort=None, axis=alt.Axis(labelAngle=0, grid=False)),
        y=alt.Y("layer:N", title="layer", sort=None),
    )
    cells = shared.mark_rect(fill=UP, stroke=INK, strokeOpacity=0.15).encode(fillOpacity=opacity)
    chart = cells.properties(height=24 * len({value["layer"] for value in values}))
    caption = f"Share of its attention that a twin's head puts elsewhere than the frozen head. Darkest: {most:.1f} %."
    return Drawing("Attention of each head", caption, svg(chart, "Attention of each head"), "layers")


def _of_prompt(number: int, prompt: Json, rows: Sequence[Json], layers: Sequence[Json]) -> Iterator[Drawing]:
    chart, caption = heat_map(rows, prompt["tokens"], layers)
    yield Drawing(f"Prompt {number}: drift by token and layer", caption, svg(chart, "Drift"), "drift", number)
    chart, caption = importance(prompt)
    title = f"Prompt {number}: what the next token hangs on"
    yield Drawing(title, caption, svg(chart, "Importance"), "importance", number)
    last = prompt["lens"][-1]
    shown = {last["position"]: last}
    most = max(prompt["lens"], key=lambda one: one["kl"])
    shown.setdefault(most["position"], most)
    for position, one in shown.items():
        title = f"Prompt {number}: logit lens after ‘{prompt['tokens'][position]}’ ({position})"
        caption = (
            f"Most likely next token if the blocks ended at a layer, with its probability. The models' last "
            f"predictions are {one['kl']:.3g} nats apart (KL of the tuned from the base)."
        )
        yield Drawing(title, caption, svg(lens_table(one, layers), "Logit lens"), "lens", number)


def _attention(number: int, prompt: Json, sites: Sequence[Json], maps: Json) -> Iterator[Drawing]:
    """The mean over heads, and the head that differs most."""
    found = [site for site in sites if f"{number - 1}.{site['index'] - 1}" in maps]
    moved = sorted(found, key=lambda site: max(prompt["attention"][site["layer"]]), reverse=True)[:SITES]
    for site in sorted(moved, key=lambda site: site["index"]):
        frozen, twin = maps[f"{number - 1}.{site['index'] - 1}"]
        heads = prompt["attention"][site["layer"]]
        head = heads.index(max(heads))
        first = max(0, len(prompt["tokens"]) - ATTENDED)
        cut = f" The last {ATTENDED} tokens." if first else ""
        for name, pair, share in (
            ("mean of heads", (frozen.mean(0), twin.mean(0)), sum(heads) / len(heads)),
            (f"head {head}, which differs most", (frozen[head], twin[head]), heads[head]),
        ):
            chart = attention(*_corners(pair, first), prompt["tokens"][first:])
            title = f"Prompt {number}: attention at layer {site['layer']}, {name}"
            caption = (
                f"Left: frozen block, right: its twin; a token looks along its row. {100 * share:.1f} % elsewhere."
            )
            yield Drawing(title, caption + cut, svg(chart, "Attention"), "attention", number)


def _corners(pair: tuple[Any, Any], first: int) -> tuple[list[list[float]], list[list[float]]]:
    """Of two maps, from token `first` on."""
    frozen, twin = (side[first:, first:].tolist() for side in pair)
    return frozen, twin
