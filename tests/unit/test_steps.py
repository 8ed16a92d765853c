"""Steps filter and change documents as their options say; a mistake in an option is one line; their hash is honest."""

import importlib.util
import itertools
import sys

import pytest

from controlllm.data.catalog import CATALOG
from controlllm.data.code_hash import code_hash
from controlllm.data.dataset import Dataset
from controlllm.data.language import LANGUAGES, language_of
from controlllm.data.steps import build_steps, step, step_fingerprint, steps_listing
from controlllm.errors import UserError

needs_language = pytest.mark.skipif(importlib.util.find_spec("py3langid") is None, reason="needs py3langid")
S = ("system", "be kind")
TALK = (("user", "hi 1"), ("assistant", "yes 1"), ("user", "hi 2"), ("assistant", "yes 2"), ("user", "hi 3"))


def talk(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def run(document, name, **options):
    (built,) = build_steps([{name: options}], where="p")
    return built.apply(document)


@pytest.mark.parametrize(("name", "options", "document", "result"), [
    ("length", {"min_chars": 3}, "ab", None),
    ("length", {"min_chars": 2, "max_chars": 2}, "ab", "ab"),
    ("length", {"max_chars": 7}, talk(*TALK[:2]), None),
    ("length", {"min_turns": 2}, talk(*TALK[:2]), None),
    ("length", {"max_turns": 2}, talk(*TALK), talk(*TALK)),
    ("length", {"min_turns": 2}, "a text has no turns", "a text has no turns"),
    ("regex", {"keep": r"\d"}, "abc", None),
    ("regex", {"keep": "yes", "drop": "no"}, talk(*TALK), talk(*TALK)),
    ("regex", {"drop": "hi", "role": "assistant"}, talk(*TALK), talk(*TALK)),
    ("regex", {"drop": "hi", "role": "user"}, talk(*TALK), None),
    ("replace", {"pattern": r"(\w+) (\d)", "by": r"\2 \1", "role": "user"}, talk(*TALK[:2]),
     talk(("user", "1 hi"), TALK[1])),
    ("strip", {}, " a\n", "a"),
    ("strip", {}, {"messages": talk(("user", " a ")), "tools": [{}]}, {"messages": talk(("user", "a")), "tools": [{}]}),
    ("system", {"content": "new"}, talk(S, *TALK[:2]), talk(("system", "new"), *TALK[:2])),
    ("system", {"content": "new", "only_missing": True}, talk(S, *TALK[:2]), talk(S, *TALK[:2])),
    ("system", {"drop": True}, talk(S, *TALK[:2]), talk(*TALK[:2])),
    ("system", {"drop": True}, "text", "text"),
    ("max_turns", {"turns": 1}, talk(S, *TALK), talk(S, *TALK[:2])),
    ("max_turns", {"turns": 2}, talk(*TALK), talk(*TALK[:4])),
    ("max_turns", {"turns": 3}, talk(*TALK), talk(*TALK)),
    ("max_turns", {"turns": 1}, talk(("user", "a"), ("user", "b"), ("assistant", "c")), None),
])  # fmt: skip
def test_steps(name, options, document, result):
    assert run(document, name, **options) == result


def test_a_sample_is_chosen_by_content():
    rows = [str(i) for i in range(4000)]
    options = ({"fraction": 0.1}, {"fraction": 0.3}, {"fraction": 0.3, "seed": 1})
    (tenth,), (third,), (other,) = (build_steps([{"sample": chosen}], where="p") for chosen in options)
    few, many, others = ({row for row in rows if s.apply(row)} for s in (tenth, third, other))
    assert few < many
    assert abs(len(many) - 1200) < 100
    assert abs(len(many & others) - 360) < 80


def test_your_own_function(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("def loud(document):\n    return document.upper()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("a", "function", path="mine:loud") == "A"


@needs_language
def test_languages():
    texts = {
        "en": "Please explain how photosynthesis works in simple terms.",
        "zh": "請用繁體中文回答這個問題。",
        "de": "Der Zug nach München hat heute leider zwanzig Minuten Verspätung.",
        "fr": "Quelle est la capitale de la France ?",
        "ja": "フランスの首都はどこですか?", "ru": "Какая столица Франции?", "und": "1 + 2 = 3",
    }  # fmt: skip
    assert {text: language_of(text) for text in texts.values()} == {text: code for code, text in texts.items()}
    kept = [code for code, text in texts.items() if run(text, "language", keep=["en", "zh"])]
    assert kept == ["en", "zh", "und"]
    assert run(texts["und"], "language", keep=["en"], unknown="drop") is None


@needs_language
def test_the_languages_are_those_of_the_library():
    from py3langid import rank

    assert {str(code) for code, _ in rank("a")} - {"zxx"} == LANGUAGES


def test_a_missing_detector_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(UserError, match=r"pip install 'controlllm\[language\]'"):
        run("a", "language", keep=["en"])


@pytest.mark.parametrize(("item", "says"), [
    ({"length": {"min_char": 3}}, "mix.0.length.min_char: unknown option; did you mean 'min_chars'?"),
    ({"length": {"min_chars": "3"}}, 'mix.0.length.min_chars: must be a valid integer, found "3"'),
    ({"length": {"min_chars": True}}, "mix.0.length.min_chars: must be a valid integer, found true"),
    ({"length": {"max_chars": 0}}, "mix.0.length.max_chars: must be greater than or equal to 1, found 0"),
    ({"length": {"min_chars": 9, "max_chars": 3}}, "mix.0.length.min_chars: 9 is above max_chars, 3"),
    ({"lenght": {}}, "mix.0: unknown step 'lenght'; did you mean 'length'?"),
    ({}, "mix.0: one step in each item of the list, found none"),
    ({"strip": {}, "length": {}}, "mix.0: one step in each item of the list, found 2: strip, length"),
    ({"length": None}, "mix.0.length: must be a section of options, found null"),
    ({"regex": {}}, "mix.0.regex: needs keep or drop, a regular expression"),
    ({"regex": {"keep": "("}}, "mix.0.regex.keep: not a valid regular expression: missing ), unterminated"),
    ({"regex": {"keep": "a", "role": "bot"}}, "mix.0.regex.role: must be 'system', 'developer', 'user', 'ass"),
    ({"replace": {"pattern": "a"}}, "mix.0.replace.by: required option is missing"),
    ({"replace": {"pattern": "a", "by": r"\1"}}, "mix.0.replace.by: not a valid replacement: invalid group"),
    ({"language": {"keep": ["english"]}}, "mix.0.language.keep: unknown language 'english'"),
    ({"language": {"keep": ["en", 3]}}, "mix.0.language.keep.1: must be a valid string, found 3"),
    ({"system": {}}, "mix.0.system: needs either content or drop: true"),
    ({"sample": {"fraction": 1.5}}, "mix.0.sample.fraction: must be less than or equal to 1, found 1.5"),
    ({"function": {"path": "nowhere"}}, "mix.0.function.path: must be like package.module:name, found 'nowhere'"),
    ({"function": {"path": "no.such:name"}}, "mix.0.function.path: cannot import no.such: No module named 'no'"),
    ({"function": {"path": "json:none"}}, "mix.0.function.path: json has no 'none'"),
    ({"function": {"path": "json:__name__"}}, "mix.0.function.path: json:__name__ is not a function"),
])  # fmt: skip
def test_a_mistake_is_one_line(item, says):
    with pytest.raises(UserError) as error:
        build_steps([item], where="mix")
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_listing():
    listed = {line.name: line for line in steps_listing()}
    assert listed["sample"].options == {"fraction": "float", "seed": "int = 0"}
    assert listed["length"].options["max_chars"] == "int | None = null"
    assert all(line.description for line in listed.values())


def test_a_name_is_taken_once():
    with pytest.raises(UserError, match=r"'strip' is registered twice, by .*builtin_steps and by test_steps"):
        step("strip")(lambda: None)


PLUGIN = """
import re
from functools import cache
from .helper import clean

LIMIT = 3

def convert(row):
    return clean(row["text"]) if long(row) else None

def long(row):
    return len(row["text"]) > LIMIT
"""
HELPER = "def clean(text):\n    return text.strip()\n\ndef other(text):\n    return text\n"
count = itertools.count()


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """The fingerprint of a dataset whose function stands in a package with this code."""
    monkeypatch.syspath_prepend(tmp_path)

    def of(plugin=PLUGIN, helper=HELPER):
        folder = tmp_path / f"{next(count)}"
        package = folder / "pluginpackage"
        package.mkdir(parents=True)
        for name, code in (("__init__", ""), ("helper", helper), ("main", plugin)):
            (package / f"{name}.py").write_text(code)
        from controlllm.data import code_hash as module

        module._module.cache_clear()
        for name in [name for name in sys.modules if name.startswith("pluginpackage")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(folder)
        main = importlib.import_module("pluginpackage.main")
        return step_fingerprint([], Dataset("own", "x", function=main.convert))

    return of


@pytest.mark.parametrize("change", [
    ("def convert(row):", "# a remark\ndef convert(row):\n    '''Says what it does.'''"),
    ("def convert(row):", "def convert(row: dict) -> str:"),
    ("def long(row):", "def another(row):\n    return None\n\ndef long(row):"),
    ("LIMIT = 3", "LIMIT =   (3)"),
])  # fmt: skip
def test_the_hash_stays_where_nothing_changes(hash_of, change):
    assert hash_of() == hash_of(PLUGIN.replace(*change))
    assert hash_of() == hash_of(helper=HELPER.replace("return text\n", "return text + '!'\n"))


@pytest.mark.parametrize("change", [
    ("LIMIT = 3", "LIMIT = 4"),
    (">", ">="),
    ('clean(row["text"])', 'row["text"]'),
    ("    return len", "    row = {}\n    return len"),
])  # fmt: skip
def test_the_hash_moves_with_the_code(hash_of, change):
    assert hash_of() != hash_of(PLUGIN.replace(*change))


def test_the_hash_moves_with_another_module_and_a_library(hash_of, monkeypatch):
    assert hash_of() != hash_of(helper=HELPER.replace("strip", "lstrip"))
    with_library = PLUGIN.replace("import re", "import numpy as np").replace("LIMIT = 3", "LIMIT = np.int64(3)")
    before = hash_of(with_library)
    monkeypatch.setattr("controlllm.data.code_hash.version", lambda name: "99")
    assert hash_of(with_library) != before
    assert hash_of() == hash_of()


def test_the_hash_knows_options_and_order():
    def of(*items, data="puzzles"):
        return step_fingerprint(build_steps(list(items), where="p"), CATALOG[data])

    a, b = {"length": {"min_chars": 3}}, {"strip": {}}
    own = [{"function": {"path": path}} for path in ("test_steps:talk", "test_steps:run")]
    hashes = [of(), of(a), of({"length": {"min_chars": 4}}), of(a, b), of(b, a)]
    hashes += [of(data="samsum"), of(data="alpaca_zh"), *map(of, own)]
    assert len(set(hashes)) == len(hashes)
    assert of(a) == of({"length": {"min_chars": 3, "max_chars": None}})


def test_the_hash_of_a_form_follows_what_reads_it():
    from controlllm.data import forms
    from controlllm.data.code_hash import _module, _place, _used

    seen, pending = set(), [_place(forms.FORMS["sharegpt"].read)]
    while pending:
        place = pending.pop()
        if place not in seen and place[0].startswith("controlllm"):
            seen.add(place)
            pending += _used(place)
    assert {("controlllm.data.forms", "SHAREGPT_ROLES"), ("controlllm.data.messages", "EXTRAS")} <= seen
    assert ("controlllm.data.forms", "_read_alpaca") not in seen
    assert code_hash(forms.FORMS["text"].read) != code_hash(forms.FORMS["alpaca"].read)
    assert _module("controlllm.data.forms").definitions.keys() >= {"FORMS", "Form"}
