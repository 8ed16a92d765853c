"""Folding a checkpoint: every pair becomes one block, and how far the plain model is from the one it came from."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlllm.appearing import appearing, refuse_present
from controlllm.config import BenchmarkConfig
from controlllm.dial import OWN_FILES, compared, dialled, probe_config, probe_data
from controlllm.distance import TEXTS, Document, batches, distance, read_documents
from controlllm.errors import UserError
from controlllm.progress import console, track
from controlllm.store import content_hash

Json = dict[str, Any]
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def fold(
    checkpoint: Path | str,
    output: Path | str,
    *,
    alpha: float | str | Path = "mean",
    other: Path | str | None = None,
    text: Path | str | None = None,
    new: list[str] | None = None,
    old: list[str] | None = None,
    items: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the folded checkpoint and its fold.json into `output`; returns it.

    `alpha` is `mean` (of what each pair does on half of the text), a number for all sites, or a file {layer: alpha}.
    Probes are measured before and after where `new` or `old` names some. The other half of the text is measured on.
    """
    final, runs = Path(output).absolute(), [Path(path) for path in (checkpoint, other) if path is not None]
    config = probe_config(new=new or [], old=old or [], items=items, batch_size=batch_size, dtype=dtype)
    refuse_present(final)
    sites = _check_runs(runs)
    given = _given_alphas(alpha, sites)
    documents = read_documents(Path(text) if text else None, _tokenizer(runs[0]))
    models = [_load(run) for run in runs]
    alphas = _alphas(models, sites, given, documents[0::2])
    folded, made = _folded(models, alphas), _made_of(runs, alphas)
    result: Json = {"alpha": str(alpha), "folded": made, "text": Path(text).name if text else list(TEXTS)}
    result["distance"] = [distance(model, folded, documents[1::2]) for model in models]
    with appearing(final) as folder:
        _save(folded, runs[0], folder, made)
        if new or old:
            result["benchmark"] = _benchmarks(runs, folder, config)
        (folder / "fold.json").write_text(json.dumps(result, indent=1))
    _print(result, final)
    return final


def _check_runs(runs: Sequence[Path]) -> list[list[int]]:
    """The base layers with pairs of each run; UserError, before any weights are read, where one cannot be folded."""
    from controlllm.control.fold import check_foldable
    from controlllm.control.settings import ControlSettings

    sites = []
    for run in runs:
        try:
            values = json.loads((run / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{run}: has no config.json that can be read ({error}); give a checkpoint") from None
        if values.get("prompt"):
            raise UserError(f"{run}: has virtual tokens, which no weight can hold; use it as it is (controlllm.load)")
        control = values.get("control")
        try:
            settings = check_foldable(ControlSettings.from_dict(control) if control else None, merged=len(runs) > 1)
        except UserError as error:
            raise UserError(f"{run}: {error}") from None
        sites.append(settings.paired_sites)
    return sites


def _given_alphas(alpha: float | str | Path, sites: list[list[int]]) -> dict[int, float] | None:
    """What a number or a file says, for every site; None where it is to be measured."""
    everywhere = sorted({site for some in sites for site in some})
    if alpha == "mean":
        return None
    try:
        value = float(str(alpha))
    except ValueError:
        found = _read_alphas(Path(str(alpha)))
    else:
        found = dict.fromkeys(everywhere, value)
    if wrong := [a for a in found.values() if not 0 <= a <= 1]:
        raise UserError(f"alpha: {wrong[0]:g} is not within 0 (the base model's block) .. 1 (the twin)")
    if sorted(found) != everywhere:
        raise UserError(f"alpha: {alpha} is for the layers {sorted(found)}; there are pairs at {everywhere}")
    return found


def _read_alphas(file: Path) -> dict[int, float]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text())  # JSON is YAML, too
        return {int(site): float(value) for site, value in values.items()}
    except FileNotFoundError:
        raise UserError(f"alpha: {file} is neither mean, a number of 0..1, nor a file") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError, AttributeError, OSError):
        raise UserError(f"alpha: {file} must be JSON or YAML of layers and alphas, as in {{7: 0.4, 15: 0.5}}") from None


def _tokenizer(run: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run)


