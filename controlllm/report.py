"""The report stage: one HTML page of what was learned and what was forgotten, and its numbers as summary.json."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.progress import console, duration
from controlllm.store import read_lineage

Json = dict[str, Any]
SAMPLES = 3
"""Right answers shown, and as many wrong ones."""


@dataclass(frozen=True)
class StageTime:
    """One stage of the run, in stage order."""

    stage: str
    seconds: float
    cached: bool
    key: str
    finished: str


def build_report(
    folder: Path,
    *,
    name: str,
    method: str,
    base_scores: Path,
    tuned_scores: Path,
    train: Path,
    prepare: Path,
    smoke: Path | None,
    contrasts: Mapping[str, Path],
    stages: Sequence[StageTime],
    config: Mapping[str, Any],
) -> None:
    """Write folder/report.html and folder/summary.json.

    A contrast is a folder with another run's summary.json; only what both runs measured alike is drawn side by side.
    """
    base = _read(base_scores / "scores.json")
    summary = {"name": name, "method": method, "base": base["model"], **_compare(base_scores, tuned_scores)}
    summary |= {"headline": _headline(summary), "train": _read(train / "train.json")}
    runs = [summary, *(_contrast(run, path, summary) for run, path in contrasts.items())]
    made = {
        "data": prepare,
        "training": train,
        "benchmark of the base": base_scores,
        "benchmark of the tuned": tuned_scores,
    }
    if smoke is not None:
        made["smoke test"] = smoke
    page = _render(
        runs=runs,
        metrics=_read_lines(train / "metrics.jsonl"),
        data=_read((train if (train / "stats.json").exists() else prepare) / "stats.json"),
        smoke=None if smoke is None else _read(smoke / "smoke.json"),
        samples={
            p["title"]: _samples(base_scores, tuned_scores, key)
            for key, p in summary["new"].items()
            if p["kind"] == "generate"
        },
        lineage={what: read_lineage(path) for what, path in made.items()},
        stages=[asdict(stage) for stage in stages],
        config=config,
    )
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False))
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")


def print_summary(folder: Path, report: Path) -> None:
    """New skills before → after, old skills before → after with their verdicts, then where the report lies."""
    from rich.markup import escape
    from rich.table import Table

    from controlllm.statistics import MEASURES, format_value

    summary = _read(folder / "summary.json")
    table = Table(title=escape(f"{summary['name']}: {summary['method']}"), title_justify="left", show_edge=False)
    for column in ("", "skill", "before", "after", "verdict"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    colours = {"learned": "green", "kept": "green", "improved": "green", "lost": "red", "worse": "red"}
    for role in ("new", "old", "drift"):
        for probe in summary[role].values():
            skill = escape(f"{probe['title']} ({MEASURES[probe['metric']].partition(',')[0]})")
            before, after = (format_value(probe[end], probe["metric"]) for end in ("before", "after"))
            colour = colours.get(probe["verdict"], "yellow")
            table.add_row(role, skill, before, after, f"[{colour}]{escape(probe['detail'])}[/]")
    console.print(table)
    console.print(str(report.absolute()), markup=False)


def _compare(base_scores: Path, tuned_scores: Path) -> Json:
    """{"new": {probe: ...}, "old": ..., "drift": ...}: everything is computed again from the items."""
    from controlllm.statistics import compare_probe

    base, tuned = (_read(folder / "scores.json")["probes"] for folder in (base_scores, tuned_scores))
    if base.keys() != tuned.keys():
        raise UserError(
            f"{base_scores} has the probes {sorted(base)}, {tuned_scores} {sorted(tuned)}: measure both alike"
        )
    found: Json = {"new": {}, "old": {}, "drift": {}}
    for name, probe in base.items():
        before, after = _items(base_scores, name), _items(tuned_scores, name)
        if [(row["id"], row["tokens"]) for row in before] != [(row["id"], row["tokens"]) for row in after]:
            raise UserError(f"{tuned_scores}: its {name} items are not those of {base_scores}: measure both alike")
        result = compare_probe(probe, before, after)
        for scores, end in ((probe, "before"), (tuned[name], "after")):
            for metric, change in result["metrics"].items():
                if not math.isclose(scores["metrics"][metric], change[end], rel_tol=1e-3, abs_tol=1e-3):
                    said = scores["metrics"][metric]
                    raise UserError(f"{name}: {metric} {end} is {said} in scores.json, {change[end]:.5f} by its items")
        found[probe["role"]][name] = result
    return found


def _items(scores: Path, probe: str) -> list[Json]:
    """The probe's items by id; a loss that is not a number has no place in an average."""
    rows = sorted(_read_lines(scores / "items" / f"{probe}.jsonl"), key=lambda row: row["id"])
    for row in rows:
        if not math.isfinite(row["loss"]) or row["tokens"] < 1:
            raise UserError(
                f"{scores}: item {row['id']} of {probe} has loss {row['loss']} over {row['tokens']} tokens; "
                "a model that diverged cannot be compared: try a lower train.lr"
            )
    if not rows:
        raise UserError(f"{scores}: probe {probe} has no items")
    return rows


