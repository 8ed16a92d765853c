"""Functions and tokenizers of other people that do not do what they should, through the real command (T15)."""

# ruff: noqa: E501, F811 - one case a line; fixtures are asked for by their names

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_data import DATA
from kitchen import contains, kitchen  # noqa: F401 - a fixture

from controlllm.data.dataset import CATALOG, Dataset

FILE = {"a.jsonl": DATA["text"]}


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
    kitchen.write(FILE)
    contains(kitchen.refused("mix.datasets=[{name: theirs}]"), f"theirs ... {kitchen.folder}/data/{says}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_step_that_fails_is_named_with_the_row(name, kitchen, tiny_base, monkeypatch):
    function, says = FUNCTIONS[name]
    monkeypatch.setattr("bad_data.theirs", function, raising=False)
    kitchen.recipe("a.jsonl", "text", tiny_base)
    kitchen.write(FILE)
    said = kitchen.refused("mix.datasets.0.preprocess=[{strip: {}}, {function: {path: 'bad_data:theirs'}}]")
    contains(said, f"{kitchen.folder}/data/{says}")
    assert "function" in said


def test_a_field_that_a_function_looks_for_in_vain_is_named(kitchen, tiny_base, monkeypatch):
    made = Dataset("theirs", "data/a.jsonl", function=lambda row: row["txt"])
    monkeypatch.setitem(CATALOG, "theirs", made)
    kitchen.recipe("a.jsonl", "text", tiny_base)
    kitchen.write(FILE)
    said = kitchen.refused("mix.datasets=[{name: theirs}]")
    contains(said, "mix.datasets.0 (theirs): ... a.jsonl:1: field 'txt': missing; the row has: text; did you mean")


def test_a_step_whose_module_fails_is_named(kitchen, tiny_base, monkeypatch):
    (kitchen.folder / "falls.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(kitchen.folder)
    kitchen.recipe("a.jsonl", "text", tiny_base)
    kitchen.write(FILE)
    said = kitchen.refused("mix.datasets.0.preprocess=[{function: {path: 'falls:apart'}}]")
    contains(said, "mix.datasets.0.preprocess: a step cannot be built: ZeroDivisionError")


def patched(name: str, **values: Any) -> Callable[[Path], object]:
    """Changes to a JSON file of the model."""

    def change(model: Path) -> None:
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def without_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


def with_template(change: Callable[[str], str]) -> Callable[[Path], object]:
    def write(model: Path) -> None:
        file = model / "chat_template.jinja"
        file.write_text(change(file.read_text()))

    return write


def with_tokens(count: int, *, embeddings: int) -> Callable[[Path], object]:
    """So many tokens, of which those that text is made of are the last."""

    def grow(model: Path) -> None:
        file = model / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        words = list(tokenizer["model"]["vocab"])
        words[2:2] = [f"~{number}" for number in range(count - len(words))]
        tokenizer["model"]["vocab"] = {word: number for number, word in enumerate(words)}
        file.write_text(json.dumps(tokenizer))
        patched("config.json", vocab_size=embeddings)(model)

    return grow


NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
# name: (format, change to the model's folder, what is said ... in this order, nothing where it works)
MODELS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no template, for text": ("text", without_template, ""),
    "no template, for chat": ("messages", without_template, "no chat template; set pack.chat_template to one, or train on text"),
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
    "tokens without embeddings": ("messages", with_tokens(300, embeddings=258), "model.name: the tokenizer of ... with id 299, the model only 258 embeddings"),
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
        said = "".join(sorted(kitchen.texts()))
        assert all(words in said for words in ("4", "text" if format == "text" else "assistant\nit is "))
