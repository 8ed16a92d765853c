"""An Altair chart as inline SVG in the look of the report's charts."""

import altair as alt
import vl_convert
from markupsafe import Markup

from controlllm.charts import LOOK, RUN, VEGA_LITE, WIDTH

Svg = Markup
UP, DOWN = RUN, "var(--line-0)"
"""Colours of more and of less; the style sheet has them for light and dark."""


def svg(chart: alt.Chart | alt.LayerChart | alt.FacetChart, label: str) -> Svg:
    """label: what is said of the picture to those who cannot see it; words of ours alone."""
    chart = chart.properties(width=WIDTH, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    drawn = vl_convert.vegalite_to_svg(chart.configure(**LOOK).to_dict(), vl_version=VEGA_LITE)
    head, _, body = drawn.partition("<svg ")[2].partition(">")  # inside HTML it needs no namespaces
    view = head.partition('viewBox="')[2].partition('"')[0]
    return Markup('<svg role="img" aria-label="{}" viewBox="{}">').format(label, view) + Markup(body)  # noqa: S704
