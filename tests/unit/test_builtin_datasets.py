"""Each built-in dataset reads rows as its source has them; long texts are cut where they have `...`.

`dataset_rows.jsonl` says how each row was found: in the source's own `file`, on its `card`, in a `tutorial`, in a
`copy` (a set made from it), or `generated`. `processing script`: the fields from the script that writes them, the text
from what it reads. `fields only`: no row was found; fields and types are the published ones, the text is ours.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from controlllm.config import DatasetConfig
from controlllm.data.catalog import CATALOG, dataset_names, find_dataset, listing
from controlllm.data.dataset import dataset, register
from controlllm.data.documents import documents
from controlllm.data.hub import HubSource
from controlllm.data.types import RowBatch
from controlllm.errors import UserError

ROWS = [json.loads(line) for line in Path(__file__).with_name("dataset_rows.jsonl").read_text("utf-8").splitlines()]
FOUND = {"file", "card", "tutorial", "copy", "processing script", "generated", "fields only"}


def talk(*contents, system=None):
    turns = [
        {"role": role, "content": content} for role, content in zip(("user", "assistant") * 9, contents, strict=False)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


def pair(question, answer):
    return lambda row: talk(row[question], row[answer])


def shared(row):
    return talk(*(turn["value"] for turn in row["conversations"]))


def alpaca(row):
    return talk("\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"])


EXPECTED = {
    "puzzles": pair("question", "answer"),
    "samsum": lambda row: talk("Summarize this dialogue:\n" + row["dialogue"].replace("\r", ""), row["summary"]),
    "alpaca-cleaned": alpaca,
    "ultrachat_200k": lambda row: row["messages"],
    "ultrafeedback_binarized": lambda row: row["chosen"],
    "OpenMathInstruct-2": pair("problem", "generated_solution"),
    "OpenOrca": lambda row: talk(row["question"], row["response"], system=row["system_prompt"]),
    "OpenHermes-2.5": shared,
    "Magpie-Pro-300K-Filtered": shared,
    "Magpie-Llama-3.1-Pro-MT-300K-Filtered": shared,
    "UltraInteract_sft": pair("instruction", "response"),
    "opc-annealing": lambda row: row["text"],
    "opc-sft": pair("instruction", "output"),
    "openassistant-guanaco": lambda row: talk(*(part.partition(": ")[2] for part in row["text"].split("### ")[1:3])),
    "RedPajama-Data-1T-Sample": lambda row: row["text"],
    "alpaca_zh": alpaca,
    "ruozhiba": alpaca,
    "stem_zh": alpaca,
    "Llama-3-SynE": lambda row: row["text"],
}


def test_every_built_in_dataset_has_a_row():
    assert {line["name"] for line in ROWS} == CATALOG.keys()
    assert {line["found"] for line in ROWS} <= FOUND


@pytest.mark.parametrize("line", ROWS, ids=lambda line: line["name"])
def test_a_row_is_read(line):
    name, row = line["name"], line["row"]
    (expected,) = [read for start, read in EXPECTED.items() if name == start or name.startswith(f"{start}-")]
    for found in as_lines_and_as_table(name, row):
        assert found.bad == []
        assert [found.documents[i] for i in range(len(found.documents))] == [expected(row)] * 2


def as_lines_and_as_table(name, row):
    data, numbers = find_dataset(DatasetConfig(name=name)), np.arange(1, 3)
    yield documents(data, RowBatch("f", numbers, dicts=[row, row]))
    yield documents(data, RowBatch("f", numbers, table=pa.Table.from_pylist([row, row])))


@pytest.mark.parametrize("nothing", ["", None])
def test_a_summary_of_nothing_is_left_out(nothing):
    row = {"id": "1", "dialogue": nothing, "summary": "problem with visualization of the content"}
    for found in as_lines_and_as_table("samsum", row):
        assert (len(found.documents), found.bad, found.filtered) == (0, [], {"dataset": 2})


def test_sources_of_the_hub_name_their_split():
    named = [HubSource.of(data.source) for data in CATALOG.values() if data.source.startswith("hf://")]
    assert all(source.split or source.pattern for source in named)


def test_another_source_for_a_name_of_the_catalog():
    found = find_dataset(DatasetConfig(name="alpaca-cleaned", source="mine.jsonl"))
    assert (found.source, found.form) == ("mine.jsonl", "alpaca")


@pytest.mark.parametrize(("config", "says"), [
    ({"name": "alpaca-claned"}, "unknown dataset 'alpaca-claned'; did you mean 'alpaca-cleaned'?"),
    ({"name": "OpenHermes"}, "did you mean 'OpenHermes-2.5'?"),
    ({"name": "zzz"}, "unknown dataset 'zzz'; known: alpaca-cleaned, alpaca_zh,"),
    ({"name": "zzz", "source": "a.jsonl"}, "has a source but no format, and is not in the catalog; formats: messages,"),
    ({"name": "zzz", "format": "text"}, "dataset 'zzz': format text needs a source"),
    ({"name": "samsum", "fields": {"text": "a"}}, "fields are for formats"),
    ({"name": "ruozhiba", "fields": {"instrction": "a"}}, "did you mean 'instruction'?"),
])  # fmt: skip
def test_what_cannot_be_found_is_said_in_one_line(config, says):
    with pytest.raises(UserError) as error:
        find_dataset(DatasetConfig(**config))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_is_taken_once():
    try:
        register("twice", source="x", form="text", license="MIT")
        with pytest.raises(UserError, match=r"'twice' is registered twice, by test_builtin_d.* and by test_b"):
            dataset("twice", source="y", license="MIT")(lambda row: None)
    finally:
        CATALOG.pop("twice")


def test_listing_says_where_from_and_under_which_licence():
    assert [line.name for line in listing()] == dataset_names()
    assert all(line.description and line.source and line.license for line in listing())


def test_the_catalog_needs_no_heavy_import():
    heavy = {"pyarrow", "numpy", "torch", "datasets", "transformers"}
    code = f"import sys, controlllm.data.catalog as c; c.listing(); print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
