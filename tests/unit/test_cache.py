"""`controlllm cache`: why something would be made again, what is damaged, what can go."""

import contextlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from controlllm import fingerprint, pipeline
from controlllm.cache import parse_days
from controlllm.cli import main
from controlllm.config import load_config
from controlllm.data.shard import ShardWriter, file_name
from controlllm.data.shard_store import ShardStore
from controlllm.errors import UserError
from controlllm.store import deliver_to

RECIPE = """
name: tiny
output: {home}/runs
model: {{name: {base}}}
control: {{num_expanded: 2}}
mix: {{datasets: [{{name: a, source: {home}/a.jsonl, format: messages}}]}}
pack: {{context_length: 256, unit_rows: 64}}
train: {{steps: 4, precision: float32, global_batch_size: 2}}
validation: null
benchmark: {{new: [puzzles], old: [chat], items: 2}}
smoke: null
"""


def chat(number):
    asked = {"role": "user", "content": f"question {number:04}?"}
    return {"messages": [asked, {"role": "assistant", "content": f"answer {number:04}"}]}


def write(file, numbers):
    file.write_text("".join(json.dumps(chat(number)) + "\n" for number in numbers))


@pytest.fixture(scope="module")
def pristine(tiny_base, tmp_path_factory):
    """A copy of a folder with a recipe, its data, and a store in which it was prepared."""
    home = tmp_path_factory.mktemp("cache") / "home"
    home.mkdir()
    write(home / "a.jsonl", range(300))
    (home / "recipe.yaml").write_text(RECIPE.format(home=home, base=tiny_base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLLLM_CACHE", str(home / "cache"))
        pipeline.run(load_config(home / "recipe.yaml"), until="prepare")
    return home.rename(home.with_name("pristine"))


@pytest.fixture
def home(pristine, monkeypatch):
    """The folder as it was, in its place, with the prepared dataset's links to its shards."""
    home = shutil.copytree(pristine, pristine.with_name("home"))
    for shard in (home / "cache" / "shards").glob("*.arrow"):
        (linked,) = (home / "cache" / "prepare").glob(f"*/a/{shard.name}")
        linked.unlink()
        os.link(shard, linked)
    monkeypatch.setenv("CONTROLLLM_CACHE", str(home / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    yield home
    shutil.rmtree(home)


def run(capsys, *args, code=0):
    """Lines on stdout."""
    capsys.readouterr()
    assert main(["cache", *map(str, args)]) == code
    return capsys.readouterr().out.splitlines()


def contents(home):
    return {
        path: path.stat().st_mtime_ns
        for path in home.rglob("*")
        if path.is_file() and not path.name.endswith((".lock", ".claim"))
    }


def only(home, pattern):
    (path,) = (home / "cache").glob(pattern)
    return path


# explain


def explained(capsys, home, *changes, stage="prepare"):
    before = contents(home)
    lines = run(capsys, "explain", home / "recipe.yaml", *changes, "--stage", stage)
    assert contents(home) == before
    return lines


def test_what_is_cached_is_said_so_and_the_first_that_is_not_why(capsys, home):
    lines = explained(capsys, home, stage="report")
    assert [line.partition(", made")[0] for line in lines[:3]] == [
        "ingest model: cached",
        "ingest data: cached",
        "prepare: cached",
    ]
    assert lines[3] == "train: would compute first time"
    assert lines[4] == "what comes after it runs, too, unless it makes the same output again"


def test_nothing_is_delivered_by_a_question(capsys, home):
    pipeline.run(load_config(home / "recipe.yaml"))
    shutil.rmtree(home / "runs")
    lines = explained(capsys, home, stage="report")
    assert lines[-1].startswith("report: cached")
    assert not (home / "runs").exists()


@pytest.mark.parametrize(("changes", "stage", "shards"), [
    (["pack.context_length=128"], "prepare: because pack.context_length (256 → 128)", "pack.context_length changed"),
    (["pack.strategy=pad"], 'prepare: because pack.strategy ("best_fit" → "pad")', "pack.strategy changed"),
    (["pack.targets=all", "pack.date=2024-01-01"], 'prepare: because pack.targets ("assistant" → "all"), pack.date',
     "pack.targets, pack.date changed"),
    (["mix.datasets.0.fraction=0.5"], "prepare: because datasets.a.fraction (1.0 → 0.5)", "fraction changed"),
    (["mix.datasets.0.preprocess=[{strip: {}}]"], "prepare: because datasets.a.preprocess", "dataset changed"),
    (["pack.max_bad_rows=0.5"], "prepare: because pack.max_bad_rows (0.001 → 0.5)", None),
    (["mix.datasets.0.name=c"], "ingest data: because source.", ""),
    (["benchmark.items=3"], "ingest data: because probes.puzzles (2 → 3)", ""),
    (["mix.decontaminate=none"], 'ingest data: because mix.decontaminate ("exact" → "none")', ""),
    (["pack.unit_rows=32"], "ingest data: because source.a", ""),
    (["mix.datasets.0.rows=100"], "ingest data: because source.a", ""),
    (["mix.seed=3"], None, None),
    (["train.steps=9"], None, None),
])  # fmt: skip
def test_the_setting_that_changed_is_named(capsys, home, changes, stage, shards):
    lines = explained(capsys, home, *changes)
    if stage is None:
        assert lines[-1].startswith("prepare: cached")
        return
    name, _, why = stage.partition(": ")
    (told,) = [line for line in lines if line.startswith(f"{name}: would compute")]
    assert why in told
    units = len(list((home / "cache" / "shards").glob("*.json")))
    if shards is None:
        assert f"  a: {units} of {units} shards are there" in lines
    elif shards:
        assert f"  a: {units} to make, because {shards}" in lines


def test_code_and_files_that_changed_are_named(capsys, home, monkeypatch):
    real = fingerprint.source_hash
    for module in ("controlllm.fingerprint", "controlllm.data.job"):
        monkeypatch.setattr(f"{module}.source_hash", lambda file: "changed" if file.name == "pack.py" else real(file))
    lines = explained(capsys, home)
    assert "because code data/pack.py changed" in lines[2]
    assert any(line.endswith("to make, because code.pack changed") for line in lines)
    monkeypatch.undo()
    monkeypatch.setenv("CONTROLLLM_CACHE", str(home / "cache"))
    write(home / "a.jsonl", [*range(299), 1000])
    assert "because source.a" in explained(capsys, home)[1]


def test_shards_of_rows_that_were_added_and_of_files_that_were_removed(capsys, home):
    units = len(list((home / "cache" / "shards").glob("*.json")))
    write(home / "a.jsonl", range(420))
    pipeline.run(load_config(home / "recipe.yaml"), until="ingest")
    lines = [line for line in explained(capsys, home) if line.startswith("  a:")]
    assert lines[0].startswith(f"  a: {units - 1} of ")
    assert lines[1].endswith("no shard holds these rows: the file is new, was changed, or is cut into other pieces")
    write(home / "a.jsonl", range(300))
    os.utime(home / "a.jsonl", (0, 0))
    sorted((home / "cache" / "shards").glob("*.arrow"))[0].unlink()
    pipeline.run(load_config(home / "recipe.yaml"), until="ingest")
    lines = [line for line in explained(capsys, home) if line.startswith("  a:")]
    assert lines[0] == f"  a: {units - 1} of {units} shards are there"
    assert lines[1] == "  a: 1 to make, because its file was removed or cut off"


def test_an_empty_cache(capsys, home, monkeypatch):
    monkeypatch.setenv("CONTROLLLM_CACHE", str(home / "empty"))
    assert run(capsys, "ls") == ["0 entries, 0 B"]
    assert run(capsys, "ls", "--json") == []
    assert run(capsys, "verify") == ["ok: 0 entries are what was written"]
    assert run(capsys, "prune", "--yes") == ["0 entries, 0 B: removed"]
    assert explained(capsys, home)[0] == "ingest model: would compute first time"


# verify


def flip(file):
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)


def test_what_is_whole_verifies(capsys, home):
    (line,) = run(capsys, "verify")
    assert line.startswith("ok: ")


@pytest.mark.parametrize(("pattern", "harm", "says"), [
    # a prepared dataset's link is the same file
    ("shards/*.arrow", flip, ["is not what was written", "is not what was written"]),
    ("shards/*.arrow", Path.unlink, ["is missing"]),
    ("shards/*.json", flip, ["damaged"]),
    ("ingest-data/*/probes/chat.jsonl", flip, ["is not what was written"]),
    ("prepare/*/stats.json", Path.unlink, ["is missing"]),
    ("prepare/*/a/*.arrow", Path.unlink, ["is missing"]),
])  # fmt: skip
def test_a_damaged_or_missing_file_is_named(capsys, home, pattern, harm, says):
    file = sorted((home / "cache").glob(pattern))[0]
    harm(file)
    lines = run(capsys, "verify", code=1)
    assert len(lines) == len(says)
    assert any(line.startswith(f"{file}: {says[0]}") for line in lines)
    assert {line.partition(": ")[0].rpartition("/")[2] for line in lines} == {file.name}


def test_no_flipped_bit_of_a_shards_description_is_silent(home):
    file = sorted((home / "cache" / "shards").glob("*.json"))[0]
    whole, places = file.read_bytes(), random.Random(0)
    store, key = ShardStore(file.parent), file.stem
    facts = store.facts(key)
    for _ in range(300):
        broken = bytearray(whole)
        broken[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        file.write_bytes(broken)
        with contextlib.suppress(UserError):
            assert store.facts(key) == facts  # as a flipped blank between two values


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"files": {}}', b"\xff\xfe", None])
def test_a_damaged_description_stops_nothing(capsys, home, content):
    shard = sorted((home / "cache" / "shards").glob("*.json"))[0]
    lineage = only(home, "ingest-model/*/lineage.json")
    for file in (shard, lineage):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    text = "".join(run(capsys, "ls"))
    assert text.count("damaged; remove") == 2
    assert all(len(json.loads(line)) > 3 for line in run(capsys, "ls", "--json"))
    lines = run(capsys, "verify", code=1)
    assert any(line.startswith(f"{shard}: damaged; remove it") for line in lines)
    assert any(line.startswith(f"{lineage}: damaged; remove {lineage.parent}") for line in lines)
    run(capsys, "prune", "--older-than", "0d", "--yes")
    assert not shard.exists()
    assert not lineage.parent.exists()


# prune


def age(home, days):
    then = time.time() - days * 86400
    for path in (home / "cache").rglob("*"):
        os.utime(path, (then, then), follow_symlinks=False)


def names(home):
    """Folders that hold something; what was written down of outputs outlives them."""
    return {path.relative_to(home / "cache").parts[0] for path in (home / "cache").glob("*/[!.]*")} - {"lineage"}


def test_nothing_goes_without_yes_or_too_young(capsys, home):
    before = contents(home / "cache")
    listed = run(capsys, "prune", "--older-than", "0d")
    assert listed[-1].startswith("3 entries, ")
    assert listed[-1].endswith("would be removed; run again with --yes")
    assert run(capsys, "prune", "--older-than", "1d", "--yes") == ["0 entries, 0 B: removed"]
    assert contents(home / "cache") == before


def test_what_a_run_or_a_prepared_dataset_uses_stays(capsys, home):
    age(home, 40)
    (home / "runs" / "tiny").mkdir(parents=True)
    prepared = only(home, "prepare/[0-9a-f]*")
    (home / "runs" / "tiny" / "model").symlink_to(prepared)
    deliver_to(home / "runs" / "tiny")
    run(capsys, "prune", "--yes")
    assert names(home) == {"prepare", "shards"}
    assert pipeline.run(load_config(home / "recipe.yaml"), until="prepare") is None
    shutil.rmtree(home / "runs")  # nobody uses it any more
    age(home, 40)
    run(capsys, "prune", "--yes")
    assert names(home) == {"shards"}
    age(home, 40)
    run(capsys, "prune", "--yes")
    assert names(home) == set()


def test_what_killed_processes_left_is_removed_and_what_is_at_work_stays(capsys, home):
    shards = home / "cache" / "shards"
    left = [".aa.x1y2", ".fetch.zz", ".bb.w3"]
    for name in left:
        (shards / name).mkdir()
        (shards / name / "aa.arrow").write_bytes(b"half")
    (shards / ".aa.claim").write_text("another-machine 1")
    (shards / "cc.arrow").write_bytes(b"never finished")
    partial = home / "cache" / "prepare" / ".dd.partial"
    partial.mkdir()
    (partial / "x").write_text("x")
    assert run(capsys, "prune", "--older-than", "0d")[-1].startswith("3 entries")  # all of it too young
    age(home, 2)
    (shards / ".bb.claim").write_text(f"another-machine {os.getpid()}")
    listed = run(capsys, "prune", "--older-than", "1d")
    assert sum("left over" in line for line in listed) == 5
    from filelock import FileLock

    with FileLock(home / "cache" / "prepare" / ".dd.lock"):
        assert sum("left over" in line for line in run(capsys, "prune", "--older-than", "1d")) == 4
    run(capsys, "prune", "--older-than", "1d", "--yes")
    assert sorted(path.name for path in shards.glob(".*")) == [".bb.claim", ".bb.w3"]
    assert not (shards / "cc.arrow").exists()
    assert not partial.exists()


@pytest.mark.parametrize("text", ["", "d", "30", "-1d", "1.2.3d", ".d", "²d", "1e3d", "30 d", "30w", "nan d"])
def test_a_wrong_age_is_one_line(text, capsys):
    with pytest.raises(UserError, match=r"--older-than: .* is no age; write 30d or 12h"):
        parse_days(text)
    assert main(["cache", "prune", f"--older-than={text}"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("text", "days"), [("30d", 30), ("12h", 0.5), ("0d", 0), ("1.5d", 1.5)])
def test_an_age(text, days):
    assert parse_days(text) == days


# ls


def test_many_shards_are_a_few_lines(capsys, home):
    store = ShardStore(home / "cache" / "shards")
    some = store.facts(store.keys()[0])
    assert some is not None
    for number in range(300):
        key = f"{number:016x}"
        with store.writing(key) as partial:
            assert partial is not None
            files = {"train": ShardWriter(partial / file_name(key, "train"), vocabulary=256).close()}
            unit = {"uri": f"/data/part-{number % 50}.jsonl"}
            store.publish(key, partial, some | {"key": key, "unit": unit, "rows": 10, "files": files})
    lines = run(capsys, "ls")
    text = " ".join(" ".join(lines).split())
    assert "300 shards" in text
    assert "3,000 rows of 50 files of /data · context 256" in text
    assert f"300 rows of {home}/a.jsonl" in text
    assert len(lines) < 20
    every = [json.loads(line) for line in run(capsys, "ls", "--json")]
    assert sum(entry["kind"] == "shard" for entry in every) == len(store.keys())
    assert every == sorted(every, key=lambda entry: -entry["made"])
