"""Figures that another command drew, let onto the page only as far as they can do nothing but be looked at."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from markupsafe import Markup

from controlllm.charts import Figure
from controlllm.errors import UserError
from controlllm.report.read import read_json

ELEMENTS = {
    "svg", "g", "path", "rect", "line", "circle", "ellipse", "text", "tspan", "polyline", "polygon", "defs", "clipPath",
    "linearGradient", "radialGradient", "stop", "title", "desc", "marker", "pattern", "mask", "symbol", "use",
}  # fmt: skip

MOST = 1_000_000
"""Characters of drawings: it bounds the page's size."""


def drawings(file: Path) -> list[Figure]:
    """The figures of a probe.json, as many as `MOST` allows.

    UserError for a drawing that is no SVG, or one that could run, fetch or link something.
    """
    found, size = [], 0
    for figure in read_json(file)["figures"]:
        size += len(figure["svg"])
        if size > MOST:
            break
        found.append(Figure(figure["title"], _checked(figure["svg"], figure["title"], file), figure["caption"]))
    return found


def _checked(svg: str, title: str, source: Path) -> Markup:
    if "<!" in svg.replace("<!--", ""):
        raise UserError(f"{source}: the figure {title!r} declares a document type or entities, which are not drawn")
    try:
        root = ET.fromstring(svg)  # noqa: S314  no declarations, so no entities
    except ET.ParseError as error:
        raise UserError(f"{source}: the figure {title!r} is no SVG that can be read ({error})") from None
    for element in root.iter():
        element.tag = str(element.tag).rpartition("}")[2]
        if element.tag not in ELEMENTS:
            raise UserError(f"{source}: the figure {title!r} has a <{element.tag}>, which is not drawn")
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            plain = name.rpartition("}")[2]
            if plain.startswith("on") or (plain in ("href", "src") and not value.startswith("#")) or _fetches(value):
                raise UserError(f"{source}: the figure {title!r} has {plain}={value[:40]!r}, which is not drawn")
            element.attrib[plain] = value
    if root.tag != "svg":
        raise UserError(f"{source}: the figure {title!r} is <{root.tag}>, not <svg>")
    root.set("role", "img")
    root.attrib.setdefault("aria-label", title)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704  only what was checked


def _fetches(value: str) -> bool:
    return bool(re.search(r"(?i)url\(\s*['\"]?(?!#)|javascript:|@import|expression\(", value))
