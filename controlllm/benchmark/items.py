"""A row per item: what was asked, what was right, what the model gave; as Parquet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlllm.benchmark.task import Task
from controlllm.errors import UserError

Row = dict[str, Any]
Sample = dict[str, Any]


def read_items(folder: Path, name: str) -> list[Row]:
    """The items of a task in a folder of results. UserError where they are not there or cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "items" / f"{name}.parquet"
    try:
        return pq.read_table(file).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; measure the model again (controlllm benchmark)") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: is no Parquet file that can be read ({error}); measure the model again") from None


def write_items(file: Path, rows: Sequence[Row]) -> None:
    """{id, subtask, prompt, target, output, correct, score, loss (nats over the target), tokens (of the target), reason
    (why a program failed)}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"id": pa.int64(), "subtask": pa.string(), "prompt": pa.string(), "target": pa.string()}
    types |= {"output": pa.string(), "correct": pa.bool_(), "score": pa.float64()}
    types |= {"loss": pa.float64(), "tokens": pa.int64(), "reason": pa.string()}
    file.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(list(types.items()))), file, compression="zstd")


def items_of(task: Task, samples: Mapping[str, Sequence[Sample]], lm: Any) -> list[Row]:
    """Rows of what lm-eval logged, in its order. A subtask `<name>_loss` gives the losses of `<name>`'s items."""
    rows = []
    for subtask, logged in samples.items():
        if subtask.endswith("_loss") and subtask.removesuffix("_loss") in samples:
            continue
        losses = {s["doc_id"]: s for s in samples.get(f"{subtask}_loss", ())}
        chosen = [s for s in logged if s["filter"] == task.filter]
        if not chosen:
            found = ", ".join(sorted({s["filter"] for s in logged})) or "none"
            raise UserError(f"{task.name}: {subtask} has no filter '{task.filter}'; it has {found}")
        for sample in sorted(chosen, key=lambda s: s["doc_id"]):
            row = _row(task, sample, lm) | {"subtask": subtask}
            if sample["doc_id"] in losses:
                row |= _scored(losses[sample["doc_id"]], 0, lm)
            rows.append(row)
    return _right_or_wrong(rows)


def _right_or_wrong(rows: list[Row]) -> list[Row]:
    """Scores of 0 and 1 alone say right and wrong; where one lies between, all stay scores."""
    if any(row["score"] is None or row["score"] not in (0, 1) for row in rows):
        return rows
    return [row | {"correct": bool(row["score"]), "score": None} for row in rows]


def metrics_of(task: Task, rows: Sequence[Row]) -> dict[str, float]:
    """The primary metric first: the share of right answers where there are any, else the loss per target token."""
    found: dict[str, float] = {}
    if all(row["correct"] is not None for row in rows):
        found[task.metric] = sum(row["correct"] for row in rows) / len(rows)
    elif all(row["score"] is not None for row in rows):
        found["score"] = sum(row["score"] for row in rows) / len(rows)
    if all(row["loss"] is not None for row in rows) and (tokens := tokens_of(rows)):
        found["loss"] = sum(row["loss"] for row in rows) / tokens
    return found


def tokens_of(rows: Sequence[Row]) -> int:
    return sum(row["tokens"] or 0 for row in rows)


def _row(task: Task, sample: Sample, lm: Any) -> Row:
    doc = sample["doc"]
    row: Row = {"id": sample["doc_id"], "output": None, "correct": None, "score": None, "loss": None, "tokens": 0}
    if task.kind in ("text", "drift", "loss"):
        return row | _likelihood(task, sample, lm)
    row |= {"prompt": _argument(sample, 0)[0], "score": _measured(task, sample)}
    if task.kind == "choice":
        return row | _choice(task, sample, lm)
    row |= {"target": _target(doc, sample), "output": _said(sample)}
    return row | ({"reason": sample["filtered_resps"][0]["reason"]} if task.kind == "code" else {})


def _likelihood(task: Task, sample: Sample, lm: Any) -> Row:
    """A text whole, or an answer after its question."""
    doc = sample["doc"]
    if task.kind == "text":
        text, response = doc["text"], sample["filtered_resps"][0]
        total = response[0] if isinstance(response, tuple | list) else response
        return {"prompt": "", "target": text, "loss": round(-float(total), 6), "tokens": lm.count(text)}
    prompt, target = _argument(sample, 0)
    return {"prompt": prompt, "target": doc.get("target", target)} | _scored(sample, 0, lm)


def _choice(task: Task, sample: Sample, lm: Any) -> Row:
    """The choice taken and the right one; with its loss where the harness says which one is right."""
    choices = [_argument(sample, i) for i in range(len(sample["filtered_resps"]))]
    texts = [continuation.strip() for _, continuation in choices]
    same_question = len({prompt for prompt, _ in choices}) == 1
    per_byte = task.measure == "acc_norm"
    chances = [float(response[0]) for response in sample["filtered_resps"]]
    best = max(range(len(chances)), key=lambda i: chances[i] / (len(texts[i].encode()) or 1 if per_byte else 1))
    right = _right(sample, texts)
    row: Row = {"output": texts[best] if same_question else choices[best][0]}
    if right is None:
        return row | {"target": str(sample["target"])}
    return row | {"target": texts[right] if same_question else choices[right][0]} | _scored(sample, right, lm)


def _right(sample: Sample, texts: Sequence[str]) -> int | None:
    target = sample["target"]
    if isinstance(target, bool) or target is None:
        return None
    if isinstance(target, int):
        return target if 0 <= target < len(texts) else None
    if isinstance(target, str) and target.strip() in texts:
        return texts.index(target.strip())
    return None


def _scored(sample: Sample, index: int, lm: Any) -> Row:
    """Loss and tokens of one continuation."""
    prompt, continuation = _argument(sample, index)
    chance = float(sample["filtered_resps"][index][0])
    return {"loss": round(-chance, 6), "tokens": lm.count_after(prompt, continuation)}


def _measured(task: Task, sample: Sample) -> float:
    if task.measure not in sample:
        raise UserError(f"{task.name}: lm-eval gives {', '.join(sample['metrics'])}, not '{task.measure}'")
    return float(sample[task.measure])


def _target(doc: Row, sample: Sample) -> str:
    target = doc.get("target", sample["target"])
    return target if isinstance(target, str) else str(target)


def _said(sample: Sample) -> str:
    """What the model wrote, before any filter took a part of it."""
    first = sample["resps"][0]
    return str(first[0] if isinstance(first, list | tuple) else first)


def _argument(sample: Sample, index: int) -> tuple[str, str]:
    arguments = sample["arguments"]
    pair = arguments[f"gen_args_{index}"] if isinstance(arguments, dict) else arguments[index]
    return (
        (pair["arg_0"], pair.get("arg_1", ""))
        if isinstance(pair, dict)
        else (pair[0], pair[1] if len(pair) > 1 else "")
    )
