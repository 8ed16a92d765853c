"""The dial: how much of what was learned is let through, chosen after training, and what each choice keeps and costs.

`alpha_scale` 0 is the base model, 1 the trained one. A dialled checkpoint differs in its config.json alone.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from controlllm.config import BenchmarkConfig, PackConfig
from controlllm.data.probes import PROBES, probe_names
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.store import content_hash

Json = dict[str, Any]
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
COLOURS = ("#2f6db3", "#c8553d", "#2e8b57", "#8a5fb0", "#b8860b", "#5c6b73")
OWN_FILES = ("config.json", "lineage.json", "fold.json")
"""Of a checkpoint's folder: what is not true of another one made from it."""


def load(checkpoint: Path | str, *, alpha_scale: float = 1.0, dtype: str | None = None) -> Any:
    """The expanded model at `alpha_scale`, of any layout; `dtype` is the checkpoint's own when left out."""
    values = _config_at(Path(checkpoint), alpha_scale)
    from controlllm.control.model import family
    from controlllm.tuned import load_whole

    config = family(values["base_model_type"]).config.from_dict(values)  # a stack is stored as a plain model
    return load_whole(checkpoint, config=config, dtype=dtype)


def dial(
    checkpoint: Path | str,
    grid: Sequence[float] = GRID,
    *,
    new: list[str] | None = None,
    old: list[str] | None = None,
    items: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    output: Path | str | None = None,
) -> Path:
    """Score the checkpoint at every value of the grid and, to compare with, at 0; returns the folder of what was found.

    Writes dial.json, dial.html and dial.png. What the recipe's `benchmark` section calls its keys is left to its
    defaults; points that were scored before come from the store.
    """
    config = probe_config(new=new, old=old, items=items, batch_size=batch_size, dtype=dtype)
    if not config.new and not config.old:
        raise UserError("new, old: both are empty; give new or old at least one probe")
    source = Path(checkpoint)
    scales = sorted({0.0, *map(float, grid)})
    for scale in scales:
        _config_at(source, scale)
    folder = Path(output) if output else source.absolute().parent / "dial"
    if folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"output: {folder} lies inside the checkpoint; give a folder beside it")
    from controlllm.benchmark import benchmark

    models = {scale: dialled(source, scale, folder / "checkpoints" / f"{scale:g}") for scale in scales}
    data = probe_data(models[0.0], config)
    scores = {scale: benchmark(model, data, config).path for scale, model in models.items()}
    points = [{"alpha_scale": s, "probes": compared(scores[0.0], found)} for s, found in scores.items()]
    result = {"checkpoint": source.absolute().name, "content": content_hash(source), "dtype": config.dtype}
    (folder / "dial.json").write_text(json.dumps(result | {"points": points}, indent=1))
    usage = f"controlllm.load({str(checkpoint)!r}, alpha_scale={scales[len(scales) // 2]:g})"
    _draw(points, folder, usage)
    console.print(_table(points, f"{source.absolute().name}: from the base model (0) to the trained one (1)"))
    console.print(f"{folder.absolute() / 'dial.html'}\nto use a value: {usage}", markup=False)
    return folder


def probe_config(**given: Any) -> BenchmarkConfig:
    """The benchmark's settings; those that are None are left to their defaults."""
    try:
        config = BenchmarkConfig.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{first['loc'][0]}: {first['msg']}, found {first['input']!r}" if first["loc"] else first["msg"]
        raise UserError(found) from None
    if unknown := [name for name in (*config.new, *config.old) if name not in PROBES]:
        raise UserError(f"unknown probe '{unknown[0]}'; known: {', '.join(probe_names())}")
    return config


def dialled(checkpoint: Path, alpha_scale: float, folder: Path) -> Path:
    """The checkpoint at `alpha_scale` in `folder`, its weights as links; itself where that is its own value."""
    values, source = _config_at(checkpoint, alpha_scale), checkpoint.resolve()
    own = json.loads((source / "config.json").read_text())["control"].get("alpha_scale", 1.0)
    if own == alpha_scale:
        return source
    shutil.rmtree(folder, ignore_errors=True)
    for file in source.rglob("*"):
        if file.is_file() and file.name not in OWN_FILES:
            link = folder / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    return folder


def probe_data(base: Path, config: BenchmarkConfig) -> Path:
    """The probes' items, as a run has them; `base` gives the answers that drift is measured from."""
    from controlllm.ingest import ingest_data

    return ingest_data(base, None, config, PackConfig()).path


def compared(before: Path, after: Path) -> dict[str, Json]:
    """Each task's change between two outputs of the benchmark, with its interval."""
    from controlllm.statistics import compare_scores

    found = compare_scores(before, after)
    for name, why in found["left_out"].items():
        raise UserError(f"{name}: {why}")
    return found["tasks"]


