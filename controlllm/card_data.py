"""The front matter of a model card: what the Hub reads of it."""

import re
from typing import Any

from controlllm.errors import UserError
from controlllm.record import Record

Json = dict[str, Any]

# As the Hub's list of licences has them; whatever else is `other`, with a name of its own.
LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "gemma", "gfdl",
    "gpl", "gpl-2.0", "gpl-3.0", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl",
    "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++", "osl-3.0", "pddl", "postgresql", "unlicense",
    "wtfpl", "zlib",
}  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_METRICS = {"exact_match": "exact_match", "accuracy": "accuracy", "pass": "pass@1", "loss": "loss", "score": "score"}


def front_matter(record: Record, about: Json, *, name: str, license: str | None, base_model: str | None) -> Any:
    """huggingface_hub's ModelCardData. `about` is the checkpoint's lineage; values that the Hub refuses are left out.

    base_model: the base's id on the Hub, if `about` does not have it.
    """
    from huggingface_hub import ModelCardData

    base = base_id(about, base_model)
    datasets = {row["hub"] for row in datasets_of(record, about) if row["hub"]}
    values: dict[str, Any] = dict(licence_of(about, license))
    return ModelCardData(
        model_name=name,
        base_model=base,
        base_model_relation="finetune" if base else None,
        language=[code for code in _listed(about.get("base", {}).get("language")) if _LANGUAGE.fullmatch(code)] or None,
        library_name="controlllm" if is_expanded(record) else "transformers",
        pipeline_tag="text-generation",
        tags=["controlllm", "control-llm"],
        datasets=sorted(datasets) or None,
        eval_results=list(_results(record)) or None,
        **values,
    )


def licence_of(about: Json, chosen: str | None) -> dict[str, str]:
    """`license` and, where it is none of the Hub's, `license_name` and `license_link`.

    {"license": "other"} alone says that it is not known. UserError for a chosen one that is no single word.
    """
    stated = about.get("base", {})
    found = chosen or " ".join(_listed(stated.get("license"))[:1])
    if chosen and not re.fullmatch(r"[\w.+-]+", chosen):
        raise UserError(
            f"--license: '{chosen}' is no licence's id; write one such as apache-2.0, or a name in one word"
        )
    if found.lower() in LICENCES:
        return {"license": found.lower()}
    named = {key: str(stated[key]) for key in ("license_name", "license_link") if stated.get(key) and not chosen}
    if found and found.lower() != "other" and "license_name" not in named:
        named["license_name"] = found.lower()
    return {"license": "other"} | named


def base_id(about: Json, chosen: str | None = None) -> str | None:
    """The base's id on the Hub; None for a folder or a file of a package."""
    if chosen and not _HUB_ID.fullmatch(chosen):
        raise UserError(f"--base-model: '{chosen}' is no id on the Hub; write it as owner/name")
    name = chosen or str(about.get("base_model", ""))
    return name if _HUB_ID.fullmatch(name) else None


def datasets_of(record: Record, about: Json) -> list[Json]:
    """What the model was trained on: name, licence, rows, and its id on the Hub or the kind of place it came from."""
    from controlllm.data.catalog import CATALOG, dataset_names

    dataset_names()  # those of other packages, too
    given = record.config.get("mix", {}).get("datasets") or [
        {"name": n} for n in about.get("data", {}).get("datasets", [])
    ]
    return [_dataset(row, CATALOG.get(row["name"])) for row in given]


def _dataset(row: Json, known: Any) -> Json:
    source = str(row.get("source") or (known.source if known else ""))
    own = row.get("source") or not known
    hub = re.match(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)", source)
    kind = source.partition("://")[0] if "://" in source else "a file"
    return {
        "name": row["name"],
        "license": "not known" if own else known.license,
        "rows": row.get("rows"),
        "hub": hub.group(1) if hub else None,
        "kind": kind,
    }


def is_expanded(record: Record) -> bool:
    """Whether transformers needs controlllm to load the checkpoint."""
    return record.model_config.get("model_type") == "controlllm"


def _results(record: Record) -> Any:
    from huggingface_hub import EvalResult

    for name, task in record.tasks.items():
        if task["role"] == "drift":
            continue
        for metric, change in (task.get("metrics") or {task["metric"]: task}).items():
            yield EvalResult(
                task_type="text-generation",
                task_name=f"{task['suite']}: {task['role']} skill",
                dataset_type=name,
                dataset_name=task["title"],
                metric_type=_METRICS.get(metric) or str(metric),
                metric_name=f"{metric.replace('_', ' ')} (base model: {change['before']:.4f})",
                metric_value=round(change["after"], 4),
            )


def _listed(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value] if value else [])]
