"""The model card: its front matter is the Hub's, its text is harmless, its facts are the run's."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from shared_run import make_run, summary

from controlllm.base_facts import folder_facts, gguf_facts
from controlllm.base_model import save_base
from controlllm.card import code, escaped, make_card
from controlllm.card_data import licence_of
from controlllm.config import ModelConfig
from controlllm.errors import UserError

APACHE = {"license": "apache-2.0", "language": ["en", "Klingon of old"]}


def test_front_matter_is_what_the_hub_reads(tiny_base: Path, tmp_path: Path, store: Path) -> None:
    data = ModelCard(make_card(make_run(tmp_path, tiny_base, facts=APACHE), base_model="org/base")).data
    assert data.license == "apache-2.0"
    assert data.language == ["en"]
    assert (data.base_model, data["base_model_relation"]) == ("org/base", "finetune")
    assert {"controlllm", "control-llm"} <= set(data.tags)
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("puzzles", "exact_match"): 0.23, ("puzzles", "loss"): 0.42, ("prose", "loss"): 3.734, ("chat", "loss"): 2.6,
    }  # fmt: skip


def test_the_text_has_numbers_data_settings_and_no_path(tiny_base: Path, tmp_path: Path, store: Path) -> None:
    text = make_card(make_run(tmp_path, tiny_base, facts=APACHE))
    assert "| Puzzles | new | exact match | 96 | 0.0 % | 23.0 % | +23.0 points [+15.0, +31.0] | learned |" in text
    assert "| Chat | old | loss, nats per token | 96 | 2.300 | 2.600 | +0.300 [+0.200, +0.400] | forgot |" in text
    assert "| mine | a file | all | not known |" in text
    assert "| `train.seed` | `0` |" in text
    assert "21.2 M of 155.8 M" in text
    assert "import controlllm" in text
    assert "2501.10979" in text
    for folder in (tmp_path, tiny_base, Path.home(), store):
        assert str(folder) not in text


def test_what_was_not_compared_what_it_cost_and_where(tiny_base: Path, tmp_path: Path, store: Path) -> None:
    machine = {"device": "CPU (x86_64)", "cores": 2, "python": "3.11.7"}
    told = summary(cost={"flops": 1.5e15, "memory": 2e9, "seconds": 1})
    told["comparison"]["left_out"] = {"gsm8k": "item 3 has a loss of nan after"}
    text = make_card(make_run(tmp_path, tiny_base, numbers=told | {"environment": {"machine": machine}}))
    assert "- gsm8k was not compared: item 3 has a loss of nan after" in text
    assert "1.5e+15 FLOPs, at most 2.0 GB of memory in each" in text
    assert "Machine: CPU (x86\\_64), 2 cores, Python 3.11.7." in text


def test_a_checkpoint_by_itself_says_that_nothing_is_known(tiny_base: Path) -> None:
    text = make_card(tiny_base)
    assert "Nothing was measured" in text
    assert "import controlllm" not in text  # a plain model needs none
    assert ModelCard(text).data.library_name == "transformers"
    assert ModelCard(text).data.license == "other"
    assert "licence of the base model was not recorded" in text


@pytest.mark.parametrize(
    ("stated", "chosen", "found"),
    [
        ({}, None, {"license": "other"}),
        ({"license": "MIT"}, None, {"license": "mit"}),
        ({"license": ["mit", "x"]}, None, {"license": "mit"}),
        ({"license": "mit"}, "apache-2.0", {"license": "apache-2.0"}),
        ({"license": "my-own"}, None, {"license": "other", "license_name": "my-own"}),
        (
            {"license": "other", "license_name": "qwen", "license_link": "https://q.org"},
            None,
            {"license": "other", "license_name": "qwen", "license_link": "https://q.org"},
        ),
    ],
)
def test_licences(stated: dict, chosen: str | None, found: dict) -> None:
    assert licence_of({"base": stated}, chosen) == found


@pytest.mark.parametrize(
    ("change", "said"),
    [({"license": "two words"}, "--license: 'two words'"), ({"base_model": "/a/b"}, "--base-model: '/a/b'")],
)
def test_values_that_the_hub_refuses(change: dict, said: str, tiny_base: Path) -> None:
    with pytest.raises(UserError, match=said):
        make_card(tiny_base, **change)


def test_neither_run_nor_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a run"):
        make_card(tmp_path)


def test_text_of_models_and_data_stays_text(tiny_base: Path, tmp_path: Path, store: Path) -> None:
    evil = "<script>alert(1)</script> | [x](javascript:1) ![i](http://e) `c`\n---\nlicense: mit\n# head *b*"
    numbers = summary(headline=evil, method=evil)
    numbers["comparison"]["tasks"]["chat"]["title"] = evil
    run = make_run(tmp_path, tiny_base, facts={"license": evil, "title": evil, "organization": evil}, numbers=numbers)
    text = make_card(run)
    page = MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])
    assert page.count("alert(1)") >= 4
    for harm in ("<script", 'href="javascript', "<img", "head</h", "<em>b", "<code>c<"):
        assert harm not in page
    assert {row.count("<td") for row in page.split("<tr>") if "<td>forgot<" in row} == {8}
    data = ModelCard(text).data
    assert data.license == "other"
    assert [r.dataset_name for r in data.eval_results if r.dataset_type == "chat"] == [evil]


@given(st.text())
def test_no_text_leaves_its_place(text: str) -> None:
    shown = escaped(text)
    assert "\n" not in shown
    assert "<" not in shown
    for mark in "`*_[]|#":
        assert shown.count(mark) == shown.count(f"\\{mark}")
    span = code(text)
    fence = span[: len(span) - len(span.lstrip("`"))]
    assert span.endswith(fence)
    assert fence not in span[len(fence) : -len(fence)].replace(" ", "  ") or not fence


def test_the_licence_of_a_local_base_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "README.md").write_text("---\nlicense: llama3.1\nlanguage: [en, de]\ntags: [x]\n---\n# A model\n")
    (base / "LICENSE").write_text("terms")
    (made := tmp_path / "made").mkdir()
    save_base(ModelConfig(name=str(base)), made)
    assert folder_facts(made) == {"license": "llama3.1", "language": ["en", "de"]}
    assert (made / "LICENSE").read_text() == "terms"
    assert not (made / "README.md").exists()
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert folder_facts(base) == {}


def test_a_tuned_model_as_base_hands_its_licence_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"lineage": {"base": APACHE}}))
    assert folder_facts(tmp_path) == APACHE


def test_facts_of_a_gguf_file(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_languages(["en", "fr"])
    writer.add_organization("org")
    writer.add_tensor("t", np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = gguf_facts(tmp_path / "m.gguf")
    assert facts == {"license": "apache-2.0", "language": ["en", "fr"], "organization": "org", "file": "m.gguf"}
