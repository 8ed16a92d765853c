"""The probe from folder to folder: the tuned model over all prompts, then its base, then what differs."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from controlllm.config import ProbeConfig
from controlllm.errors import UserError
from controlllm.fingerprint import hash_file
from controlllm.progress import console, track
from controlllm.store import Output, run_stage
from controlllm.tuned import as_base

Json = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A tuned checkpoint, and where its base is: inside it, or in a folder of its own."""

    tuned: Path
    base: Path | None
    name: str
    """Of the base, for people."""


def probe(
    checkpoint: Path | str,
    config: ProbeConfig,
    *,
    base: Path | str | None = None,
    to: Path | str | None = None,
    tensorboard: Path | str | None = None,
) -> Path:
    """Look inside a tuned model on prompts; returns the folder with probe.json, probe.parquet and probe.html.

    base: its base model's folder, which expanded checkpoints and those with virtual tokens hold themselves. to: by
    default `probe` beside the checkpoint. tensorboard: a folder for scalars, histograms and the figures. One model is
    in memory at a time; hidden states lie on the disk. UserError for what is missing or does not fit.
    """
    pair = _pair(Path(checkpoint), None if base is None else Path(base))
    folder = Path(to) if to else pair.tuned.absolute().parent / "probe"
    if folder.resolve().is_relative_to(pair.tuned.resolve()):
        raise UserError(f"--to: {folder} lies inside the checkpoint; give a folder beside it")
    if tensorboard:
        from controlllm.probe.tensorboard import refuse_missing

        refuse_missing()
    from transformers import AutoTokenizer

    from controlllm.probe.prompts import read_prompts

    tokenizer = AutoTokenizer.from_pretrained(pair.tuned)
    prompts = read_prompts(config, tokenizer)
    for prompt in prompts:
        if prompt.cut:
            console.print(
                f"  {prompt.where}: cut to its first {len(prompt.ids)} tokens, {prompt.cut} left out", markup=False
            )
    result, rows, maps = _measured(pair, config, prompts, tokenizer)
    _write(folder, result, rows, maps)
    if tensorboard:
        from controlllm.probe.tensorboard import write_events

        write_events(Path(tensorboard), result, rows)
    _say(result, folder)
    return folder


def _pair(tuned: Path, base: Path | None) -> Pair:
    values = _config_of(tuned)
    lineage = values.get("lineage") or {}
    name = lineage.get("base_model")
    if values.get("control") or values.get("prompt"):
        if base is not None:
            what = "is expanded" if values.get("control") else "has virtual tokens"
            raise UserError(f"--base {base}: {tuned} {what} and holds its base itself; leave it out")
        return Pair(tuned, None, name or "base model")
    if base is None:
        known = f"; by its lineage that is {name}" if name else ""
        raise UserError(f"{tuned}: is a plain model; give the folder of the one it was made from with --base{known}")
    found = _config_of(base)
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if found.get(key) != values.get(key):
            raise UserError(f"--base {base}: {key} is {found.get(key)}, but {values.get(key)} in {tuned}: not its base")
    if lineage.get("base_content"):
        from controlllm.store import content_hash

        if content_hash(base) != lineage["base_content"]:
            console.print(f"  {base} is not, file by file, the base that {tuned.name} names ({name})", markup=False)
    return Pair(tuned, base, name or base.absolute().name)


def _config_of(folder: Path) -> Json:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: has no config.json that can be read ({error}); give a model's folder") from None