def _load(run: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(run, dtype="auto")
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def _alphas(
    models: list[Any], sites: list[list[int]], given: Mapping[int, float] | None, documents: list[Document]
) -> list[dict[int, float]]:
    if given is not None:
        return [{site: given[site] for site in some} for some in sites]
    from controlllm.control.fold import measure_alphas

    found = []
    for model in models:
        with track("calibrate", total=len(documents), unit="texts") as advance:
            found.append(measure_alphas(model, (inputs for _, inputs in batches(documents, model.device, advance))))
    return found


def _folded(models: list[Any], alphas: list[dict[int, float]]) -> Any:
    from controlllm.control.fold import fold_model

    other = (models[1], alphas[1]) if len(models) > 1 else None
    return fold_model(models[0], alphas[0], other=other).to(models[0].device)


def _made_of(runs: list[Path], alphas: list[dict[int, float]]) -> list[Json]:
    return [
        {"checkpoint": run.absolute().name, "content": content_hash(run), "alphas": its}
        for run, its in zip(runs, alphas, strict=True)
    ]


def _save(folded: Any, checkpoint: Path, folder: Path, made: list[Json]) -> None:
    folded.config.lineage = {**(getattr(folded.config, "lineage", None) or {}), "folded": made}
    folded.save_pretrained(folder)
    rest = shutil.ignore_patterns(*WEIGHTS, *OWN_FILES)  # tokenizer, generation config, chat template, licences
    shutil.copytree(checkpoint, folder, ignore=rest, dirs_exist_ok=True)


def _benchmarks(runs: list[Path], folder: Path, config: BenchmarkConfig) -> list[Json]:
    """The folded model against each unfolded one."""
    import tempfile

    from controlllm.benchmark import benchmark

    with tempfile.TemporaryDirectory() as scratch:
        data = probe_data(dialled(runs[0], 0.0, Path(scratch) / "base"), config)
        after = benchmark(folder, data, config).path
        found = [compared(benchmark(run.resolve(), data, config).path, after) for run in runs]
    verdicts = ("verdict", "detail")  # on learning, which a fold does not
    return [{n: {k: v for k, v in p.items() if k not in verdicts} for n, p in probes.items()} for probes in found]


def _print(result: Json, folder: Path) -> None:
    """How far the folded model is, what the probes say, and what to do next."""
    from rich.markup import escape

    several = len(result["folded"]) > 1
    for index, made in enumerate(result["folded"]):
        alphas = made["alphas"].values()
        title = (
            f"{made['checkpoint']} folded, alpha {min(alphas):.3g} .. {max(alphas):.3g}"
            if alphas
            else "no pairs to fold"
        )
        title += f", with {result['folded'][1 - index]['checkpoint']}" if several else ""
        console.print(_distance_table(result["distance"][index], escape(title)))
        if "benchmark" in result:
            console.print(_benchmark_table(result["benchmark"][index]))
    usage = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}); controlllm is not needed to load it"
    console.print(f"{folder}\nnext: {usage}", markup=False)


def _distance_table(by_source: Mapping[str, Json], title: str) -> Any:
    from rich.table import Table

    from controlllm.statistics import MIN_ITEMS

    table = Table(title=title, title_justify="left", show_edge=False)
    for column in ("text", "documents", "KL, nats/token (95 %)", "same token", "loss: base", "unfolded", "folded"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for source, found in by_source.items():
        kl = f"{found['kl']:.2g}"
        if found["documents"] >= MIN_ITEMS:  # with fewer the interval is too narrow
            kl += f" ({found['kl_low']:.2g} .. {found['kl_high']:.2g})"
        losses = (f"{found[f'loss_{name}']:.3f}" for name in ("base", "unfolded", "folded"))
        table.add_row(source, str(found["documents"]), kl, f"{100 * found['same_first']:.1f} %", *losses)
    return table


def _benchmark_table(probes: Mapping[str, Json]) -> Any:
    from rich.table import Table

    from controlllm.statistics import MEASURES, format_signed, format_value

    table = Table(show_edge=False)
    for column in ("", "skill", "unfolded", "folded", "difference (95 %)"):
        table.add_column(column, justify="left" if column in ("", "skill") else "right")
    for probe in probes.values():
        for metric, change in probe["metrics"].items():
            ends = (format_value(change[end], metric) for end in ("before", "after"))
            low, high = (format_signed(change[end], metric) for end in ("low", "high"))
            difference = f"{format_signed(change['difference'], metric)} ({low} .. {high})"
            table.add_row(probe["role"], f"{probe['title']} ({MEASURES[metric].partition(',')[0]})", *ends, difference)
    return table
