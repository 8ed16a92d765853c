"""Probes from packages: grade-school maths, and a few files of an archive that is fetched once."""

import json
import sys
from types import SimpleNamespace

import pytest

from controlllm.benchmark.evaluate import evaluate_task
from controlllm.benchmark.items import Row
from controlllm.benchmark.probe_tasks import probe_task
from controlllm.data import bigbench
from controlllm.data.probes import HELD_OUT_SEED, PROBES
from controlllm.data.sources import read_rows
from controlllm.errors import UserError

EXAMPLES = [
    {"input": "Ann is left of Eve. ", "target_scores": {"Ann is left. ": 1, "Eve is left.": 0}},
    {"input": "Nobody knows.", "target_scores": {"Yes": 1, "No": 1}},
]
# In place of pip: leaves an archive where --dest says.
PACKS = """
import io, json, sys, tarfile
from controlllm.data.bigbench import FILES
place = sys.argv[sys.argv.index("--dest") + 1]
with tarfile.open(f"{place}/bigbench-1.0.0.tar.gz", "w:gz") as packed:
    for file in (*FILES, "benchmark_tasks/large/task.json"):
        content = json.dumps({"name": file.split("/")[-2], "examples": EXAMPLES}).encode()
        entry = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/{file}")
        entry.size = len(content)
        packed.addfile(entry, io.BytesIO(content))
""".replace("EXAMPLES", repr(EXAMPLES))


def items_of(name: str) -> list[Row]:
    rows = read_rows(PROBES[name].source, rows=3 if name == "gsm" else None, seed=HELD_OUT_SEED)
    return [item for row in rows for item in PROBES[name].items(row)]


def test_an_archive_is_fetched_once_and_little_of_it_kept(store, monkeypatch):
    with pytest.raises(UserError, match="is not in the cache"):
        items_of("bigbench-deduction")
    monkeypatch.setattr(bigbench, "_pip", lambda: [sys.executable, "-c", PACKS])
    folder = bigbench.fetch()
    kept = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    assert sorted(kept) == sorted(bigbench.FILES)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
    monkeypatch.setattr(bigbench, "_pip", lambda: pytest.fail("asked twice"))
    assert bigbench.fetch() == folder
    item, *others = items_of("bigbench-deduction")
    assert item["prompt"] == "Question: Ann is left of Eve.\nWhich is true?\n- Ann is left.\n- Eve is left.\nAnswer:"
    assert (item["choices"], item["answer"]) == (["Ann is left.", "Eve is left."], 0)
    assert len(others) == 2  # one of each of the other sizes; two right answers are no item
    assert items_of("bigbench-social")[0]["prompt"] == "Question: Ann is left of Eve.\nAnswer:"


def test_no_network_is_said_in_one_line(store, monkeypatch):
    says = "import sys; sys.exit('WARNING: x\\nERROR: No matching distribution found')"
    monkeypatch.setattr(bigbench, "_pip", lambda: [sys.executable, "-c", says])
    with pytest.raises(UserError, match=r"bigbench 1.0.0 cannot be fetched: No matching distribution found; let pip"):
        bigbench.fetch()
    assert not bigbench._folder().exists()


def test_the_last_number_of_a_worked_answer_counts(tmp_path, tokenizer):
    from test_suites import Says

    items = items_of("gsm")
    assert all(float(item["target"].split("####")[1]) == float(item["answer"]) for item in items)
    file = tmp_path / "data/probes/gsm.jsonl"
    file.parent.mkdir(parents=True)
    asked = [
        item | {"id": i, "prompt": item["messages"][0]["content"], "eos": "<|im_end|>"} for i, item in enumerate(items)
    ]
    file.write_text("".join(json.dumps(item) + "\n" for item in asked))
    said = [f"It is 7 more, so {items[0]['answer']}.00.", f"{items[1]['answer']} less 1 is nothing like 7", "none"]
    models = SimpleNamespace(of=lambda kind, advance: Says(*said), backend=lambda kind: "hf")
    evaluate_task(probe_task("gsm", tmp_path / "data"), models, tmp_path)
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "items.parquet").to_pylist()
    assert [row["correct"] for row in rows] == [True, False, False]
    assert all(row["loss"] and row["target"] == item["target"] for row, item in zip(rows, items, strict=True))