def _headline(summary: Json) -> str:
    """The outcome in one line: every new skill with its numbers, then the old ones by verdict."""
    from controlllm.statistics import format_relative, format_signed

    parts = [_new_skill(probe) for probe in summary["new"].values()]
    names: dict[str, list[str]] = {"kept": [], "lost": [], "improved": [], "unclear": []}
    for probe in summary["old"].values():
        change = format_signed(probe["difference"], probe["metric"])
        if probe["metric"] == "loss":
            change = format_relative(probe["difference"], probe["before"])
        names[probe["verdict"]].append(
            probe["title"] + (f" ({change})" if probe["verdict"] in ("lost", "improved") else "")
        )
    for verdict, titles in names.items():
        if titles or (verdict in ("kept", "lost") and summary["old"]):
            parts.append(f"{verdict.capitalize()}: {', '.join(titles) or 'none'}.")
    return " ".join(parts)


def _new_skill(probe: Json) -> str:
    """`Puzzles solved: 0 % → 22.3 % (loss 1.742 → 0.407).`"""
    from controlllm.statistics import format_value

    def arrow(metric: str) -> str:
        change = probe["metrics"][metric]
        return f"{format_value(change['before'], metric)} → {format_value(change['after'], metric)}"

    if probe["metric"] == "loss":
        return f"{probe['title']} {probe['verdict']}: loss {arrow('loss')}."
    measure = "solved" if probe["metric"] == "exact_match" else "answered right"
    said = measure if probe["verdict"] == "learned" else f"{probe['verdict']}: {measure}"
    return f"{probe['title']} {said}: {arrow(probe['metric'])} (loss {arrow('loss')})."


def _contrast(name: str, folder: Path, summary: Json) -> Json:
    """Another run's summary, less the probes that it measured otherwise: on other items or from another base model."""
    if name == summary["name"]:
        raise UserError(f"report.contrast: {name} is this run itself; leave it out")
    other = _read(folder / "summary.json") | {"name": name, "apart": []}
    for role in ("new", "old", "drift"):
        alike = {key: probe for key, probe in other[role].items() if _alike(probe, summary[role].get(key))}
        other["apart"] += [probe["title"] for key, probe in summary[role].items() if key not in alike]
        other[role] = alike
    return other | {"headline": _headline(other)}


def _alike(probe: Json, mine: Json | None) -> bool:
    if mine is None or any(probe[key] != mine[key] for key in ("kind", "items", "tokens")):
        return False
    return all(
        math.isclose(probe["metrics"][m]["before"], mine["metrics"][m]["before"], rel_tol=1e-6) for m in mine["metrics"]
    )


def _samples(base_scores: Path, tuned_scores: Path, probe: str) -> list[Json]:
    """A few right and a few wrong items with both answers, spread evenly over each group: nobody picks."""
    pairs = zip(_items(base_scores, probe), _items(tuned_scores, probe), strict=True)
    pairs = [{"before": before, "after": after} for before, after in pairs]
    groups = []
    for right in (True, False):
        group = [pair for pair in pairs if pair["after"]["correct"] is right]
        count = min(SAMPLES, len(group))
        shown = [group[index * len(group) // count] for index in range(count)]
        groups.append({"right": right, "total": len(group), "shown": shown})
    return groups


def _render(*, runs: list[Json], metrics: list[Json], config: Mapping[str, Any], **context: Any) -> str:
    import yaml
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from controlllm import charts, statistics

    environment = Environment(
        loader=PackageLoader("controlllm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = ("value", "signed", "relative", "p")
    environment.filters |= {name: getattr(statistics, f"format_{name}") for name in formats} | {"duration": duration}
    drift = charts.drift_figure(runs)
    return environment.get_template("report.html").render(
        runs=runs,
        new_figures=charts.new_skill_figures(runs),
        old_figures=[*charts.old_skill_figures(runs), *([drift] if drift else [])],
        training_figures=charts.training_figures(metrics),
        colours=[charts.run_colour(index) for index in range(len(runs))],
        measures=statistics.MEASURES,
        hits=set(statistics.HITS.values()),
        config=yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False, allow_unicode=True),
        **context,
    )


def _read(file: Path) -> Json:
    return json.loads(_text(file))


def _read_lines(file: Path) -> list[Json]:
    return [json.loads(line) for line in _text(file).split("\n") if line]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; run the stage that makes it again") from None
