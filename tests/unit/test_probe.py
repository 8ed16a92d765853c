"""The probe from folder to folder: nothing moved where nothing was trained, and what is wrong is one line."""

import json
import math
import sys

import pytest
import torch
import typer
from probing import base_model, expanded, read, saved
from safetensors.torch import load_file

from controlllm import cli_probe
from controlllm.config import ProbeConfig, PromptConfig
from controlllm.control.expand import control_blocks, decoder_layers
from controlllm.errors import UserError
from controlllm.probe import probe
from controlllm.probe.prompts import read_prompts, visible

TEXTS = ["one and two", "three"]


@pytest.mark.parametrize(
    ("layout", "interpolation", "dtype"),
    [("concat", "dlerp", None), ("stack", "lerp", None), ("hybrid", "moe", None), ("concat", "lerp", "bfloat16")],
)
def test_untrained_model_is_its_base(layout, interpolation, dtype, tokenizer, tmp_path):
    folder = saved(expanded(layout=layout, interpolation=interpolation), tokenizer, tmp_path / "run" / "model")
    made = probe(folder, ProbeConfig(prompts=TEXTS, drawn=1, dtype=dtype))
    assert made == tmp_path / "run" / "probe"
    result, rows = read(made)
    stacked = {"concat": 0, "hybrid": 1, "stack": 2}[layout]
    assert len(result["layers"]) == 5 + stacked
    assert len(rows) == sum(map(len, TEXTS)) * (5 + stacked)
    assert all(row["cosine"] == pytest.approx(1, abs=1e-12) for row in rows)
    assert all(row["norm_ratio"] == 1 and row["angle"] == 0 for row in rows)
    assert {layer["cka"] for layer in result["layers"]} == {1}
    assert len(result["sites"]) == 2 - stacked
    for site in result["sites"]:
        assert site["distance"] == 0
        assert set(site["attention"]) == {0}
        assert site["alpha"] == {"moe": 1}.get(interpolation, 0.5)
    for prompt in result["prompts"]:
        assert all(one["kl"] == 0 and one["base"] == one["tuned"] for one in prompt["lens"])
        assert prompt["importance"]["base"] == pytest.approx(
            prompt["importance"]["tuned"], rel=1e-3, abs=1e-3 if dtype else 1e-6
        )
    if stacked < 2:
        maps = load_file(made / "attention.safetensors")
        assert {name.split(".")[0] for name in maps} == {"prompt0"}
        for name in maps:
            assert torch.equal(maps[name], maps[name.replace("twin", "frozen")])


def test_plain_model_beside_its_base(tokenizer, tmp_path, capsys):
    base, tuned = base_model(), base_model()
    decoder_layers(tuned.base_model)[2].mlp.down_proj.weight.data *= 1.5
    folders = [saved(m, tokenizer, tmp_path / name) for m, name in ((base, "base"), (tuned, "tuned"))]
    made = probe(folders[1], ProbeConfig(prompts=TEXTS, tokens=6), base=folders[0], to=tmp_path / "out")
    result, _ = read(made)
    moved = [layer["angle_max"] > 0 for layer in result["layers"]]
    assert moved == [False, False, False, True, True]
    assert [layer["cka"] == 1 for layer in result["layers"]] == [not one for one in moved]
    assert result["sites"] == []
    assert not (made / "attention.safetensors").exists()
    assert "prompt 1: cut to its first 6 tokens, 5 left out" in (said := capsys.readouterr().err)
    assert "moved most: token" in said
    assert result["prompts"][0]["cut"] == 5


def test_one_token_is_enough_and_a_diverged_model_is_told(tokenizer, tmp_path):
    model = expanded(moved=[0])
    result, rows = read(probe(saved(model, tokenizer, tmp_path / "model"), ProbeConfig(prompts=["a"])))
    assert len(rows) == 5
    assert result["least_cka"] is None
    control_blocks(model)[0].expanded.mlp.down_proj.weight.data *= math.nan
    with pytest.raises(UserError, match=r"prompt 1: hidden states of .* are not finite"):
        probe(saved(model, tokenizer, tmp_path / "broken"), ProbeConfig(prompts=["a"]))


