"""Tasks of the probes: items that ingest wrote, scored as the task files in `probes/` say."""

from pathlib import Path
from typing import Any

import yaml

from controlllm.benchmark.task import PROBES as SUITE
from controlllm.benchmark.task import Task
from controlllm.data.probes import PROBES
from controlllm.errors import UserError
from controlllm.fingerprint import hash_file

FILES = Path(__file__).parent / "probes"
MEASURES = {"generate": "exact_match", "choice": "acc_norm"}
FILTERS = {"generate": "strip"}


def probe_task(name: str, data: Path) -> Task:
    """The probe whose items are `data/probes/<name>.jsonl`; what is generated is scored by its loss, too."""
    probe = PROBES[name]
    items = data / "probes" / f"{name}.jsonl"
    if not items.is_file():
        raise UserError(f"{items}: is missing; run the ingest stage again")
    names = (name, f"{name}_loss") if probe.kind == "generate" else (name,)
    return Task(
        name=name,
        title=probe.title,
        suite=SUITE,
        kind=probe.kind,
        harness=tuple(_file(each, items) for each in names),
        measure=MEASURES.get(probe.kind, "loss"),
        filter=FILTERS.get(probe.kind, "none"),
        items=len(items.read_text(encoding="utf-8").splitlines()),
        data=hash_file(items),
    )


def _file(name: str, items: Path) -> dict[str, Any]:
    """The probe's own task file, or the one for choices, with this run's items as its data."""
    file = FILES / f"{name}.yaml"
    task = yaml.safe_load((file if file.is_file() else FILES / "choice.yaml").read_text())
    return task | {"task": name, "dataset_kwargs": {"data_files": {"test": str(items)}}}
