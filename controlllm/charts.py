"""The report's pictures: Altair charts as inline SVG, in colours and inks that the page's style sheet defines."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

from controlllm.statistics import MEASURES, Metric, format_value

WIDTH = 410
"""Near a phone's width: a larger screen shows two beside each other instead of stretching one."""
INK, QUIET, GRID = "currentColor", "var(--quiet)", "var(--grid)"
GAP = "\u2003"  # an em space: ordinary ones collapse in SVG
FONT = "Arial, sans-serif"
VEGA_LITE = "6.4"
AXIS = {"gridColor": GRID, "domainColor": GRID, "tickColor": GRID, "labelColor": QUIET, "titleColor": QUIET}
AXIS |= {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8}
LOOK: dict[str, Any] = {
    "aria": False,  # the whole picture has one label
    "background": "transparent",
    "font": FONT,
    "padding": {"left": 12, "right": 8, "top": 4, "bottom": 4},
    "view": {"stroke": None},
    "text": {"fontSize": 12, "fill": INK},
    "axis": {**AXIS, "labelLimit": 130, "tickCount": 5},
    "axisY": {"labelColor": INK, "ticks": False, "labelPadding": 8},
}
BASE_COLOUR = "var(--base)"
RUN_COLOURS = 5

Summary = Mapping[str, Any]
Row = dict[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    caption: str = ""


def run_colour(index: int) -> str:
    """The same run has the same colour everywhere: 0 is this run, then the contrasts in their order."""
    return f"var(--run-{index % RUN_COLOURS})"


def new_skill_figures(runs: Sequence[Summary]) -> list[Figure]:
    """Each measure of each new skill: the base, then every run."""
    figures = []
    for name, probe in runs[0]["new"].items():
        for metric, change in probe["metrics"].items():
            rows = [{"run": "Base model", "value": change["before"], "colour": BASE_COLOUR}]
            for index, run in enumerate(runs):
                if name in run["new"]:
                    rows.append(_after(run, run["new"][name]["metrics"][metric], index))
            figures.append(_before_after(probe["title"], metric, rows))
    return figures


def old_skill_figures(runs: Sequence[Summary]) -> list[Figure]:
    """What was forgotten: signed changes against the base, the worse side always on the right."""
    figures = []
    if loss := _changes(runs, "old", ("loss",), relative=True):
        axis = f"◂ better{GAP}change in loss, % of the base{GAP}worse ▸"
        figures.append(_signed("Old skills: change in loss", axis, loss, unit=" %", span=(-1.0, 1.0)))
    if hits := _changes(runs, "old", ("accuracy", "exact_match"), scale=100.0):
        axis = f"◂ better{GAP}change in right answers, points{GAP}worse ▸"
        figures.append(_signed("Old skills: change in right answers", axis, hits, span=(-2.0, 2.0), reverse=True))
    return figures


def drift_figure(runs: Sequence[Summary]) -> Figure | None:
    """How far each run went from the base model's own answers."""
    rows = _changes(runs, "drift", ("loss",))
    axis = "nats per token (0: answers as the base does)"
    return _signed("Drift from the base model’s own answers", axis, rows, span=(0.0, 0.02), digits=3) if rows else None


def training_figures(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Losses, old skills, divergence, alphas and learning rate over the steps; only what is a number."""
    colour = run_colour(0)
    held_out, kept = _points(rows, "validation_loss"), _points(rows, "retention_loss")
    caption = "Bold: averaged training rows, faint: as logged." + (" Dashed: held-out rows." if held_out else "")
    caption += " Dotted: text of old skills." if kept else ""
    series = [(_points(rows, "loss"), colour, []), (held_out, INK, [4, 3]), (kept, INK, [1, 3])]
    figures = [_curves("Loss while training, nats per token", series, caption)]
    if kept:
        change = [(step, loss - kept[0][1]) for step, loss in kept]
        series = [(change, INK, [1, 3]), (_points(rows, "retention_kl"), colour, [])]
        caption = (
            "Dotted: change in the loss on text of old skills. Line: divergence from the base's predictions there."
        )
        figures.append(_curves("Old skills while training, nats per token", series, caption + " Both start at 0."))
    if alphas := _alphas(rows):
        caption = "Weight of the twin's output, a line for each site."
        figures.append(_curves("Alpha", [(points, colour, []) for points in alphas], caption))
    if divergence := _points(rows, "divergence"):
        caption = "Distance of the trained blocks' hidden states from the frozen blocks'."
        figures.append(_curves("Divergence", [(divergence, colour, [])], caption))
    for name, title in (("grad_norm", "Gradient norm before clipping"), ("lr", "Learning rate")):
        if points := _points(rows, name):
            figures.append(_curves(title, [(points, colour, [])]))
    return figures


def _alphas(rows: Sequence[Mapping[str, Any]]) -> list[list[Point]]:
    """The course of each site's weight, if any of them moved."""
    logged = [(row["step"], row["alpha"]) for row in rows if row.get("alpha")]
    sites = sorted({site for _, alphas in logged for site in alphas}, key=int)
    courses = [[(step, alphas[site]) for step, alphas in logged if site in alphas] for site in sites]
    return courses if any(len({value for _, value in course}) > 1 for course in courses) else []


def _after(run: Summary, change: Mapping[str, Any], index: int) -> Row:
    ends = {"low": change["before"] + change["low"], "high": change["before"] + change["high"]}
    return {"run": run["name"], "value": change["after"], "colour": run_colour(index), **ends}


def _before_after(title: str, metric: Metric, rows: list[Row]) -> Figure:
    scale = 1.0 if metric == "loss" else 100.0
    for row in rows:
        row |= {name: row[name] * scale for name in ("value", "low", "high") if name in row}
        row["text"] = format_value(row["value"] / scale, metric)
        row["end"] = max(row["value"], row.get("high", 0))
    limit = 1.2 * max(*(row["end"] for row in rows), 1e-9 if metric == "loss" else 1.0)
    x = alt.X("value:Q", title=None, scale=alt.Scale(domain=[0, limit], nice=False))
    shared = alt.Chart(alt.InlineData(values=rows)).encode(y=alt.Y("run:N", sort=None, title=None))
    chart = alt.layer(
        shared.mark_bar(height=alt.RelativeBandSize(band=0.8)).encode(x=x, color=alt.Color("colour:N", scale=None)),
        shared.mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q"),
        shared.mark_text(align="left", dx=6, fontWeight="bold").encode(x="end:Q", text="text:N"),
    )
    figure_title = f"{title}: {MEASURES[metric]}"
    words = "; ".join(f"{row['run']} {row['text']}" for row in rows)
    better = "lower is better" if metric == "loss" else "higher is better"
    return Figure(figure_title, _svg(chart.properties(height=27 * len(rows)), f"{figure_title}. {words}"), better)


def _changes(
    runs: Sequence[Summary], role: str, metrics: Sequence[Metric], *, relative: bool = False, scale: float = 1.0
) -> list[Row]:
    """One row per probe and run; what a contrast measured otherwise was already taken out of it."""
    rows = []
    for name, probe in runs[0][role].items():
        for index, run in enumerate(runs):
            for metric in metrics:
                if change := run[role].get(name, {"metrics": {}})["metrics"].get(metric):
                    factor = 100 / change["before"] if relative else scale
                    row = {key: change[key] * factor for key in ("difference", "low", "high")}
                    rows.append(row | {"probe": probe["title"], "run": run["name"], "colour": run_colour(index)})
    return rows


def _signed(
    title: str, axis: str, rows: list[Row], *, span: Point, unit: str = "", digits: int = 1, reverse: bool = False
) -> Figure:
    """Bars from 0 with whiskers; the axis covers `span` at least, so that a trifle looks like one."""
    for row in rows:
        row["text"] = f"{row['difference']:+.{digits}f}".replace("-", "−") + unit
        row["end"] = max(row["high"], 0) if row["difference"] >= 0 else min(row["low"], 0)
    low, high = min(span[0], *(row["low"] for row in rows)), max(span[1], *(row["high"] for row in rows))
    room = 0.34 * (high - low)  # for the numbers beside the bars
    x = alt.Scale(domain=[low - room if low else low, high + room], reverse=reverse, nice=False)
    shared = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("probe:N", sort=None, title=None, scale=alt.Scale(paddingInner=0.3)),
        yOffset=alt.YOffset("run:N", sort=None),
    )
    chart = alt.layer(
        shared.mark_bar(height=alt.RelativeBandSize(band=0.8)).encode(
            x=alt.X("difference:Q", title=axis, scale=x), color=alt.Color("colour:N", scale=None)
        ),
        alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=INK).encode(x="zero:Q"),
        shared.mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q"),
        *(_labels(shared, sign, reverse) for sign in (1, -1)),
    )
    probes = len({row["probe"] for row in rows})
    words = "; ".join(f"{row['probe']}, {row['run']}: {row['text']}" for row in rows)
    return Figure(title, _svg(chart.properties(height=probes * 12 + len(rows) * 18), f"{title}. {words}"))