def test_model_with_virtual_tokens_holds_its_base(tokenizer, tmp_path):
    from controlllm.train.prompt import add_prompt, detach
    from controlllm.train.prompt_files import save_prompt

    for kind in ("prompt", "prefix"):
        model, folder = base_model(), tmp_path / kind
        add_prompt(model, PromptConfig(kind=kind, num_virtual_tokens=3), seed=0)
        folder.mkdir()
        save_prompt(detach(model), model.config, folder / "adapter", base_name="tiny")
        result, rows = read(probe(saved(model, tokenizer, folder), ProbeConfig(prompts=TEXTS), to=tmp_path / "out"))
        assert len(rows) == 5 * sum(map(len, TEXTS))
        first, *others = result["layers"]
        assert first["cosine"] == 1
        assert all(layer["cosine"] < 1 for layer in others)


def test_base_that_is_missing_or_wrong_is_one_line(tokenizer, tmp_path):
    plain = saved(base_model(), tokenizer, tmp_path / "plain")
    other = saved(base_model(num_hidden_layers=2), tokenizer, tmp_path / "other")
    twins = saved(expanded(), tokenizer, tmp_path / "twins")
    for folder, base, said in (
        (plain, None, "is a plain model; give the folder of the one it was made from with --base"),
        (plain, other, "num_hidden_layers is 2, but 4"),
        (plain, tmp_path / "none", "has no config.json"),
        (twins, plain, "holds its base itself; leave it out"),
        (tmp_path / "none", None, "has no config.json"),
    ):
        with pytest.raises(UserError, match=said) as error:
            probe(folder, ProbeConfig(prompts=TEXTS), base=base)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="lies inside the checkpoint"):
        probe(twins, ProbeConfig(prompts=TEXTS), to=twins / "probe")


def test_command_names_the_option_that_is_wrong(tmp_path):
    app = typer.Typer()
    app.callback()(lambda: None)
    cli_probe.add_commands(app)
    with pytest.raises(UserError, match="--tokens: Input should be greater than 0, found 0"):
        app(["probe", str(tmp_path), "--prompts", "p.txt", "--tokens", "0"], standalone_mode=False)
    with pytest.raises(UserError, match=r"--dtype: .*float32"):
        app(["probe", str(tmp_path), "--prompts", "p.txt", "--dtype", "float64"], standalone_mode=False)


def test_prompts_from_every_kind_of_file(tokenizer, tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": "a\nb"}, {"messages": chat}, {"messages": [*chat, {"role": "assistant", "content": "Yes"}]}]
    file, text = tmp_path / "p.jsonl", tmp_path / "p.txt"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    text.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\n")
    found = read_prompts(ProbeConfig(prompts=str(file)), tokenizer)
    said = [tokenizer.decode(prompt.ids) for prompt in found]
    opened = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert said == ["a\nb", opened, opened + "Yes<|im_end|>\n"]
    assert found[0].tokens == ["a", "↵", "b"]
    assert found[1].where == "p.jsonl: row 2"
    assert [p.where for p in read_prompts(ProbeConfig(prompts=str(text)), tokenizer)] == [
        "p.txt: row 1",
        "p.txt: row 3",
    ]
    assert len(read_prompts(ProbeConfig(prompts=str(text), items=1), tokenizer)) == 1
    for source, count in ((file, 3), (text, 2)):
        with source.open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert len(read_prompts(ProbeConfig(prompts="-"), tokenizer)) == count


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"fine\n\xff\xfe", "p.txt: row 2 is not UTF-8"),
        ("p.txt", b"\n \n", "has no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\nplain', "p.jsonl: row 2 is not JSON"),
        ("p.jsonl", b'{"text": "a"}', "row 1 has neither 'prompt' nor 'messages'; found: text"),
        ("p.jsonl", b"[1]", "row 1 has neither 'prompt' nor 'messages'; found: list"),
        ("p.jsonl", b'{"prompt": 3}', "row 1: prompt must be a text"),
        ("p.jsonl", b'{"messages": []}', "row 1: prompt must be a text, messages a list"),
        ("p.jsonl", b'{"prompt": ""}', "row 1 is empty"),
        ("p.none", None, "is not there"),
    ],
)
def test_what_is_wrong_with_prompts_is_one_line_with_its_row(name, content, said, tokenizer, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_prompts(ProbeConfig(prompts=str(tmp_path / name)), tokenizer)
    assert "\n" not in str(error.value)


def test_tokens_are_words_that_can_be_seen():
    assert visible("  a b ") == "··a b·"
    assert visible(" ") == "·"
    assert visible("\n\t\x00\u202e") == "↵⇥\\u0000\\u202e"
    assert visible("x" * 40) == "x" * 15 + "…"
