"""Rows by name: paths, globs, packages, data sets of the hub's kinds in a folder; copies of them."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from controlllm.data.hub import HubSource
from controlllm.data.location import list_files
from controlllm.data.manifest import list_source
from controlllm.data.sources import package_folder, read_rows, source_files
from controlllm.errors import UserError
from controlllm.transfer import transfer

ROWS = [{"n": i, "text": f"row {i}"} for i in range(250)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "data"
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", ".hidden.jsonl", "it's [1] 100% #x?y=z.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"name": name}) + "\n")
    return folder


@pytest.mark.parametrize(("glob", "names"), [
    ("a.jsonl", ["a.jsonl"]),
    ("?.jsonl", ["a.jsonl", "b.jsonl"]),
    ("[!b].*", ["a.jsonl"]),
    ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deep/er/c.jsonl", "it's [1] 100% #x?y=z.jsonl"]),
    ("deep/*/c.jsonl", ["deep/er/c.jsonl"]),
    ("**/er/*", ["deep/er/c.jsonl"]),
    (".h*", [".hidden.jsonl"]),
    ("it's [1] 100% #x?y=z.jsonl", ["it's [1] 100% #x?y=z.jsonl"]),
])  # fmt: skip
def test_names_and_globs(files, glob, names):
    for source in (f"{files}/{glob}", f"file://{files}/{glob}"):
        assert [row["name"] for row in read_rows(source)] == names
        assert source_files(source) == [files / name for name in names]


def test_a_path_may_be_relative(files, monkeypatch):
    monkeypatch.chdir(files)
    assert list_files("a.jsonl") == [f"{files}/a.jsonl"]
    assert list_files("*.jsonl") == list_files(f"{files}/*.jsonl")


@pytest.mark.parametrize(("source", "says"), [
    ("{}/none.jsonl", "no such file (looked in "),
    ("{}/none/*.jsonl", "no such file (looked in "),
    ("{}/deep", "is a directory; name a file, or files as in "),
    ("ftp://x/y.jsonl", "this kind of source is not known; known: hf://"),
    ("pkg://no_such_package/x.json", "the package 'no_such_package' is not installed"),
    ("{}/empty.jsonl", "the file is empty"),
    ("{}/broken.jsonl", "broken.jsonl:2: not valid JSON"),
    ("hf://a b/c", "'a b/c' is no name on the hub"),
    ("hf://a/b/*.jsonl#train", "names files, which have no :config and no #split"),
    ("hf://a/b#train[:10]", "must be the name of one split"),
    ("hf:///nowhere", "no such folder"),
    ("hf://some/absent#train", "`controlllm ingest hf://some/absent#train --to FOLDER` on a machine with network"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(files, source, says):
    (files / "empty.jsonl").touch()
    (files / "broken.jsonl").write_text('{}\n{"a": ')
    with pytest.raises(UserError) as error:
        list(read_rows(source.format(files)))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_a_package_keeps_its_name():
    folder = package_folder("controlllm", "")
    units = list_source("pkg://controlllm/benchmark/probes/*.yaml", unit_rows=10).units
    assert [unit.uri for unit in units] == [
        f"pkg://controlllm/benchmark/probes/{file.name}"
        for file in sorted((folder / "benchmark" / "probes").glob("*.yaml"))
    ]
    assert all(row for row in read_rows("pkg://controlllm/benchmark/probes/*.yaml"))


def test_parts_of_a_hub_name():
    assert HubSource.of("hf://org/name@v1:main#train") == HubSource("org/name", "v1", "main", "train")
    assert HubSource.of("hf://name") == HubSource("name", None, None, None)
    assert HubSource.of("hf:///a b/c#test").is_folder


def test_a_saved_data_set(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one", num_shards=3)
    assert list(read_rows(f"hf://{tmp_path}/one")) == ROWS
    assert list(read_rows(f"{tmp_path}/one/*.arrow", rows=100)) == ROWS[:100]
    units = list_source(f"hf://{tmp_path}/one", unit_rows=40).units
    assert [unit.rows for unit in units] == [10, 40, 34, 40, 43, 40, 43]
    halves = {"train": datasets.Dataset.from_list(ROWS[:99]), "test": datasets.Dataset.from_list(ROWS[99:])}
    datasets.DatasetDict(halves).save_to_disk(tmp_path / "two")
    assert list(read_rows(f"hf://{tmp_path}/two#test")) == ROWS[99:]
    with pytest.raises(UserError, match=r"has several splits; name one of train, test as in hf://.*two#train"):
        list(read_rows(f"hf://{tmp_path}/two"))
    with pytest.raises(UserError, match="has no split 'tset'; name one of train, test"):
        list(read_rows(f"hf://{tmp_path}/two#tset"))


def test_a_folder_of_files_as_the_hub_has_them(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(200), folder / "test-00000-of-00001.parquet")
    assert list(read_rows(f"hf://{folder}#train")) == ROWS
    assert list(read_rows(f"hf://{folder}#test")) == ROWS[200:]
    with pytest.raises(UserError, match="has several splits; name one of"):
        list(read_rows(f"hf://{folder}"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files: train*\n- config_name: y\n  data_files: test*\n---\n"
    )
    with pytest.raises(UserError, match=r"has several configurations; name one of \['x', 'y'\] as in hf://.*:name"):
        list(read_rows(f"hf://{folder}"))
    assert list(read_rows(f"hf://{folder}:y")) == ROWS[200:]


def test_a_data_set_that_is_code_is_refused(tmp_path):
    folder = tmp_path / "coded"
    folder.mkdir()
    (folder / "coded.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError) as error:
        list(read_rows(f"hf://{folder}#train"))
    assert "needs code from the hub to be read, which is never run" in str(error.value)
    assert "\n" not in str(error.value)


def test_transfer_of_files_goes_on_where_it_was(files, tmp_path, capsys):
    to = tmp_path / "to"
    transfer(f"{files}/**/*.jsonl", str(to))
    assert list(read_rows(f"{to}/**/*.jsonl")) == list(read_rows(f"{files}/**/*.jsonl"))
    assert f"in a recipe: source: {to}/**/*" in capsys.readouterr().err
    told = json.loads((to / "controlllm-manifest.json").read_text())
    assert told["complete"]
    assert sorted(file["name"] for file in told["files"]) == sorted(
        source.name if source.parent == files else "deep/er/c.jsonl" for source in source_files(f"{files}/**/*.jsonl")
    )
    times = {file: file.stat().st_mtime_ns for file in to.rglob("*.jsonl")}
    (to / "b.jsonl").write_text("half of")
    (to / "a.jsonl").unlink()
    transfer(f"{files}/**/*.jsonl", str(to))
    assert list(read_rows(f"{to}/**/*.jsonl")) == list(read_rows(f"{files}/**/*.jsonl"))
    kept = {file.name for file, time in times.items() if file.stat().st_mtime_ns == time}
    assert kept == {"c.jsonl", "it's [1] 100% #x?y=z.jsonl"}


def test_transfer_of_a_hub_set_is_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("controlllm.transfer.FILE_ROWS", 100)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    transfer(f"hf://{tmp_path}/one", f"{tmp_path}/to")
    assert [file.name[:5] for file in source_files(f"{tmp_path}/to/*.parquet")] == ["00000", "00001", "00002"]
    assert list(read_rows(f"{tmp_path}/to/*.parquet")) == ROWS
    transfer("reasoning-gym://gcd", f"{tmp_path}/puzzles")
    assert list(read_rows(f"{tmp_path}/puzzles/*.parquet")) == list(read_rows("reasoning-gym://gcd"))


def test_transfer_goes_only_to_folders():
    with pytest.raises(UserError, match="hf://me/mine: data can be put into a folder, or hdfs://"):
        transfer("a.jsonl", "hf://me/mine")


def test_files_of_a_set_as_they_lie_on_the_hub(tmp_path, monkeypatch):
    """For sets with a script or several kinds of files; out of the hub's cache, as a machine without network has it."""
    commit = "0" * 40
    snapshot = tmp_path / "datasets--org--set" / "snapshots" / commit
    (snapshot / "part").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    (snapshot / "part" / "a.jsonl").write_text('{"text": "one"}\n')
    (snapshot / "script.py").write_text("raise SystemExit('never run')")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    assert list(read_rows("hf://org/set/part/*.jsonl")) == [{"text": "one"}]