def _config_at(checkpoint: Path, alpha_scale: float) -> Json:
    """What config.json says at this scale, for a model of the expanded classes."""
    if not 0 <= alpha_scale <= 1:
        raise UserError(f"alpha_scale: {alpha_scale:g} is not within 0 (the base model) .. 1 (the trained model)")
    try:
        values = json.loads((checkpoint / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: has no config.json that can be read ({error}); give a checkpoint") from None
    if not values.get("control"):
        found = "has virtual tokens and no twins" if values.get("prompt") else "is a plain model"
        raise UserError(f"{checkpoint}: {found} (no control in config.json); give an expanded checkpoint")
    base = values.get("base_model_type", values["model_type"])
    classes = [f"Control{name.removeprefix('Control')}" for name in values["architectures"]]
    values |= {"model_type": "controlllm", "base_model_type": base, "architectures": classes}
    return values | {"control": values["control"] | {"alpha_scale": alpha_scale}}


def _table(points: list[Json], title: str) -> Any:
    """A row per measure, a column per scale; green and red where the whole interval differs from the base."""
    from rich.markup import escape as plain
    from rich.table import Table

    from controlllm.statistics import MEASURES

    table = Table("", "skill \\ alpha scale", title=plain(title), title_justify="left", show_edge=False)
    for point in points:
        table.add_column(f"{point['alpha_scale']:g}", justify="right")
    for role in ("new", "old", "drift"):
        for name, probe in points[0]["probes"].items():
            for metric in (probe["metrics"] if role == "new" else [probe["metric"]]) if probe["role"] == role else ():
                cells = [_cell(point["probes"][name]["metrics"][metric]) for point in points]
                table.add_row(role, plain(f"{probe['title']} ({MEASURES[metric].partition(',')[0]})"), *cells)
    return table


def _cell(change: Json) -> str:
    from controlllm.statistics import format_value

    sign = -1 if change["metric"] == "loss" else 1
    side = sign * ((change["low"] > 0) - (change["high"] < 0))
    text = format_value(change["after"], change["metric"])
    return f"[{'green' if side > 0 else 'red'}]{text}[/]" if side else text


def _draw(points: list[Json], folder: Path, usage: str) -> None:
    """dial.html, which needs nothing from elsewhere, and dial.png."""
    import vl_convert

    spec = _chart(points).to_dict()
    svg = vl_convert.vegalite_to_svg(spec).replace('xmlns="http://www.w3.org/2000/svg"', "")
    svg = svg.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")  # inside HTML it needs neither name
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Dial</title>
<body style="font-family: Arial, sans-serif; margin: 2em; background: white; color: black">
<h1>What each alpha scale brings and costs</h1>
<p>0 is the base model, 1 the trained one; shaded: 95 % intervals of the difference from the base.</p>
{svg}<p>To use a value: <code>{escape(usage)}</code></p></body></html>
"""
    (folder / "dial.html").write_text(page, encoding="utf-8")
    (folder / "dial.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=2))


def _chart(points: list[Json]) -> Any:
    """Gain and cost over the alpha scale, and the way between them."""
    import altair as alt

    new = [probe for point in points for probe in point["probes"].values() if probe["role"] == "new"]
    hits = all(p["metric"] != "loss" for p in new) and any(p["difference"] for p in new)
    unit = "points" if hits else "% of the base's loss"
    sides = {"new": _series(points, "new", hits=hits), "old": _series(points, "old", hits=False)}
    titles = {"new": f"New skills: gain, {unit}", "old": "Old skills: loss above the base's, %"}
    panels = [_over_scale(rows, titles[role]) for role, rows in sides.items() if rows]
    if all(sides.values()):
        panels.append(_way(points, sides, titles))
    chart = alt.hconcat(*panels).resolve_scale(color="independent").configure_view(stroke=None)
    return chart.configure(font="sans-serif", background="white").configure_axis(titleFontWeight="normal")


def _series(points: list[Json], role: str, *, hits: bool) -> list[Json]:
    """Differences from the base as {scale, skill, value, low, high}; of losses in percent, up is better for new."""
    rows = []
    for point in points:
        for probe in point["probes"].values():
            if probe["role"] == role:
                change = probe["metrics"][probe["metric"] if hits else "loss"]
                sign = -1 if role == "new" and not hits else 1
                factor = 100.0 if hits else sign * 100 / change["before"]
                low, high = sorted((factor * change["low"], factor * change["high"]))
                row = {"scale": point["alpha_scale"], "skill": probe["title"], "low": low, "high": high}
                rows.append(row | {"value": factor * change["difference"]})
    return rows


def _over_scale(rows: list[Json], title: str) -> Any:
    import altair as alt

    color = alt.Color(
        "skill:N",
        title=None,
        sort=None,
        scale=alt.Scale(range=COLOURS),
        legend=alt.Legend(orient="bottom", direction="vertical", symbolOpacity=1),
    )
    x = alt.X("scale:Q", title="alpha scale", scale=alt.Scale(domain=[0, 1]))
    shared = alt.Chart(alt.InlineData(values=rows), title=title).encode(x=x, color=color)
    band = shared.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    return (band + shared.mark_line(point=True).encode(y="value:Q")).properties(width=260, height=240)


def _way(points: list[Json], sides: Mapping[str, list[Json]], titles: Mapping[str, str]) -> Any:
    """From the base to the trained model in the plane of cost and gain; up and to the left is better."""
    import altair as alt

    def mean(role: str, scale: float) -> float:
        values = [row["value"] for row in sides[role] if row["scale"] == scale]
        return sum(values) / len(values)

    rows = [{"scale": s, "old": mean("old", s), "new": mean("new", s)} for s in (p["alpha_scale"] for p in points)]
    room = alt.Scale(padding=20, zero=False)  # for the numbers beside the points
    x, y = (alt.X("old:Q", title=titles["old"], scale=room), alt.Y("new:Q", title=titles["new"], scale=room))
    shared = alt.Chart(alt.InlineData(values=rows), title="From base (0) to trained (1), means").encode(x=x, y=y)
    line = shared.mark_line(point=True, color=COLOURS[0]).encode(order="scale:Q")
    return (line + shared.mark_text(dy=-10, fontWeight="bold").encode(text="scale:Q")).properties(width=260, height=240)
