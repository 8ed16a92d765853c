"""To reproduce a run: the recipe says what was recorded, and what is other here is found."""

import json
import os
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from shared_run import DATA, change, make_run, task

from controlllm import pipeline
from controlllm.changes import differences
from controlllm.cli_share import add_commands
from controlllm.config import load_config
from controlllm.errors import UserError
from controlllm.inputs_here import Input
from controlllm.record import nested, open_record
from controlllm.reproduce import commands, compare_numbers, reproduce, run_again


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path, store: Path) -> Path:
    return make_run(tmp_path, tiny_base, facts={"license": "mit"})


def _other(inputs: list[Input]) -> dict[str, str]:
    return {found.name: found.here for found in inputs if not found.same}


def test_the_recipe_is_the_recorded_one(run: Path) -> None:
    folder, inputs = reproduce(run)
    config = load_config(folder / "recipe.yaml")
    assert (config.name, config.control.num_expanded, config.pack.context_length) == ("demo", 2, 256)
    assert _other(inputs) == {}
    assert {"torch", "code of train", "base model", "data mine", "packed rows"} <= {found.name for found in inputs}
    read_me = (folder / "README.md").read_text()
    assert "python -m controlllm.cli finetune recipe.yaml output=runs" in read_me
    assert "train.seed" in read_me
    assert "transformers==" in (folder / "constraints.txt").read_text()


def test_from_every_name_of_a_run_and_elsewhere(run: Path, tmp_path: Path, monkeypatch) -> None:
    folder, inputs = reproduce(run)
    for target in (run / "summary" / "summary.json", run / "model", folder):
        assert [i.name for i in reproduce(target, tmp_path / "again")[1]] == [i.name for i in inputs]
    monkeypatch.setenv("CONTROLLLM_CACHE", str(tmp_path / "empty"))  # as on a machine that has only this folder
    other = _other(reproduce(folder)[1])
    assert set(other) == {"base model", "packed rows"}
    assert "controlllm ingest gets it" in other["base model"]


def test_what_is_other_is_named(run: Path, tmp_path: Path, tiny_base: Path) -> None:
    folder, _ = reproduce(run)
    record = json.loads((folder / "record.json").read_text())
    stages = record["stages"]
    stages["train"]["inputs"] |= {"version of torch": "1.0", "code train/gone.py": "ab"}
    stages["ingest model"]["content"] = "0" * 16
    (folder / "record.json").write_text(json.dumps(record))
    (tmp_path / "questions.jsonl").write_text(DATA + DATA)
    other = _other(reproduce(folder)[1])
    assert set(other) == {"torch", "code of train", "base model", "data mine"}
    assert other["code of train"] == "train/gone.py"
    assert other["data mine"] == f"questions.jsonl: {len(DATA)} → {2 * len(DATA)} bytes"
    (tmp_path / "questions.jsonl").unlink()
    assert "not to be read here" in _other(reproduce(folder)[1])["data mine"]


def test_files_that_were_only_touched(run: Path, tmp_path: Path) -> None:
    os.utime(tmp_path / "questions.jsonl", (1, 1))
    _, inputs = reproduce(run)
    assert _other(inputs) == {"data mine": "files of the same names and sizes, but other places or times"}


def test_a_checkpoint_by_itself_has_no_recipe(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="is a checkpoint by itself"):
        reproduce(tiny_base)


def test_several_processes_are_launched(run: Path) -> None:
    record = open_record(run)
    record.made["train/train.json"]["processes"] = 4
    first, last = commands(record, "recipe.yaml", "runs")
    assert first[:3] == ["torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    assert first[-3:] == ["train", "recipe.yaml", "output=runs"]
    assert last[:2] == ["controlllm.cli", "finetune"]


def test_numbers_are_equal_within_or_other() -> None:
    def tasks(after: float, **more: float) -> dict:
        made = {"prose": task("Prose", "old", "kept", change("loss", 3.0, after, 0.01))}
        return made | {
            name: task(name, "old", "kept", change("loss", 3.0, value, 0.01)) for name, value in more.items()
        }

    recorded = tasks(3.5, chat=2.0)
    assert [line.partition(":")[0] for line in compare_numbers(recorded, recorded)] == ["equal", "equal"]
    found = compare_numbers(recorded, tasks(3.505, chat=2.1))
    assert [line[:12] for line in found] == ["differs: cha", "within: pros"]
    assert compare_numbers(recorded, tasks(3.5))[0] == "differs: chat was not measured again"


def test_commands(run: Path, tmp_path: Path, capsys) -> None:
    app = typer.Typer()
    add_commands(app)

    def call(*arguments: object) -> str:
        app([str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    assert call("card", run, "--license", "mit").startswith("---\n")
    call("card", run, "--to", tmp_path / "cards" / "README.md")
    assert "# demo" in (tmp_path / "cards" / "README.md").read_text()
    assert call("push", run, "me/demo", "--dry-run").endswith("nothing was sent\n")
    assert str(run / "reproduce") in call("reproduce", run)
    os.utime(tmp_path / "questions.jsonl", (1, 1))
    with pytest.raises(UserError, match=r"^1 of \d+ inputs differ here: data mine") as caught:
        call("reproduce", run, "--to", tmp_path / "elsewhere")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_comes_out_again_to_the_digit(recipe: Path, tmp_path: Path, store: Path) -> None:
    pipeline.run(config := load_config(recipe))
    folder, inputs = reproduce(Path(config.output) / config.name)
    assert _other(inputs) == {}
    lines = run_again(folder)
    assert len(lines) == 4
    assert {line.partition(":")[0] for line in lines} == {"equal"}


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()),
    lambda below: (
        st.dictionaries(st.text("abc", min_size=1), below, min_size=1, max_size=3)
        | st.lists(st.dictionaries(st.text("abc", min_size=1), below, min_size=1, max_size=2), min_size=1, max_size=3)
    ),
)


@given(st.dictionaries(st.text("abc", min_size=1), TREES, min_size=1, max_size=4))
def test_flat_inputs_are_read_back(tree: dict) -> None:
    from controlllm.changes import flatten

    assert nested(dict(flatten(tree))) == tree
    assert differences(tree, nested(dict(flatten(tree)))) == []
