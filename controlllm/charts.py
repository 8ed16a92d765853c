"""The report's curves: Altair charts as inline SVG, in colours and inks that the page's style sheet defines."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

WIDTH = 410
"""Near a phone's width: a larger screen shows two beside each other instead of stretching one."""
INK, QUIET, GRID = "currentColor", "var(--quiet)", "var(--grid)"
RUN = "var(--accent)"
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
}
SOLID, DASHED, DOTTED = (), (5, 3), (1, 3)

Row = Mapping[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart; its points are in order, and missing where nothing was measured."""

    label: str
    points: list[Point]
    colour: str = RUN
    dash: tuple[int, ...] = SOLID
    opacity: float = 1.0


@dataclass(frozen=True)
class Figure:
    """legend: the lines by what they are called; empty for a single one."""

    title: str
    svg: Markup
    caption: str = ""
    legend: tuple[Series, ...] = ()


def training_figures(rows: Sequence[Row], resumed: Sequence[int] = ()) -> list[Figure]:
    """Losses, old skills, divergence, alphas, gradient and learning rate over the steps; only what is a number.

    resumed: the steps after which the run was taken up again; each has a dotted upright line.
    """
    train = Series("training rows", _points(rows, "loss"))
    held_out = Series("held-out rows", _points(rows, "validation_loss"), INK, DASHED)
    kept = Series("text of old skills", _points(rows, "retention_loss"), INK, DOTTED)
    figures = [curves("Loss, nats per token", [train, held_out], marks=resumed)]
    if kept.points:
        start = kept.points[0][1]
        change = Series("change in its loss", [(step, loss - start) for step, loss in kept.points], INK, DOTTED)
        away = Series("divergence from the base’s predictions", _points(rows, "retention_kl"))
        note = f"Both start at 0; the loss was {start:.3f} then."
        figures.append(curves("Text of old skills, nats per token", [change, away], note, marks=resumed))
    if alphas := _alphas(rows):
        note = "Weight of the twin’s output, a line for each site: the fainter, the nearer to the input."
        figures.append(curves("Alpha", alphas, note, marks=resumed, legend=False))
    for name, title, note in (
        ("divergence", "Divergence", "Distance of the trained blocks’ hidden states from the frozen blocks’."),
        ("grad_norm", "Gradient norm before clipping", ""),
        ("lr", "Learning rate", ""),
        ("tokens_per_second", "Tokens per second", ""),
    ):
        if points := _points(rows, name):
            figures.append(curves(title, [Series(title, points)], note, marks=resumed))
    return figures


def curves(
    title: str,
    series: Sequence[Series],
    caption: str = "",
    *,
    marks: Sequence[int] = (),
    legend: bool = True,
    axis: str = "step",
) -> Figure:
    """Lines over the steps, or another axis; long ones averaged over what was logged, and no line over a gap."""
    shown = [one for one in series if one.points]
    layers = [layer for one in shown for layer in _layers(one, axis)]
    if marks and layers:
        rule = alt.Chart(alt.InlineData(values=[{"step": step} for step in marks]))
        layers.insert(0, rule.mark_rule(color=QUIET, strokeDash=[2, 3]).encode(x="step:Q"))
    words = "; ".join(f"{one.label} {_course(one.points, axis)}" for one in shown)
    if not layers:
        return Figure(title, Markup(), "Nothing was logged.")
    svg = _svg(alt.layer(*layers).properties(height=170), f"{title}: {words}")
    return Figure(title, svg, caption, tuple(shown) if legend and shown[1:] else ())


def scatter_path(title: str, points: Sequence[tuple[float, float, str]], x: str, y: str, caption: str = "") -> Figure:
    """A way through a plane: (x, y, what the place is called), in order."""
    rows = [{"x": a, "y": b, "name": name, "order": i} for i, (a, b, name) in enumerate(points)]
    room = alt.Scale(padding=24, zero=False, nice=False)
    shared = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("x:Q", title=x, scale=room), y=alt.Y("y:Q", title=y, scale=room)
    )
    line = shared.mark_line(color=RUN, strokeWidth=2.2).encode(order="order:Q")
    dots = shared.mark_point(color=RUN, fill=RUN, size=60, opacity=1)
    names = shared.mark_text(dy=-13, fontWeight="bold").encode(text="name:N")
    words = "; ".join(f"{name}: {a:.4g}, {b:.4g}" for a, b, name in points)
    return Figure(title, _svg((line + dots + names).properties(height=230), f"{title}. {words}"), caption)


def bars(title: str, counts: Sequence[tuple[str, float]], x: str, y: str, caption: str = "") -> Figure:
    """A bar for each count, in order."""
    if not counts:
        return Figure(title, Markup(), "Nothing was counted.")
    rows = [{"x": label, "y": count} for label, count in counts]
    across = alt.X("x:N", title=x, sort=None, axis=alt.Axis(labelAngle=0))
    chart = alt.Chart(alt.InlineData(values=rows)).encode(x=across, y=alt.Y("y:Q", title=y))
    drawn = chart.mark_bar(color=RUN, cornerRadiusTopLeft=2, cornerRadiusTopRight=2).properties(height=170)
    words = "; ".join(f"{label}: {count:,.4g}" for label, count in counts)
    return Figure(title, _svg(alt.layer(drawn), f"{title}. {words}"), caption)


def _layers(series: Series, axis: str) -> list[alt.Chart]:
    layers = []
    smooth = len(series.points) >= 80
    for part in _parts(series.points):
        if smooth:
            layers.append(_line(_thin(part, 600), series, axis, opacity=0.3, width=1.0))
        size = math.ceil(len(series.points) / 40) if smooth else 1
        layers.append(_line(_averaged(part, size), series, axis, opacity=series.opacity, width=2.2))
    return layers


def _parts(points: list[Point]) -> list[list[Point]]:
    """Cut where values are missing: at more than twice the usual distance."""
    usual = median([b[0] - a[0] for a, b in pairwise(points)] or [1])
    parts, last = [], -math.inf
    for point in points:
        if point[0] - last > 1.99 * usual:
            parts.append([])
        parts[-1].append(point)
        last = point[0]
    return parts


def _line(points: list[Point], series: Series, axis: str, *, opacity: float, width: float) -> alt.Chart:
    data = alt.InlineData(values=[{"step": step, "value": value} for step, value in points])
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    chart = alt.Chart(data).encode(x=alt.X("step:Q", title=axis, scale=alt.Scale(nice=False)), y=y)
    if len(points) == 1:
        return chart.mark_point(color=series.colour, fill=series.colour, size=20, opacity=opacity)
    return chart.mark_line(color=series.colour, strokeWidth=width, strokeDash=[*series.dash] or [1, 0], opacity=opacity)


def _alphas(rows: Sequence[Row]) -> list[Series]:
    """The course of each site's weight, if any of them moved."""
    logged = {row["step"]: row["alpha"] for row in rows if row.get("alpha")}
    sites = sorted({site for alphas in logged.values() for site in alphas}, key=int)
    found = [
        Series(f"site {site}", [(step, alphas[site]) for step, alphas in sorted(logged.items()) if site in alphas],
               opacity=0.35 + 0.65 * (i + 1) / len(sites))
        for i, site in enumerate(sites)
    ]  # fmt: skip
    return found if any(len({value for _, value in one.points}) > 1 for one in found) else []


def _points(rows: Iterable[Row], name: str) -> list[Point]:
    """By step, each once: a line that was made again replaces the one before it."""
    found = {row["step"]: row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])}
    return sorted(found.items())


def _thin(points: list[Point], most: int) -> list[Point]:
    return _averaged(points, math.ceil(len(points) / most))


def _averaged(points: list[Point], size: int) -> list[Point]:
    """Each `size` neighbours as their mean, at their middle step."""
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(block[len(block) // 2][0], sum(value for _, value in block) / len(block)) for block in blocks]


def _course(points: list[Point], axis: str) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"from {start:.4g} at {axis} {first} to {end:.4g} at {axis} {last}"


def _svg(chart: alt.LayerChart | alt.FacetChart, label: str) -> Markup:
    chart = chart.properties(width=WIDTH, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    svg = vl_convert.vegalite_to_svg(chart.configure(**LOOK).to_dict(), vl_version=VEGA_LITE)
    head, _, body = svg.partition("<svg ")[2].partition(">")  # its own namespaces are not needed inside HTML
    view = head.partition('viewBox="')[2].partition('"')[0]
    return Markup('<svg role="img" aria-label="{}" viewBox="{}">').format(label, view) + Markup(body)  # noqa: S704
