"""The model card: what a checkpoint is, what it learned and forgot, and how to load and make it again, as Markdown."""

import re
from pathlib import Path
from typing import Any

from controlllm.card_data import base_id, datasets_of, front_matter, is_expanded, licence_of
from controlllm.errors import UserError
from controlllm.progress import duration
from controlllm.record import Record, open_record

Json = dict[str, Any]
SHARES = {"exact_match": "exact match", "accuracy": "accuracy", "pass": "pass@1", "score": "score"}
# Settings that a reader of a card asks for; none of them can hold a path.
SETTINGS = {
    "train": ("trainer", "steps", "tokens", "lr", "global_batch_size", "precision", "seed"),
    "train.optimizer": ("name", "beta1", "beta2", "weight_decay", "max_grad_norm"),
    "train.schedule": ("kind", "warmup_steps", "final_fraction"),
    "pack": ("context_length", "targets", "overlong"),
    "mix": ("seed", "temperature", "order", "decontaminate"),
    "control": (
        "layout",
        "num_expanded",
        "interpolation",
        "alpha",
        "divergence",
        "divergence_weight",
        "teacher",
        "twin",
    ),
    "lora": ("rank", "alpha", "dropout", "dora"),
    "quantization": ("kind",),
}


def make_card(target: Path, *, license: str | None = None, base_model: str | None = None) -> str:
    """The card of a run or a checkpoint. `license`, `base_model` (an id on the Hub) win over what was recorded.

    Raises UserError where the target is neither, or a value is none that the Hub takes.
    """
    return card_of(open_record(target), license=license, base_model=base_model)


def card_of(
    record: Record, *, license: str | None = None, base_model: str | None = None, repo: str | None = None
) -> str:
    """Checked with the Hub's own reader: the front matter is what it will see."""
    from huggingface_hub import ModelCard

    about = record.model_config.get("lineage") or {}
    name = repo.rpartition("/")[2] if repo else record.name
    data = front_matter(record, about, name=name, license=license, base_model=base_model)
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(record, about, name, license, base_model, repo)}"
    read = ModelCard(text).data.to_dict()
    assert read == data.to_dict(), "the Hub reads the card's front matter otherwise"
    return text


def write_card(text: str, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--to: {file} cannot be written: {error.strerror}") from None


def _body(record: Record, about: Json, name: str, license: str | None, base_model: str | None, repo: str | None) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("controlllm"),
        autoescape=False,  # noqa: S701 - Markdown, not HTML: every value passes the filter md or code
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escaped, "code": code, "duration": duration}
    return environment.get_template("card.md").render(
        name=name,
        repo=re.sub(r"[^\w./-]", "-", repo or name, flags=re.ASCII),
        summary=record.summary,
        base={"title": None, "organization": None, **about.get("base", {})}
        | {"name": about.get("base_model", "not recorded"), "id": base_id(about, base_model)},
        licence={"license_name": None, "license_link": None, **licence_of(about, license)},
        expanded=is_expanded(record),
        config=dict.fromkeys(("control", "prompt", "num_hidden_layers")) | record.model_config,
        about=dict.fromkeys(("base_content", "quantization", "code")) | about,
        rows=[_row(task) for task in record.tasks.values()],
        datasets=datasets_of(record, about),
        data=record.made.get("prepare/stats.json", {}),
        train=record.summary.get("train") or record.made.get("train/train.json", {}),
        settings=_settings(record.config),
        versions=versions(record),
        machine=record.summary.get("environment", {}).get("machine", {}),
        cost={"flops": None, "memory": None, **record.summary.get("cost", {})},
        left_out=record.summary.get("comparison", {}).get("left_out", {}),
        stages=record.results,
    )


def versions(record: Record) -> dict[str, str]:
    """Of the libraries that made the results."""
    found: dict[str, str] = {}
    for lineage in record.stages.values():
        inputs = lineage["inputs"].items()
        found |= {n.removeprefix("version of "): v for n, v in inputs if n.startswith("version of ") and v}
    return dict(sorted(found.items()))


def escaped(value: Any) -> str:
    """Text in which Markdown and HTML see nothing but text, on one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", line)


def code(value: Any) -> str:
    """A code span, whatever is in it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split()).replace("|", "¦")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _row(task: Json) -> Json:
    metric = task["metric"]
    share = metric != "loss"

    def signed(value: float) -> str:
        return (f"{100 * value:+.1f}" if share else f"{value:+.3f}").replace("-", "−")

    def plain(value: float) -> str:
        return f"{100 * value:.1f} %" if share else f"{value:.3f}"

    change = signed(task["difference"]) + (" points" if share else "")
    if task.get("low") is not None:
        change += f" [{signed(task['low'])}, {signed(task['high'])}]"
    return {
        "title": task["title"],
        "role": task["role"],
        "measure": SHARES.get(metric, "loss, nats per token" if metric == "loss" else metric),
        "items": task["items"],
        "before": plain(task["before"]),
        "after": plain(task["after"]),
        "change": change,
        "verdict": task["verdict"],
    }


def _settings(config: Json) -> list[tuple[str, Any]]:
    rows = []
    for section, names in SETTINGS.items():
        place: Any = config
        for key in section.split("."):
            place = (place or {}).get(key)
        rows += [(f"{section}.{n}", place[n]) for n in names if isinstance(place, dict) and place.get(n) is not None]
    return rows
