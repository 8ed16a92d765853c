"""A model that is filled from its files is the one that transformers loads, or one line says why it cannot be."""

import json

import pytest
import torch
from families import FAMILIES, IDS, tiny
from safetensors.torch import load_file, save_file

from controlllm.config import Method, ModelConfig
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.train import weight_files, weights
from controlllm.train.model import load_model
from controlllm.train.weights import empty_model, fill

METHODS = {
    "concat": {"control": {"num_expanded": 2, "norm_relaxation": "learned", "interpolation": "moe"}},
    "stack": {"control": {"num_expanded": 2, "layout": "stack"}},
    "hybrid": {"control": {"num_expanded": 4, "layout": "hybrid", "norm_relaxation": 0.1}},
    "lora": {"lora": {"rank": 3}},
    "partial": {"partial": {"num_blocks": 2}},
    "full": {},
}
FILE = "model.safetensors"


def settings(method, dtype="float32"):
    return ModelConfig(name="base", dtype=dtype, attention="sdpa"), Method.model_validate(METHODS[method])


def saved(folder, family="Llama", *, dtype=torch.float32, size="1MB", **changes):
    """A base whose tensors all differ, norms and biases too."""
    model = tiny(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    return folder


def filled(base, model, method, **changes):
    made = empty_model(base, model, method, **changes)
    fill(made, base, device="cpu")
    return made


def assert_same(got, want):
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(got, kind)(remove_duplicate=False))
        theirs = dict(getattr(want, kind)(remove_duplicate=False))
        assert list(mine) == list(theirs)
        for name, tensor in theirs.items():
            assert (mine[name].dtype, mine[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
            assert torch.equal(mine[name], tensor), name
    assert len(list(got.parameters())) == len(list(want.parameters()))  # tied as the other
    assert got.config.to_dict() == want.config.to_dict()
    assert got.generation_config.to_dict() == want.generation_config.to_dict()
    assert type(got) is type(want)
    assert got.training


@pytest.mark.parametrize("family", FAMILIES)
def test_filled_is_loaded(family, tmp_path):
    for tied, size in [(True, "1MB"), (False, "20KB")]:
        base = saved(tmp_path / size, family, tie_word_embeddings=tied, size=size)
        for method in METHODS:
            for dtype in ("float32", "bfloat16"):
                arguments = (base, *settings(method, dtype))
                assert_same(filled(*arguments), load_model(*arguments))


def test_what_is_trained_is_float32_and_what_is_not_as_the_recipe_says(tmp_path):
    base = saved(tmp_path, dtype=torch.bfloat16)
    for method in METHODS:
        model = load_model(base, *settings(method, "bfloat16"))
        for name, parameter in model.named_parameters():
            wanted = torch.float32 if parameter.requires_grad or "interpolation" in name else torch.bfloat16
            assert parameter.dtype == wanted, (method, name)
        assert model.training
        assert not model.config.use_cache


def test_a_fully_trained_model_starts_with_all_digits_of_its_files(tmp_path):
    base = saved(tmp_path)
    stored = load_file(base / FILE)
    for model in (load_model(base, *settings("full", "bfloat16")), filled(base, *settings("full", "bfloat16"))):
        assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())


def test_until_it_is_filled_a_model_takes_no_memory_for_what_is_in_the_files(tmp_path):
    model = empty_model(saved(tmp_path), *settings("concat"))
    real = {name.rpartition(".")[2] for name, p in model.named_parameters() if not p.is_meta}
    assert real == {"router_weight", "router_bias", "relaxation_logit"}
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_only_a_piece_is_read_at_a_time(tmp_path, monkeypatch):
    read, plain = [], weight_files.read_range
    monkeypatch.setattr(weight_files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(weights, "read_range", lambda *place: read.append(plain(*place)) or read[-1])
    base = saved(tmp_path, tie_word_embeddings=True)
    model = filled(base, *settings("concat"))
    assert_same(model, load_model(base, *settings("concat")))
    assert max(part.nbytes for part in read) <= 1000
    assert len(read) > 100


def test_a_filled_model_computes_what_its_base_does(tmp_path):
    base = saved(tmp_path)
    want = load_model(base, *settings("full"))(IDS).logits
    for method in ("concat", "stack"):  # the relaxed norms of the other start away from it
        assert torch.equal(filled(base, *settings(method)).eval()(IDS).logits, want)


def test_files_that_transformers_converts_are_loaded_whole_and_that_is_said(tmp_path):
    base = saved(tmp_path, "Mixtral")
    model = empty_model(base, *settings("concat"))
    with console.capture() as said:
        fill(model, base, device="cpu")
    assert "transformers makes other tensors of 'model.layers.0.block_sparse_moe.experts.0.w1.weight'" in said.get()
    assert "every process loads the whole base first" in said.get()
    assert said.get().count("\n") == 1


def test_names_without_the_prefix_are_found(tmp_path):
    base = saved(tmp_path)
    save_file({k.removeprefix("model."): v for k, v in load_file(base / FILE).items()}, base / FILE)
    assert_same(filled(base, *settings("concat")), load_model(base, *settings("concat")))


def test_a_leftover_that_transformers_knows_is_passed_over(tmp_path):
    base = saved(tmp_path)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(base / FILE) | old, base / FILE)
    assert_same(filled(base, *settings("concat")), load_model(base, *settings("concat")))


def test_tied_weights_may_be_stored_twice_if_they_are_equal(tmp_path):
    base = saved(tmp_path, tie_word_embeddings=True)
    stored = load_file(base / FILE)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, base / FILE)
    assert_same(filled(base, *settings("concat")), load_model(base, *settings("concat")))
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"] + 1}, base / FILE)
    with pytest.raises(UserError, match=r"differs from.*config.json ties them; set tie_word_embeddings to false"):
        empty_model(base, *settings("concat"))


WRONG = {
    "missing": (lambda t: t.pop("model.norm.weight"), "model.safetensors: tensor 'model.norm.weight' is missing"),
    "extra": (
        lambda t: t.update({"model.layers.0.bias": torch.ones(3)}),
        "model.safetensors: holds tensor 'model.layers.0.bias', which the model of its config.json does not have",
    ),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        r"model.safetensors: tensor 'model.norm.weight' has shape \[31\], its config.json describes \[32\]",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_tensor_is_named_with_its_file(kind, tmp_path):
    base, (change, says) = saved(tmp_path), WRONG[kind]
    tensors = load_file(base / FILE)
    change(tensors)
    save_file(tensors, base / FILE)
    with pytest.raises(UserError, match=says):
        empty_model(base, *settings("full"))
    with pytest.raises(UserError, match=says.split("/")[-1].removeprefix("model.safetensors: ")):
        load_model(base, *settings("full"))


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    base = saved(tmp_path, size="20KB")
    index = base / "model.safetensors.index.json"
    file = base / sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=f"{file.name}: cannot be read"):
        empty_model(base, *settings("full"))
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: cannot be read"):
        empty_model(base, *settings("full"))
    file.write_bytes(whole)
    model = empty_model(base, *settings("full"))
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: cannot be read"):
        fill(model, base, device="cpu")
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: has no weight_map"):
        empty_model(base, *settings("full"))
    index.unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        empty_model(base, *settings("full"))
