"""The stage store: equal inputs are found again, anything else is made, and nothing half-made is ever seen."""

import json
import multiprocessing
import time

import pytest

from controlllm import fingerprint
from controlllm.config import PackConfig
from controlllm.errors import UserError
from controlllm.store import content_hash, read_lineage, run_stage

pytestmark = pytest.mark.usefixtures("store")


def make(config=None, parents=None, text="made", stage="prepare", **options):
    def build(folder):
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "out.txt").write_text(text)

    return run_stage(stage, config={"pack": config or PackConfig()}, parents=parents or {}, build=build, **options)


def test_same_inputs_are_found():
    first, second = make(), make(text="not built again")
    assert not first.cached
    assert second.cached
    assert second.path == first.path
    assert (second.path / "sub" / "out.txt").read_text() == "made"


@pytest.mark.parametrize(
    "change", [{"context_length": 9}, {"overlong": "drop"}, {"validation_fraction": 0.5}, {"strategy": "pad"}]
)
def test_a_changed_setting_makes_anew_and_says_why(change, capsys):
    make()
    assert not make(PackConfig(**change)).cached
    name, value = next(iter(change.items()))
    line = capsys.readouterr().err.splitlines()[-2]
    assert f"because pack.{name}" in line
    assert json.dumps(value) in line
    assert make(PackConfig(**change)).cached


def test_a_changed_parent_makes_anew(tmp_path):
    parent = tmp_path / "data"
    parent.mkdir()
    (parent / "rows").write_text("a")
    assert not make(parents={"ingest data": parent}).cached
    assert make(parents={"ingest data": parent}).cached
    (parent / "rows").write_text("b")
    assert not make(parents={"ingest data": parent}).cached


def test_content_counts_not_place_or_time(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("same")
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two")
    (tmp_path / "two" / "f").rename(tmp_path / "two" / "g")
    assert content_hash(tmp_path / "one") != content_hash(tmp_path / "two")


@pytest.mark.parametrize("harm", ["changed", "removed"])
def test_a_damaged_output_is_made_again(harm, capsys):
    file = make().path / "sub" / "out.txt"
    if harm == "changed":
        file.write_text("evil")
    else:
        file.unlink()
    again = make()
    assert not again.cached
    assert (again.path / "sub" / "out.txt").read_text() == "made"
    assert "was changed or removed" in capsys.readouterr().err


def test_a_touched_output_is_still_good():
    file = make().path / "sub" / "out.txt"
    time.sleep(0.01)
    file.touch()
    assert make().cached


def test_a_failed_stage_leaves_nothing(store):
    def build(folder):
        (folder / "half").write_text("x")
        raise UserError("no")

    with pytest.raises(UserError):
        run_stage("prepare", config={}, parents={}, build=build)
    assert [f for f in (store / "prepare").rglob("*") if not f.name.endswith(".lock")] == []


def test_a_resumable_stage_finds_its_work_again():
    tries = []

    def build(folder):
        tries.append(sorted(f.name for f in folder.iterdir()))
        (folder / f"step{len(tries)}").touch()
        if len(tries) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("train", config={}, parents={}, build=build, resumable=True)
    run_stage("train", config={}, parents={}, build=build, resumable=True)
    assert tries == [[], ["step1"]]


def test_lineage_names_inputs_and_parents():
    parent = make(stage="ingest data")
    lineage = read_lineage(make(parents={"ingest data": parent.path}).path)
    assert lineage["parents"]["ingest data"]["content"] == parent.lineage["content"]
    assert lineage["inputs"]["pack.context_length"] == 8192
    assert lineage["inputs"]["code prepare.py"]
    assert set(lineage["files"]) == {"sub/out.txt"}


def test_comments_and_docstrings_are_not_code(tmp_path):
    hashes = []
    for text in (
        "def f():\n    return 1\n",
        'def f():\n    """Doc."""\n    return 1  # why\n',
        "def f():\n    return 2\n",
    ):
        (tmp_path / "m.py").write_text(text)
        fingerprint.source_hash.cache_clear()
        hashes.append(fingerprint.source_hash(tmp_path / "m.py"))
    fingerprint.source_hash.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_stage_names_code_that_exists():
    for stage in fingerprint.CODE:
        assert fingerprint.code_hashes(stage), stage


def _build_slowly(folder):
    with (folder.parent / "builds").open("a") as log:
        log.write("x")
    time.sleep(0.3)
    (folder / "out").touch()


def _one_of_many(_):
    return str(run_stage("prepare", config={}, parents={}, build=_build_slowly).path)


def test_many_at_once_build_once(store):
    # Not forked: other tests of this process may have left threads behind, whose locks a fork would copy.
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        assert len(set(pool.map(_one_of_many, range(8)))) == 1
    assert (store / "prepare" / "builds").read_text() == "x"


def test_unwritable_cache_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set CONTROLLLM_CACHE to a writable folder"):
        make()
