"""Bad data through the real command (T15): one line that says where and what, nothing half-made, and repaired it runs."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bad_data import BAD_LINES, DAMAGED, DATA, GOOD, RECIPE, ROWS, WORKS, WRONG, lines

from controlllm.cli import main
from controlllm.data.dataset import CATALOG, Dataset
from controlllm.data.shard import ShardStore, file_name
from controlllm.errors import UserError


@dataclass
class Kitchen:
    """A folder with a recipe and data in which `controlllm prepare` is run."""

    folder: Path
    store: Path
    capsys: pytest.CaptureFixture[str]

    def write(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            file = self.folder / "data" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def recipe(self, source: str, format: str, model: Path) -> None:
        where = source if "://" in source else f"data/{source}"
        text = RECIPE.format(source=json.dumps(where), format=format, model=model)
        (self.folder / "bad.yaml").write_text(text)

    def prepare(self, *changes: str) -> dict[str, Any]:
        """Counts of a run that must succeed."""
        assert main(["prepare", "bad.yaml", *changes]) == 0, self.capsys.readouterr().err
        assert "error" not in self.capsys.readouterr().err
        return json.loads(self.made("stats.json").read_text())

    def refused(self, *changes: str) -> str:
        """The one line of a run that must fail, and leaves nothing that could be taken for its output."""
        assert main(["prepare", "bad.yaml", *changes]) == 1
        printed = self.capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, printed.err
        assert printed.err.splitlines()[-1] == errors[0]
        assert "Traceback" not in printed.err
        assert "SECRET" not in printed.err + printed.out
        assert not [folder for folder in self.outputs() if folder.is_dir()]
        self._shards_are_whole()
        return errors[0].removeprefix("error: ")

    def _shards_are_whole(self) -> None:
        shards = ShardStore(self.store / "shards")
        whole = {f"{key}.json" for key in shards.keys()}
        for key in shards.keys():
            facts = shards.facts(key)
            assert facts, f"{key} is half a shard"
            whole |= {file_name(key, kind) for kind in facts["files"]}
        assert {file.name for file in (self.store / "shards").iterdir() if file.suffix != ".claim"} == whole

    def outputs(self) -> Iterator[Path]:
        return (self.store / "prepare").glob("*")

    def made(self, name: str) -> Path:
        """A file of the newest output."""
        return max(self.outputs(), key=lambda folder: folder.stat().st_mtime_ns if folder.is_dir() else 0) / name

    def quarantine(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.made("quarantine.jsonl").read_text().splitlines()]


@pytest.fixture
def kitchen(tmp_path, store, monkeypatch, capsys) -> Kitchen:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTROLLLM_WORKERS", "1")
    return Kitchen(tmp_path, store, capsys)


def contains(said: str, says: str) -> None:
    for fragment in says.split(" ... "):
        assert fragment in said, said


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
    assert [(row["row"], row["field"]) for row in found] == [(row, field) for row, field, _ in expected]
    for row, (_, _, reason) in zip(found, expected, strict=True):
        assert (row["dataset"], row["file"]) == ("own", f"{kitchen.folder}/data/a.jsonl")
        assert row["reason"].startswith(reason) or reason in row["reason"]
    assert (counts["rows"], counts["bad_rows"], counts["filtered_rows"]) == (len(mixed), len(cases), 0)
    assert counts["documents"] + counts["validation_documents"] == 400
    assert counts["datasets"]["own"]["shards"] > 3


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
    assert not [file for file in kitchen.store.rglob("*") if file.is_file() and b"SECRET" in file.read_bytes()]


@pytest.mark.parametrize("name", WORKS)
def test_unusual_but_fine(name, kitchen, tiny_base):
    format, files, source, changes, rows, documents = WORKS[name]
    kitchen.recipe(source, format, tiny_base)
    kitchen.write(files)
    counts = kitchen.prepare(*changes)
    assert (counts["rows"], counts["documents"], counts["bad_rows"]) == (rows, documents, 0)
    assert counts["filtered_rows"] == rows - documents
    assert kitchen.quarantine() == []


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


def boom(_: Any) -> Any:
    raise RuntimeError("boom")


def absent(_: Any) -> Any:
    return Path("/absent/file").read_text()


# name: (what the function does with a row, what is said ... in this order)
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "raises": (boom, "a.jsonl:1: ... RuntimeError: boom"),
    "divides by zero": (lambda row: len(row) // 0, "a.jsonl:1: ... ZeroDivisionError: "),
    "has no end": (lambda row: FUNCTIONS["has no end"][0](row), "a.jsonl:1: ... RecursionError: "),
    "returns a number": (lambda row: 5, "a.jsonl:1: a document is text, messages or an object with ... found a number"),
    "returns a pair": (lambda row: ("a", "b"), "a.jsonl:1: a document is text, ... found tuple"),
    "returns nothing to learn": (
        lambda row: [{"role": "user", "content": "x"}],
        "a.jsonl:1: field 'messages': no assistant turn",
    ),
    "needs another file": (absent, "a.jsonl:1: ... FileNotFoundError: ... /absent/file"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_datasets_function_that_fails_is_named_with_the_row(name, kitchen, tiny_base, monkeypatch):
    function, says = FUNCTIONS[name]
    monkeypatch.setitem(CATALOG, "theirs", Dataset("theirs", "data/a.jsonl", function=function))
    kitchen.recipe("a.jsonl", "text", tiny_base)
    kitchen.write(DATA_FILE)
    contains(kitchen.refused("mix.datasets=[{name: theirs}]"), f"theirs ... {kitchen.folder}/data/{says}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_step_that_fails_is_named_with_the_row(name, kitchen, tiny_base, monkeypatch):
    function, says = FUNCTIONS[name]
    monkeypatch.setattr("bad_data.theirs", function, raising=False)
    kitchen.recipe("a.jsonl", "text", tiny_base)
    kitchen.write(DATA_FILE)
    said = kitchen.refused("mix.datasets.0.preprocess=[{strip: {}}, {function: {path: 'bad_data:theirs'}}]")
    contains(said, f"{kitchen.folder}/data/{says}")
    assert "function" in said


def test_a_field_that_a_function_looks_for_in_vain_is_named(kitchen, tiny_base, monkeypatch):
    made = Dataset("theirs", "data/a.jsonl", function=lambda row: row["txt"])
    monkeypatch.setitem(CATALOG, "theirs", made)
    kitchen.recipe("a.jsonl", "text", tiny_base)
    kitchen.write(DATA_FILE)
    said = kitchen.refused("mix.datasets=[{name: theirs}]")
    contains(said, "mix.datasets.0 (theirs): ... a.jsonl:1: field 'txt': missing; the row has: text; did you mean")


def patched(name: str, **values: Any) -> Callable[[Path], object]:
    """Changes to a JSON file of the model."""

    def change(model: Path) -> None:
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def with_template(change: Callable[[str], str]) -> Callable[[Path], object]:
    def write(model: Path) -> None:
        file = model / "chat_template.jinja"
        file.write_text(change(file.read_text()))

    return write


def with_tokens(count: int, *, embeddings: int) -> Callable[[Path], object]:
    def grow(model: Path) -> None:
        file = model / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary |= {f"~{number}": number for number in range(len(vocabulary), count)}
        # One of them is found in the rows: the two last characters of "it is 7".
        file.write_text(json.dumps(tokenizer))
        patched("config.json", vocab_size=embeddings)(model)

    return grow


WITHOUT = (lambda model: (model / "chat_template.jinja").unlink(), "")
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
# name: (format, change to the model's folder, what is said ... in this order, nothing where it works)
MODELS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no template, for text": ("text", WITHOUT[0], ""),
    "no template, for chat": ("messages", WITHOUT[0], "no chat template; set pack.chat_template to one, or train on text"),
    "empty template": ("messages", with_template(lambda _: ""), "no chat template; set pack.chat_template"),
    "syntax error": ("messages", with_template(lambda _: "\n{{ m. }}"), "the chat template is not valid: line 2: ... set pack.chat_template"),
    "no end of turn": ("messages", with_template(lambda _: NO_END), "a.jsonl:1: the chat template writes no end-of-turn token after an answer"),
    "refuses": ("messages", with_template(lambda t: "{{ raise_exception('roles must alternate') }}" + t), "a.jsonl:1: the chat template refuses the conversation: roles must alternate"),
    "unknown name": ("messages", with_template(lambda t: "{{ nothing.x }}" + t), "a.jsonl:1: the chat template refuses the conversation: 'nothing' is undefined"),
    "drops the answer": ("messages", with_template(lambda t: t.replace("m['content']", "'x'")), "a.jsonl:1: the chat template drops an answer"),
    "runs code": ("messages", with_template(lambda t: "{{ ''.__class__.__mro__ }}" + t), "a.jsonl:1: the chat template refuses the conversation: access to attribute '__class__'"),
    "reads a file": ("messages", with_template(lambda t: "{% include '/etc/hosts' %}" + t), "a.jsonl:1: the chat template refuses the conversation: no loader"),
    "no EOS, for text": ("text", patched("tokenizer_config.json", eos_token=None), "has no EOS token: texts cannot be told apart; set eos_token"),
    "no EOS, for chat": ("messages", patched("tokenizer_config.json", eos_token=None), ""),
    "ids of 32 bits": ("messages", with_tokens(70_000, embeddings=70_000), ""),
    "tokens without embeddings": ("messages", with_tokens(300, embeddings=258), "model.name: the tokenizer of ... has the token '~299' with id 299, the model only 258 embeddings"),
    "no tokenizer in the file": ("text", lambda model: (model / "tokenizer.json").write_text("{}"), "model.name: the tokenizer of ... cannot be loaded"),
    "tokenizer cut off": ("text", lambda model: os.truncate(model / "tokenizer.json", 900), "model.name: the tokenizer of ... cannot be loaded"),
    "code of its own": ("text", patched("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}, tokenizer_class="Y"), "model.name: the tokenizer of ... cannot be loaded: ... custom code"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_tokenizer(name, kitchen, tiny_base):
    format, change, says = MODELS[name]
    model = shutil.copytree(tiny_base, kitchen.folder / "model")
    change(model)
    kitchen.recipe("a.jsonl", format, model)
    kitchen.write({"a.jsonl": DATA[format]})
    probes = "benchmark={new: [], old: [prose], items: 1}"  # texts, which need no template
    if says:
        contains(kitchen.refused(probes), says)
    else:
        assert kitchen.prepare(probes)["documents"] == 5
