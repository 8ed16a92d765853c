"""Bad data through the real command (T15): one line says where and what, nothing is half-made; repaired, it runs."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from bad_data import BAD_LINES, DAMAGED, DATA, GOOD, ROWS, TEXTS, WORKS, WRONG, lines, parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from kitchen import contains, kitchen  # noqa: F401 - a fixture

from controlllm.config import DatasetConfig
from controlllm.data.catalog import find_dataset
from controlllm.data.documents import documents
from controlllm.data.manifest import list_source, read_unit
from controlllm.errors import UserError

# ruff: noqa: F811 - fixtures are asked for by their names


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line(name, kitchen, tiny_base):
    format, line, field, reason = BAD_LINES[name]
    good = lines(3, format).splitlines(keepends=True)
    kitchen.recipe("a.jsonl", format, tiny_base)
    kitchen.write({"a.jsonl": b"".join([good[0], line, b"\n", *good[1:]])})
    said = kitchen.refused()
    place = f"{kitchen.folder}/data/a.jsonl:2: " + (f"field '{field}': " if field else "")
    contains(said, f"mix.datasets.0 (own): {place}{reason} ... (1 of 4 rows cannot be used; pack.max_bad_rows")
    kitchen.write({"a.jsonl": b"".join(good)})
    assert kitchen.prepare()["documents"] == 3


@pytest.mark.parametrize("format", ROWS)
def test_bad_lines_among_good_ones_are_set_aside(format, kitchen, tiny_base):
    cases = [case for case in BAD_LINES.values() if case[0] == format]
    good = iter(lines(400, format).splitlines())
    mixed, expected = [], []
    for _, line, field, reason in cases:
        mixed += [next(good), next(good), line]
        expected.append((len(mixed), field, reason))
    mixed += good
    kitchen.recipe("a.jsonl", format, tiny_base)
    kitchen.write({"a.jsonl": b"\n".join(mixed)})
    counts = kitchen.prepare("pack.max_bad_rows=0.2", "pack.unit_rows=32", "pack.validation_fraction=0.1")
    found = kitchen.quarantine()
    found.sort(key=lambda row: row["row"])
    assert [(row["row"], row["field"]) for row in found] == [(row, field) for row, field, _ in expected]
    for row, (_, _, reason) in zip(found, expected, strict=True):
        assert (row["dataset"], row["file"]) == ("own", f"{kitchen.folder}/data/a.jsonl")
        assert row["reason"].startswith(reason) or reason in row["reason"]
    assert (counts["rows"], counts["bad_rows"], counts["filtered_rows"]) == (len(mixed), len(cases), 0)
    assert counts["documents"] + counts["validation_documents"] == 400
    assert counts["datasets"]["own"]["shards"] > 3


def test_bad_cells_among_good_ones_are_set_aside(kitchen, tiny_base):
    cells = [*TEXTS, None, "", " \n", *TEXTS]
    kitchen.recipe("a.parquet", "text", tiny_base)
    kitchen.write({"a.parquet": parquet({"text": cells}, row_group_size=20)})
    counts = kitchen.prepare("pack.max_bad_rows=0.1", "pack.unit_rows=20")
    assert [(row["row"], row["field"], row["reason"]) for row in kitchen.quarantine()] == [
        (61, "text", "null"),
        (62, "text", "empty"),
        (63, "text", "empty"),
    ]
    assert (counts["rows"], counts["bad_rows"], counts["documents"]) == (123, 3, 120)


def test_a_row_that_stands_in_two_files_is_never_on_both_sides(kitchen, tiny_base):
    kitchen.recipe("*", "prompt_completion", tiny_base)
    same = lines(60, "prompt_completion")
    kitchen.write({"a.jsonl": same, "b.jsonl": same.replace(b"it is", b"no, it is")})
    counts = kitchen.prepare("pack.validation_fraction=0.2")
    asked = [{text.split("<|im_end|>")[0] for text in kitchen.texts(kind)} for kind in ("train", "validation")]
    assert len(asked[0]) * 2 == counts["documents"]
    assert len(asked[1]) * 2 == counts["validation_documents"] > 0
    assert not asked[0] & asked[1]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(name, kitchen, tiny_base):
    files, says = DAMAGED[name]
    kitchen.recipe("*" if len(files) > 1 else next(iter(files)), "text", tiny_base)
    kitchen.write(files)
    contains(kitchen.refused(), says)
    kitchen.write({file: GOOD[file.partition(".")[2]] for file in files})
    counts = kitchen.prepare()
    assert counts["rows"] == counts["documents"] > 0


@pytest.mark.parametrize("name", WRONG)
def test_wrong_source_or_setting(name, kitchen, tiny_base):
    format, files, source, changes, says = WRONG[name]
    kitchen.recipe(source, format, tiny_base)
    kitchen.write(files)
    contains(kitchen.refused(*changes), says)
    assert not kitchen.holds(b"HUSH")


@pytest.mark.parametrize("name", WORKS)
def test_unusual_but_fine(name, kitchen, tiny_base):
    format, files, source, changes, rows, documents = WORKS[name]
    kitchen.recipe(source, format, tiny_base)
    kitchen.write(files)
    counts = kitchen.prepare(*changes)
    assert (counts["rows"], counts["documents"], counts["bad_rows"]) == (rows, documents, 0)
    assert counts["filtered_rows"] == rows - documents
    assert kitchen.quarantine() == []


def read_all(file: Path) -> str:
    """What is said against the file; each of its rows must become a document or a bad row."""
    dataset = find_dataset(DatasetConfig(name="own", source=str(file), format="text"))
    try:
        for unit in list_source(str(file), unit_rows=16).units:
            for batch in read_unit(unit):
                read = documents(dataset, batch)
                assert len(read.documents) + len(read.bad) == len(batch)
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=1500, deadline=None)
@given(ending=st.sampled_from(sorted(GOOD)), at=st.integers(0, 1 << 16), instead=st.binary(max_size=8), data=st.data())
def test_any_damage_is_rows_or_one_line(ending, at, instead, data):
    content = GOOD[ending]
    if ending == "parquet":  # its footer is guarded by nothing, and pyarrow ends the process at some that it can hold
        at, gone = at % (len(content) - 400), len(instead)
    else:
        at, gone = at % len(content), data.draw(st.integers(0, 20))
    with TemporaryDirectory() as folder:
        file = Path(folder, f"a.{ending}")
        file.write_bytes(content[:at] + instead + content[at + gone :])
        said = read_all(file)
        assert not said or said.startswith(str(file))
        assert "\n" not in said


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file")
def test_unreadable_file(kitchen, tiny_base):
    kitchen.recipe("a.jsonl", "text", tiny_base)
    kitchen.write(DATA_FILE)
    (kitchen.folder / "data/a.jsonl").chmod(0)
    contains(kitchen.refused(), "mix.datasets.0.source: data/a.jsonl: cannot be read (no permission)")


DATA_FILE = {"a.jsonl": DATA["text"]}
AFTERWARDS = {
    "vanishes": (lambda file: file.unlink(), "a.jsonl: No such file or directory"),
    "becomes longer": (lambda file: file.write_bytes(DATA["text"] * 2), "a.jsonl: changed since it was listed"),
    "is cut off": (lambda file: os.truncate(file, 60), "a.jsonl: changed since it was listed (115 bytes then, 60 now"),
    "becomes a folder": (lambda file: (file.unlink(), file.mkdir()), "a.jsonl: changed since it was listed"),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_file_changes_after_it_was_listed(name, kitchen, tiny_base):
    from controlllm import pipeline
    from controlllm.config import load_config
    from controlllm.prepare import prepare

    change, says = AFTERWARDS[name]
    kitchen.recipe("a.jsonl", "text", tiny_base)
    kitchen.write(DATA_FILE)
    config = load_config("bad.yaml")
    listed = pipeline._ingest(config)
    change(kitchen.folder / "data/a.jsonl")
    with pytest.raises(UserError) as error:
        prepare(listed.base, listed.data, config.mix, config.pack)
    contains(str(error.value), says)
    assert not [folder for folder in kitchen.outputs() if folder.is_dir()]
