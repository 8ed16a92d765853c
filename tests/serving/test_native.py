"""vLLM's own layers give transformers' tokens, whatever the engine does with its memory meanwhile."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPTS, Engines, engines, expected, trained
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral"]
INTERPOLATIONS = ["lerp", "dlerp", "dlerpin", "slerp", "moe", "prog", "proj", "none"]
LONG = [[(7 * i * i + 3 * row) % 127 + 1 for i in range(90 + 40 * row)] for row in range(3)]
GREEDY = {"do": "generate", "prompts": PROMPTS}
FACTS = {"do": "facts"}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2}


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with engines(tmp_path_factory.mktemp("log") / "vllm.log") as started:
        yield started


def _saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def _one_each(answers: list[list[list[int]]]) -> list[list[int]]:
    return [only for (only,) in answers]


def _same(ask: Engines, folder: Path, model: Any, **engine: Any) -> dict[str, Any]:
    tokens, facts = ask(_saved(folder, model), GREEDY, FACTS, **engine)
    assert _one_each(tokens) == expected(model, PROMPTS)
    return facts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("layout", ["concat", "hybrid"])
def test_greedy_tokens(family: str, interpolation: str, layout: str, ask: Engines, tmp_path: Path) -> None:
    model = trained(family, sites=[1, 3], layout=layout, interpolation=interpolation)
    assert _same(ask, tmp_path, model)["classes"] == [f"Control{family}ForCausalLM"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_is_a_stock_model(family: str, ask: Engines, tmp_path: Path) -> None:
    facts = _same(ask, tmp_path, trained(family, sites=[1, 3], layout="stack"))
    assert facts["classes"] == [f"{family}ForCausalLM"]
    assert len(facts["layers"]) == 6


@pytest.mark.parametrize("sites", [[0, 1, 2, 3], [0], [3], [0, 2]], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_sites(sites: list[int], family: str, ask: Engines, tmp_path: Path) -> None:
    """All of them, the first, the last, and a last layer that is none."""
    assert len(_same(ask, tmp_path, trained(family, sites=sites))["layers"]) == 4 + len(sites)


@pytest.mark.parametrize("relaxation", [0.3, "learned"])
@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_relaxed_norms(relaxation: Any, family: str, ask: Engines, tmp_path: Path) -> None:
    _same(ask, tmp_path, trained(family, sites=[0, 1, 3], norm_relaxation=relaxation))


@pytest.mark.parametrize(("family", "changes", "expected_class"), [
    ("Mistral", {"sliding_window": 8}, "ControlMistralForCausalLM"),
    ("Qwen3", WINDOWS | {"layer_types": ["sliding_attention"] * 4}, "ControlQwen3ForCausalLM"),
    ("Qwen2", WINDOWS, "ControlForCausalLM"),
    ("Phi3", {}, "ControlPhi3ForCausalLM"),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}, "ControlLlamaForCausalLM"),
    ("SmolLM3", {}, "ControlForCausalLM"),
])  # fmt: skip
def test_other_models(family: str, changes: dict[str, Any], expected_class: str, ask: Engines, tmp_path: Path) -> None:
    model = trained(family, changes, sites=[0, 3], interpolation="dlerp")
    assert _same(ask, tmp_path, model)["classes"] == [expected_class]


@pytest.mark.parametrize("family", ["Llama", "SmolLM3"])
@pytest.mark.parametrize("layout", ["concat", "hybrid"])
def test_the_dial_turns_while_the_engine_runs(family: str, layout: str, ask: Engines, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sites": [0, 1, 2, 3], "layout": layout, "interpolation": "dlerp"}
    folder = _saved(tmp_path, trained(family, **settings, alpha_scale=0.3))
    turns = [{"do": "turn", "scale": scale} for scale in (0.0, 0.5, 1.0)]
    first, _, base, _, half, _, whole = ask(folder, GREEDY, *(s for turn in turns for s in (turn, GREEDY)))
    for scale, tokens in {0.3: first, 0.0: base, 0.5: half, 1.0: whole}.items():
        assert _one_each(tokens) == expected(trained(family, **settings, alpha_scale=scale), PROMPTS), scale
    assert len({str(tokens) for tokens in (first, base, half, whole)}) == 4


def test_a_dial_needs_a_scale_and_twins(ask: Engines, tmp_path: Path) -> None:
    pairs = _saved(tmp_path / "pairs", trained("Llama", sites=[1]))
    with pytest.raises(ValueError, match=r"alpha_scale must be between 0 .*, found 1.5"):
        ask(pairs, {"do": "turn", "scale": 1.5})
    stacked = _saved(tmp_path / "stack", trained("Llama", sites=[1], layout="stack"))
    with pytest.raises(ValueError, match="alpha_scale: LlamaForCausalLM has no twins"):
        ask(stacked, {"do": "turn", "scale": 0.5})


def test_every_attention_has_its_layer_of_the_cache(ask: Engines, tmp_path: Path) -> None:
    facts = _same(ask, tmp_path, trained("Llama", sites=[1, 3]))
    assert len(set(facts["layers"])) == 6
    per_token = 6 * 2 * 2 * 32 * 4  # attentions × keys and values × heads × their size × bytes of float32
    assert facts["bytes"] == facts["blocks"] * 32 * per_token


@pytest.mark.parametrize("branches", [0, 2])
def test_the_memory_buys_fewer_blocks_for_more_attentions(branches: int, ask: Engines, tmp_path: Path) -> None:
    sites = [1, 3] if branches else [0]
    layout = "concat" if branches else "stack"
    model = _saved(tmp_path, trained("Llama", sites=sites, layout=layout))
    (facts,) = ask(model, FACTS, num_gpu_blocks_override=None, kv_cache_memory_bytes=6_000_000)
    attentions = 4 + len(sites)
    assert len(facts["layers"]) == attentions
    assert facts["blocks"] == 6_000_000 // (32 * attentions * 2 * 2 * 32 * 4)


def test_several_samples_of_a_prompt(ask: Engines, tmp_path: Path) -> None:
    model = trained("Llama", sites=[1, 3])
    seeded = GREEDY | {"n": 3, "temperature": 1.0, "seed": 7}
    likeliest = GREEDY | {"n": 3, "temperature": 1.0, "top_k": 1}
    first, second, same = ask(_saved(tmp_path, model), seeded, seeded, likeliest)
    assert first == second
    assert all(len(answer) == 16 and all(0 <= token < 128 for token in answer) for row in first for answer in row)
    assert any(len({tuple(answer) for answer in row}) > 1 for row in first)
    assert same == [[tokens] * 3 for tokens in expected(model, PROMPTS)]


def test_requests_that_lose_their_blocks(ask: Engines, tmp_path: Path) -> None:
    model = trained("Qwen3", sites=[0, 3])
    prompts = [[i + 1] * 20 + [i + 2, 3, 5] for i in range(8)]
    step = {"do": "preempted", "prompts": prompts, "max_tokens": 100}
    (found,) = ask(_saved(tmp_path, model), step, num_gpu_blocks_override=12, enable_prefix_caching=False)
    assert found["times"] > 0
    assert _one_each(found["tokens"]) == expected(model, prompts, tokens=100)


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_prefix_caching(on: bool, ask: Engines, tmp_path: Path) -> None:
    model = trained("Mistral", sites=[0, 3], interpolation="slerp")
    (found,) = ask(_saved(tmp_path, model), {"do": "cached", "prompts": LONG}, enable_prefix_caching=on)
    assert _one_each(found["tokens"]) == expected(model, LONG)
    assert (found["found"] > 0) == on


def test_long_prompts_in_chunks(ask: Engines, tmp_path: Path) -> None:
    model = trained("Qwen2", sites=[1, 2, 3], interpolation="dlerpin")
    step = {"do": "generate", "prompts": LONG}
    (tokens,) = ask(_saved(tmp_path, model), step, max_num_batched_tokens=48, enable_chunked_prefill=True)
    assert _one_each(tokens) == expected(model, LONG)


def test_frozen_tensors_under_the_names_of_the_base(ask: Engines, tmp_path: Path) -> None:
    model = trained("Llama", sites=[1, 3])
    file = _saved(tmp_path, model) / "model.safetensors"
    save_file({name.replace(".frozen.", "."): tensor for name, tensor in load_file(file).items()}, file)
    (tokens,) = ask(tmp_path, GREEDY)
    assert _one_each(tokens) == expected(model, PROMPTS)


@pytest.mark.parametrize(("change", "said"), [
    ({"model.layers.1.expanded.self_attn.q_proj.weight": None}, "layers.1.expanded.self_attn.q_proj.weight is missing"),
    ({"model.layers.0.mlp.up_proj.weight": None}, r"model.layers.0.mlp.up_proj.weight is missing \(1 in all\)"),
    ({"model.layers.1.interpolation.alpha_logit": None}, "model.layers.1.interpolation.alpha_logit is missing"),
    ({"model.layers.0.expanded.mlp.up_proj.weight": 1}, "layers.0.expanded.mlp.up_proj.weight is none of the model"),
    ({"model.layers.1.self_attn.q_proj.bias": 1}, "model.layers.1.frozen.self_attn.q_proj.bias is none of the model"),
    ({"model.layers.1.mlp.up_proj.weight": 1}, "model.layers.1.frozen.mlp.up_proj.weight is there twice"),
])  # fmt: skip
def test_half_a_checkpoint(change: dict[str, Any], said: str, ask: Engines, tmp_path: Path) -> None:
    file = _saved(tmp_path, trained("Llama", sites=[1])) / "model.safetensors"
    tensors = load_file(file)
    some = tensors["model.layers.1.frozen.mlp.up_proj.weight"]
    save_file(
        {n: t for n, t in tensors.items() if n not in change} | {n: some.clone() for n in change if change[n]}, file
    )
    with pytest.raises(ValueError, match=said) as error:
        ask(tmp_path, GREEDY)
    assert "\n" not in str(error.value)


def test_an_interpolation_of_another_version(ask: Engines, tmp_path: Path) -> None:
    file = _saved(tmp_path, trained("Llama", sites=[1])) / "config.json"
    file.write_text(file.read_text().replace('"lerp"', '"spline"'))
    with pytest.raises(ValueError, match=r"control.interpolation: 'spline' is not known here; one of dlerp, .* is"):
        ask(tmp_path, GREEDY)