def _labels(shared: alt.Chart, sign: int, reverse: bool) -> alt.Chart:
    """The numbers, beyond the whisker that points away from 0."""
    right = (sign > 0) != reverse
    mark = shared.transform_filter(f"(datum.difference >= 0 ? 1 : -1) == {sign}")
    return mark.mark_text(align="left" if right else "right", dx=6 if right else -6).encode(x="end:Q", text="text:N")


def _curves(title: str, series: Iterable[tuple[list[Point], str, list[int]]], caption: str = "") -> Figure:
    layers, words = [], []
    for points, colour, dash in series:
        if not points:
            continue
        words.append(f"from {points[0][1]:.4g} at step {points[0][0]} to {points[-1][1]:.4g} at step {points[-1][0]}")
        smooth = _thin(points, 40) if len(points) >= 80 else points
        if smooth is not points:
            layers.append(_line(_thin(points, 600), colour, [], opacity=0.3, width=1.0))
        layers.append(_line(smooth, colour, dash, opacity=1.0, width=2.2))
    chart = alt.layer(*layers).properties(height=170)
    return Figure(title, _svg(chart, f"{title}: {'; '.join(words) or 'nothing logged'}"), caption)


def _line(points: list[Point], colour: str, dash: list[int], *, opacity: float, width: float) -> alt.Chart:
    data = alt.InlineData(values=[{"step": step, "value": value} for step, value in points])
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    mark = alt.Chart(data).mark_line(color=colour, strokeWidth=width, strokeDash=dash or [1, 0], opacity=opacity)
    return mark.encode(x=alt.X("step:Q", title="step", scale=alt.Scale(nice=False)), y=y)


def _points(rows: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def _thin(points: list[Point], most: int) -> list[Point]:
    """At most `most` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / most)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(block[len(block) // 2][0], sum(value for _, value in block) / len(block)) for block in blocks]


def _svg(chart: alt.LayerChart | alt.FacetChart, label: str) -> Markup:
    chart = chart.properties(width=WIDTH, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    svg = vl_convert.vegalite_to_svg(chart.configure(**LOOK).to_dict(), vl_version=VEGA_LITE)
    head, _, body = svg.partition("<svg ")[2].partition(">")  # its own namespaces are not needed inside HTML
    view = head.partition('viewBox="')[2].partition('"')[0]
    return Markup('<svg role="img" aria-label="{}" viewBox="{}">').format(label, view) + Markup(body)  # noqa: S704