def _measured(pair: Pair, config: ProbeConfig, prompts: list[Any], tokenizer: Any) -> tuple[Json, list[Json], Json]:
    """The result, the rows of probe.parquet, and the attention maps of drawn prompts."""
    from controlllm.probe.measure import layers_of
    from controlllm.probe.passes import over_prompts
    from controlllm.probe.result import build_result

    with TemporaryDirectory() as scratch, track("probe", total=2 * len(prompts), unit="prompts") as advance:
        model = _loaded(pair.tuned, config.dtype, virtual=True)
        layers, dtype = layers_of(model), str(model.dtype).removeprefix("torch.")
        targets: list[int | None] = [None] * len(prompts)
        tuned = over_prompts(model, prompts, targets, config, Path(scratch, "tuned"), advance)
        if pair.base is not None:
            del model
            model = _loaded(pair.base, dtype, virtual=False)
        with as_base(model) if pair.base is None else nullcontext():
            same = [taken.target for taken in tuned]  # of one token's logit in both models
            base = over_prompts(model, prompts, same, config, Path(scratch, "base"), advance, done=len(prompts))
        del model
        result, rows = build_result(layers, prompts, base, tuned, config, tokenizer)
    maps = {f"{i}.{layer}": site.maps for i, t in enumerate(tuned) for layer, site in t.sites.items() if site.maps}
    about = {"checkpoint": "/".join(pair.tuned.absolute().parts[-2:]), "base": pair.name, "dtype": dtype}
    settings = config.model_dump(exclude={"prompts"})
    return about | {"settings": settings} | result, rows, maps


def _loaded(folder: Path, dtype: str | None, *, virtual: bool) -> Any:
    """On the GPU if there is one. Only the eager attention gives its maps; both models run with it."""
    import torch
    from transformers import AutoModelForCausalLM

    from controlllm.tuned import load_tuned

    load = load_tuned if virtual else AutoModelForCausalLM.from_pretrained
    model: Any = load(folder, dtype=dtype or "auto")
    model.set_attn_implementation("eager")
    return model.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _write(folder: Path, result: Json, rows: list[Json], maps: Json) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from controlllm.probe.figures import draw
    from controlllm.probe.page import render

    figures = draw(result, rows, maps)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "probe.parquet")
    result["figures"] = [{"title": f.title, "caption": f.caption, "svg": str(f.svg)} for f in figures]
    (folder / "probe.json").write_text(json.dumps(result, allow_nan=False))
    (folder / "probe.html").write_text(render(result, figures), encoding="utf-8", errors="replace")
    if maps:
        from safetensors.torch import save_file

        parts = ("frozen", "twin")
        tensors = {
            f"prompt{k}.{p}": m.half().contiguous() for k, v in maps.items() for p, m in zip(parts, v, strict=True)
        }
        save_file(tensors, folder / "attention.safetensors")


def _say(result: Json, folder: Path) -> None:
    most, least = result["most_moved"], result["least_cka"]
    where = f"token '{most['token']}' ({most['position']}) of prompt {most['prompt']}, layer {most['layer']}"
    moved = f"moved most: {where}: {most['angle']:.1f}° from the base" if most["angle"] else "no hidden state moved"
    console.print(f"  {moved}", markup=False)
    if least:
        console.print(f"  least alike: layer {least['layer']}, CKA {least['cka']:.4f}", markup=False)
    for site in result["sites"]:
        spread = (
            "" if site["alpha_min"] == site["alpha_max"] else f" ({site['alpha_min']:.2f}..{site['alpha_max']:.2f})"
        )
        apart = f"twin {100 * site['distance']:.1f} % of the frozen output's length away"
        console.print(f"  layer {site['layer']:>3}: alpha {site['alpha']:.3f}{spread}, {apart}", markup=False)
    if not folder.name.endswith(".partial"):  # a stage's folder that has no name yet
        console.print(str(folder.absolute() / "probe.html"), markup=False)


def probe_stage(model: Path, base: Path, config: ProbeConfig) -> Output:
    """The same as a stage of a run, whose base is at hand for a tuned model that does not hold its own."""
    inside = _config_of(model)
    own = None if inside.get("control") or inside.get("prompt") else base
    file = {"file": hash_file(Path(config.prompts))} if isinstance(config.prompts, str) else {}
    return run_stage(
        "probe",
        config={"probe": config.model_dump() | file},
        parents={"model": model, "ingest model": base},
        build=lambda folder: probe(model, config, base=own, to=folder),
    )
