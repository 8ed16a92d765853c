"""All units of a dataset to shards, in as many processes as there are cores; what is there is not made again."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlllm.config import DatasetConfig, PackConfig
from controlllm.data.held_out import HeldOut
from controlllm.data.job import Job, rows_to_drop
from controlllm.data.location import shown
from controlllm.data.manifest import Manifest, read_unit
from controlllm.data.render import Renderer
from controlllm.data.shard import Facts
from controlllm.data.shard_store import ShardStore
from controlllm.data.types import Documents, Unit
from controlllm.data.workers import build_units, unit_key, unit_keys_in_order, worker_count
from controlllm.errors import UserError
from controlllm.fingerprint import content_of
from controlllm.progress import track

SAMPLE = 1000
"""Documents on which the fast ways of rendering and tokenising are proven."""


@dataclass(frozen=True)
class Prepared:
    """A dataset's shards, in the order of its units."""

    name: str
    units: list[Facts]
    renderer: dict[str, Any]
    seconds: float
    computed: int
    """Units that were not there before."""

    def total(self, name: str, kind: str = "train") -> int:
        """Sum of a count (bins, documents, tokens, targets) over the units."""
        return sum(unit["files"].get(kind, {}).get(name, 0) for unit in self.units)

    @property
    def rows(self) -> int:
        return sum(unit["rows"] for unit in self.units)

    @property
    def tokens(self) -> int:
        return self.total("tokens")

    @property
    def packed_rows(self) -> int:
        return self.total("bins")


def make_job(
    dataset: DatasetConfig,
    manifest: Manifest,
    *,
    tokenizer_folder: Path,
    pack: PackConfig,
    where: str = "dataset",
    held_out: HeldOut | None = None,
) -> Job:
    """Loads the tokenizer and proves the fast paths on the first rows. Raises UserError for a dataset without rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    template = Path(pack.chat_template).read_text() if pack.chat_template else None
    renderer = Renderer(
        tokenizer, targets=pack.targets, date=pack.date, chat_template=template, tokenizer_mode=pack.tokenizer
    )
    job = Job(
        dataset,
        where,
        pack,
        renderer,
        held_out,
        stamps={file.uri: file.stamp for file in manifest.files},
        tokenizer=_tokenizer_hash(tokenizer, template or tokenizer.chat_template),
        vocabulary=len(tokenizer),
    )
    renderer.prove(_sample(job, manifest.units))
    return job


def _tokenizer_hash(tokenizer: Any, template: Any) -> str:
    """Over what the tokenizer does, and not over the folder it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return content_of([type(tokenizer).__name__, rules, template, tokenizer.special_tokens_map])


def _sample(job: Job, units: Sequence[Unit]) -> Documents:
    """The first documents that stay."""
    for unit in units:
        for batch in read_unit(unit, stamp=job.stamps[unit.uri], batch_rows=SAMPLE):
            documents, _, _ = job.documents(batch)
            if len(documents):
                return documents
    return Documents.of([], np.zeros(0, np.int64))


def prepare_dataset(
    job: Job,
    manifest: Manifest,
    *,
    shards: str | Path,
    workers: int | None = None,
) -> Prepared:
    """Make the shards that are missing, the first one in this process.

    Raises UserError with the first error of any process, or when too many rows are bad, or none is left.
    """
    began = time.monotonic()
    find_duplicates(job, manifest)
    found: dict[int, Facts] = {}
    computed = 0
    with track("prepare", total=max(manifest.bytes, 1), unit=job.dataset.name) as advance:
        for number, facts, new in make_units(job, manifest, range(len(manifest.units)), shards=shards, workers=workers):
            found[number] = facts
            computed += new
            done = sum(_size(manifest.units[n]) for n in found) if len(found) < len(manifest.units) else manifest.bytes
            advance(max(done, 1), f"{job.dataset.name} · {sum(f['rows'] for f in found.values()):,} rows")
    made = [found[number] for number in range(len(manifest.units))]
    check_units(job, made)
    return Prepared(job.dataset.name, made, renderer_facts(job), time.monotonic() - began, computed)


def make_units(
    job: Job, manifest: Manifest, numbers: Iterable[int], *, shards: str | Path, workers: int | None = None
) -> Iterator[tuple[int, Facts, bool]]:
    """(number, facts, whether it was made now) of these units, first those that are there already."""
    units, store = manifest.units, ShardStore(shards)
    missing: list[int] = []
    for number in numbers:
        if (facts := store.facts(unit_key(job, number, units[number]))) is not None:
            store.used(facts["key"])
            yield number, facts, False
        else:
            missing.append(number)
    for number, facts in build_units(job, units, missing, str(shards), workers):
        yield number, facts, True


def renderer_facts(job: Job) -> dict[str, Any]:
    """How the tokens were made, where it does not depend on which process made what."""
    return {name: job.renderer.facts()[name] for name in ("tokenizer", "tokenizer_reason", "plans")}


def find_duplicates(job: Job, manifest: Manifest, *, workers: int | None = None) -> None:
    """With `dedup`, the rows that repeat an earlier one: a pass over all rows, before the first shard."""
    if not job.dataset.dedup:
        return
    units, found = manifest.units, []
    with track("repeated rows", total=len(units), unit=job.dataset.name) as advance:
        for keys in unit_keys_in_order(job, units, workers or worker_count()):
            found.append(keys)
            advance(len(found))
    job.duplicates = rows_to_drop(found)


def check_units(job: Job, units: Sequence[Facts]) -> None:
    """Raise UserError when too many rows are bad, or none is left."""
    name = f"{job.where} ({job.dataset.name})"
    rows, bad = sum(u["rows"] for u in units), sum(u["bad_rows"] for u in units)
    if bad > job.pack.max_bad_rows * rows:
        first = next(row for unit in units for row in unit["bad"])
        field = f"field '{first['field']}': " if first["field"] else ""
        raise UserError(
            f"{name}: {first['file']}:{first['row']}: {field}{first['reason']} ({bad} of {rows} rows cannot be used; "
            f"pack.max_bad_rows allows a share of {job.pack.max_bad_rows:g})"
        )
    if not any(unit["files"].get("train", {}).get("bins") for unit in units):
        left_out = sum((Counter(unit["filtered"]) for unit in units), Counter())
        left_out |= {"validation": sum(u["files"].get("validation", {}).get("documents", 0) for u in units), "bad": bad}
        why = ", ".join(f"{n}: {count}" for n, count in left_out.items() if count)
        where = f"{rows} rows; left out: {why}" if rows else f"{shown(job.reader.source)} has none"
        raise UserError(f"{name}: no row is left to train on ({where})")


def _size(unit: Unit) -> int:
    return max(unit.end - unit.start, 1)
