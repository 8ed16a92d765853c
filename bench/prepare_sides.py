"""What bench/prepare.py measures, each in a process of its own: prints its result as JSON.

python bench/prepare_sides.py ours|first|peer|packing ROWS TOKENIZER OUTPUT CONTEXT
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.compute as pc

from controlllm.config import DatasetConfig, PackConfig
from controlllm.data.pack import best_fit, gather

WORKERS = 2
CONTEXTS = (4096, 8192)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""With the markers that `return_assistant_tokens_mask` needs; they leave no trace in the text."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Folders, but for the tokens in a packed row."""

    rows: Path
    tokenizer: Path
    output: Path
    context: int


class Clock:
    """CPU seconds of this process and of all that it starts, however they are forked, and wall seconds.

    Other processes are looked at every 20 ms: what one does in its last moments is missed, on either side.
    """

    def __init__(self) -> None:
        self.others: dict[int, float] = {}
        threading.Thread(target=self._watch, daemon=True).start()
        self.began = self._now()

    def read(self) -> Result:
        cpu, wall = (now - began for now, began in zip(self._now(), self.began, strict=True))
        return {"cpu": cpu, "wall": wall}

    def _now(self) -> tuple[float, float]:
        return time.process_time() + sum(self.others.values()), time.perf_counter()

    def _watch(self) -> None:
        while True:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self.others[process.pid] = times.user + times.system
            time.sleep(0.02)


def our_job(job: Job) -> tuple[Any, Any]:
    """What prepares the rows, and the listing of their files."""
    from controlllm.data.build import make_job
    from controlllm.data.manifest import list_source

    pack = PackConfig(context_length=job.context, overlong="truncate")
    source = f"{job.rows}/*.parquet"
    manifest = list_source(source, unit_rows=pack.unit_rows)
    dataset = DatasetConfig(name="chat", source=source, format="messages")
    return make_job(dataset, manifest, tokenizer_folder=job.tokenizer, pack=pack), manifest


def run_ours(job: Job) -> Result:
    from transformers import AutoTokenizer  # noqa: F401 - it is loaded when it is first asked for

    from controlllm.data.build import prepare_dataset

    clock = Clock()
    made = prepare_dataset(*our_job(job), shards=job.output / "shards")
    padding = 1 - made.tokens / made.packed_rows / job.context
    counts = {"tokens": made.tokens, "targets": made.total("targets"), "bins": made.packed_rows, "padding": padding}
    return clock.read() | counts


def run_first(job: Job) -> Result:
    """The first unit of the whole listing, as training begins while the others are made."""
    from transformers import AutoTokenizer  # noqa: F401 - as in run_ours

    from controlllm.data.build import make_units
    from controlllm.data.loader import collate
    from controlllm.data.shelf import StoredShelf

    clock = Clock()
    ours, manifest = our_job(job)
    shards = str(job.output / "shards")
    _, facts, _ = next(make_units(ours, manifest, [0], shards=shards, workers=1))
    batch = collate([StoredShelf("chat", [facts], shards).read(0, 0)])
    return clock.read() | {"tokens": batch.tokens}


def run_peer(job: Job) -> Result:
    import datasets
    from transformers import AutoTokenizer  # noqa: F401 - as in run_ours
    from trl import pack_dataset

    datasets.disable_caching()
    clock = Clock()
    tokens = tokenised(job)
    packed = pack_dataset(tokens, job.context, "bfd", map_kwargs={"num_proc": WORKERS})
    packed.save_to_disk(job.output / "packed", num_proc=WORKERS)
    return clock.read() | filled(packed, job.context)


def run_packing(job: Job) -> Result:
    from trl import pack_dataset

    tokens = tokenised(job)
    np.save(job.output / "lengths.npy", [len(ids) for ids in tokens["input_ids"]])
    results = {}
    for context in CONTEXTS:
        clock = Clock()
        packed = pack_dataset(tokens, context, "bfd", map_kwargs={"keep_in_memory": True})
        results[str(context)] = clock.read() | filled(packed, context)
    return results


def tokenised(job: Job) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    tokenizer.chat_template = CHATML

    def encode(rows: Any) -> Any:
        coded = tokenizer.apply_chat_template(
            rows["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {name: coded[name] for name in ("input_ids", "assistant_masks")}

    rows = Dataset.from_parquet([str(file) for file in sorted(job.rows.glob("*.parquet"))])
    return rows.map(encode, batched=True, num_proc=WORKERS, remove_columns=["messages"])


def filled(packed: Any, context: int) -> Result:
    tokens, targets = (
        pc.sum(pc.list_flatten(packed.data.table[name])).as_py() for name in ("seq_lengths", "assistant_masks")
    )
    return {"tokens": tokens, "targets": targets, "bins": len(packed), "padding": 1 - tokens / len(packed) / context}


def pack_ours(lengths: np.ndarray, context: int, unit_rows: int = PackConfig().unit_rows) -> Result:
    """Ids and targets of the rows moved to their places, unit by unit, as a shard's maker does."""
    lengths = np.minimum(lengths, context)
    ids, bins, choice = np.zeros(lengths.sum(), np.uint16), 0, 0.0
    target, starts = np.zeros(len(ids), bool), np.cumsum(lengths) - lengths
    clock = Clock()
    for begin in range(0, len(lengths), unit_rows):
        unit, chosen = slice(begin, begin + unit_rows), Clock()
        packed = best_fit(lengths[unit], context)
        choice += chosen.read()["cpu"]
        bins += len(packed)
        for values in (ids, target):
            gather(values, starts[unit][packed.items], lengths[unit][packed.items])
    return clock.read() | {"bins": bins, "padding": 1 - lengths.sum() / bins / context, "choice": choice}


SIDES: dict[str, Callable[[Job], Result]] = {
    "ours": run_ours, "peer": run_peer, "packing": run_packing, "first": run_first,
}  # fmt: skip


if __name__ == "__main__":
    job = Job(*map(Path, sys.argv[2:5]), context=int(sys.argv[5]))
    print(json.dumps(SIDES[sys.argv[1]](job)))
