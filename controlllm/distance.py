"""How far a folded model is from the one it came from, on texts: a file's, or the held-out probes' own."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.data.probes import PROBES
from controlllm.data.sources import read_rows
from controlllm.errors import UserError
from controlllm.progress import Advance, track

Json = dict[str, Any]
TEXTS = ("prose", "python", "chat")
"""The probes whose text is read where none is given."""
DOCUMENTS = 40
"""Of each of them."""
TOKENS = 512
"""Longer documents are cut."""
BATCH = 4
"""Documents at a time: their logits are most of the memory."""


@dataclass(frozen=True)
class Document:
    """Token ids, and where they are from."""

    source: str
    ids: list[int]


def read_documents(file: Path | None, tokenizer: Any) -> list[Document]:
    """The paragraphs or rows of a file, else passages of the held-out probes, spread over each."""
    texts = {file.name: _texts(file)} if file else {name: _probe_texts(name, tokenizer) for name in TEXTS}
    found = []
    for source, passages in texts.items():
        for passage in passages:
            ids = tokenizer(passage, truncation=True, max_length=TOKENS)["input_ids"]
            if len(ids) > 1:
                found.append(Document(source, ids))
    if len(found) < 2:
        raise UserError(f"{file}: found {len(found)} paragraphs or rows with text; give two at least: half calibrate")
    return found


def _texts(file: Path) -> list[str]:
    """Paragraphs of a text file, or the field `text` of JSON lines."""
    passages = []
    for number, row in enumerate(read_rows(str(file)), start=1):
        if not isinstance(row.get("text"), str):
            raise UserError(f"{file}: row {number} has no field 'text'; the row has: {', '.join(map(str, row))}")
        passages += re.split(r"\n\s*\n", row["text"]) if ".txt" in file.suffixes else [row["text"]]
    return [passage for passage in dict.fromkeys(map(str.strip, passages)) if passage]


def _probe_texts(name: str, tokenizer: Any) -> list[str]:
    probe = PROBES[name]
    try:
        found = [item for row in read_rows(probe.source) for item in probe.items(row)]
    except UserError as error:
        raise UserError(f"{error}; or give a text of your own with --text") from None
    count = min(DOCUMENTS, len(found))
    return [_passage(found[i * len(found) // count], tokenizer) for i in range(count)]


def _passage(item: Json, tokenizer: Any) -> str:
    from controlllm.data.render import chat_text

    if "messages" not in item:
        return item.get("text") or item["prompt"] + item["target"]
    turns = [*item["messages"], {"role": "assistant", "content": item["target"]}]
    if tokenizer.chat_template is None:
        return "\n".join(turn["content"] for turn in turns)
    return chat_text(turns, tokenizer).removeprefix(tokenizer.bos_token or "")


def distance(unfolded: Any, folded: Any, documents: list[Document]) -> dict[str, Json]:
    """KL(unfolded || folded) in nats, agreement and losses per token, by source and over all."""
    import torch

    rows = []
    with torch.inference_mode(), track("measure", total=len(documents), unit="texts") as advance:
        for some, inputs in batches(documents, unfolded.device, advance):
            rows += _rows(unfolded, folded, some, inputs)
    sources = dict.fromkeys(row["source"] for row in rows)
    found = {source: _summed([row for row in rows if row["source"] == source]) for source in sources}
    return found if len(found) == 1 else found | {"all": _summed(rows)}


def _rows(unfolded: Any, folded: Any, documents: list[Document], inputs: Json) -> Iterator[Json]:
    """Sums over each document's tokens."""
    import torch
    import torch.nn.functional as F

    from controlllm.control.loss import base_only

    with base_only(unfolded):
        logits = {"base": unfolded(**inputs, use_cache=False).logits}
    logits |= {
        "unfolded": unfolded(**inputs, use_cache=False).logits,
        "folded": folded(**inputs, use_cache=False).logits,
    }
    for row, document in enumerate(documents):
        targets = inputs["input_ids"][row, 1 : len(document.ids)]
        logs = {name: torch.log_softmax(each[row, : len(targets)].float(), -1) for name, each in logits.items()}
        kl = F.kl_div(logs["folded"], logs["unfolded"], reduction="none", log_target=True).sum(-1)
        same = logs["folded"].argmax(-1) == logs["unfolded"].argmax(-1)
        losses = {name: F.nll_loss(log, targets, reduction="sum").item() for name, log in logs.items()}
        sums = {"tokens": len(targets), "kl": kl.double().sum().item(), "same": int(same.sum())}
        yield {"source": document.source} | sums | losses


def _summed(rows: list[Json]) -> Json:
    import numpy as np

    from controlllm.statistics import bootstrap

    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0] if name != "source"}
    means = {name: float(column.sum() / columns["tokens"].sum()) for name, column in columns.items()}
    low, high = bootstrap(columns["kl"], columns["tokens"])
    counts = {"documents": len(rows), "tokens": int(columns["tokens"].sum())}
    losses = {f"loss_{name}": means[name] for name in ("base", "unfolded", "folded")}
    return counts | {"kl": means["kl"], "kl_low": low, "kl_high": high, "same_first": means["same"]} | losses


def batches(documents: list[Document], device: Any, advance: Advance) -> Iterator[tuple[list[Document], Json]]:
    """Padded on the right, the longest first."""
    import torch

    ordered = sorted(documents, key=lambda d: len(d.ids), reverse=True)
    for start in range(0, len(ordered), BATCH):
        some = ordered[start : start + BATCH]
        ids = torch.zeros(len(some), len(some[0].ids), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, document in enumerate(some):
            ids[row, : len(document.ids)] = torch.tensor(document.ids)
            mask[row, : len(document.ids)] = 1
        yield some, {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        advance(start + len(some))
